"""The demo's questions, with their needle taken out, and the kind of every token."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memdlm.demo.examples import DemoText, build_examples, load_text
from memdlm.demo.needles import question, statement
from memdlm.demo.recall import VALUE_TOKENS
from memdlm.evaluation.held_out import prompt_of

VALUE, STATEMENT, OTHER_VALUE = "asked value", "asked statement", "other values"
OTHER_STATEMENT, QUESTION, TEXT = "other statements", "question", "text"
KINDS = (VALUE, STATEMENT, OTHER_VALUE, OTHER_STATEMENT, QUESTION, TEXT)

# Recall and held-out NLL are measured on the seeds below.
_FIRST_SEED = 4
# Every statement of the demo begins with these words, and its value stands before a full stop.
_OPENING, _VERB = " The magic number for", " is"


@dataclass(frozen=True)
class Question:
    """A prompt that states a value and asks for it; all prompts of a length are equally long.

    Attributes:
        prompt: token ids.
        kinds: of each of its tokens, one of `KINDS`.
        without: the prompt with text in place of the statement that answers it.
        unrelated: text without needles, as long as the prompt.
        response: token ids of the answer, its value first.
        value: token ids of that value.
    """

    prompt: list[int]
    kinds: list[str]
    without: list[int]
    unrelated: list[int]
    response: list[int]
    value: list[int]

    @property
    def other_values(self) -> list[list[int]]:
        """Token ids of the values that are not asked for, in the order of the prompt."""
        own = zip(self.prompt, self.kinds, strict=True)
        return in_values([token for token, kind in own if kind == OTHER_VALUE])


def in_values(tokens: Sequence[int]) -> list[list[int]]:
    """Tokens, or what is known of each, by the value that they are of."""
    firsts = range(0, len(tokens), VALUE_TOKENS)
    return [list(tokens[first : first + VALUE_TOKENS]) for first in firsts]


def build_questions(count: int, length: int, seed: int) -> list[Question]:
    """Held-out questions for one value, the same for the same arguments.

    Args:
        count: how many.
        length: tokens of each with its answer, at least 96.
        seed: at least 0.

    Returns:
        The questions. In none does the value stand anywhere but in the statement.

    Raises:
        ValueError: as `build_examples`.
    """
    text = load_text("validation")
    # A value may stand twice by chance: there are more than enough.
    examples = build_examples(
        "validation", 2 * count, length, _FIRST_SEED + seed, recall_share=1.0, several_share=0.0
    )
    made = (
        _question(text, example, random.Random(f"probe/{seed}/{length}/{number}"))
        for number, example in enumerate(examples)
    )
    return list(itertools.islice((each for each in made if each is not None), count))


def _question(text: DemoText, example: dict[str, Any], rng: random.Random) -> Question | None:
    prompt = prompt_of(example)
    response = list(example["input_ids"][len(prompt) :])
    value = response[:VALUE_TOKENS]
    sentence = list(text.encode(statement(example["key"], example["values"][0])))
    places = find(prompt, sentence)
    if len(places) != 1 or len(find(prompt, value)) != 1:
        return None
    begin, end = places[0], places[0] + len(sentence)
    while True:
        without = prompt[:begin] + text.window(rng, len(sentence)) + prompt[end:]
        if not find(without, value):
            break
    asked = len(text.encode(question(example["key"], False)))
    kinds = _kinds(text, prompt, range(begin, end), asked)
    return Question(prompt, kinds, without, text.window(rng, len(prompt)), response, value)


def find(tokens: Sequence[int], part: Sequence[int]) -> list[int]:
    """Where a run of tokens begins in others."""
    size, part = len(part), list(part)
    return [i for i in range(len(tokens) - size + 1) if list(tokens[i : i + size]) == part]


def _kinds(text: DemoText, prompt: list[int], asked: range, question_length: int) -> list[str]:
    kinds = [TEXT] * len(prompt)
    begin_of_question = len(prompt) - question_length
    verb = text.encode(_VERB)[0]
    for begin in find(prompt[:begin_of_question], text.encode(_OPENING)):
        first = prompt.index(verb, begin) + 1
        is_asked = begin == asked.start
        for place in range(begin, first + VALUE_TOKENS + 1):
            kinds[place] = STATEMENT if is_asked else OTHER_STATEMENT
        for place in range(first, first + VALUE_TOKENS):
            kinds[place] = VALUE if is_asked else OTHER_VALUE
    kinds[begin_of_question:] = [QUESTION] * question_length
    return kinds
