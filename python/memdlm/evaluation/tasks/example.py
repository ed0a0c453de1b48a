"""A question about a long text, before and after the text has its length."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Draft:
    """A question whose text can be of any length.

    Attributes:
        body: what the user says, of a size: words of noise, or rare words in a list; the more, the
            longer.
        most: the largest size there is; None for no limit.
        question: the part of it that asks.
        answer_prefix: the beginning of the answer, which is given.
        references: what the answer has to name.
    """

    body: Callable[[int], str]
    most: int | None
    question: str
    answer_prefix: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A question about a long text.

    Attributes:
        task: one of `memdlm.evaluation.tasks.TASKS`.
        length: tokens that prompt and answer may have together.
        index: its number among those of the task and length.
        prompt: the text, up to the answer.
        prompt_ids: its tokens.
        question: the part of the prompt that asks.
        references: what the answer has to name.
        answer: "all" is scored by the share of the references that it names, "place" by whether it
            names the one place and no other.
    """

    task: str
    length: int
    index: int
    prompt: str
    prompt_ids: list[int]
    question: str
    references: tuple[str, ...]
    answer: Literal["all", "place"]
