"""Held-out examples in batches, each under the memory of its prompt."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from memdlm.data.collator import IGNORE_INDEX

# Takes prompts, B lists of token ids; in its context the model reads a memory of them.
Adapt = Callable[[Sequence[Sequence[int]]], contextlib.AbstractContextManager[Any]]


def no_memory(prompts: Sequence[Sequence[int]]) -> contextlib.AbstractContextManager[None]:
    """Adapt to nothing: what `PromptMemory.adapt` is without a memory."""
    return contextlib.nullcontext()


def prompt_of(example: dict[str, Any]) -> list[int]:
    """The tokens before the first that has a label."""
    labels = list(example["labels"])
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
    return list(example["input_ids"][:first])


def check_prompts(examples: Sequence[dict[str, Any]]) -> None:
    """Whether a memory can be written of each example's prompt.

    Raises:
        ValueError: an example without a prompt; names it.
    """
    for number, example in enumerate(examples):
        if not prompt_of(example):
            raise ValueError(
                "examples must each have a prompt where a memory is written from it, got none in "
                f"example {number}"
            )


def adapted_batches(
    examples: Sequence[dict[str, Any]], batch_size: int, adapt: Adapt, title: str
) -> Iterator[tuple[int, Sequence[dict[str, Any]]]]:
    """Go through examples in batches, each inside the memory of its prompts.

    Args:
        examples: with `input_ids` and `labels`.
        batch_size: examples of a batch, at least 1.
        adapt: `no_memory`, or `PromptMemory.adapt`.
        title: of the progress bar.

    Yields:
        The number of the batch's first example, and the batch.
    """
    with tqdm(total=len(examples), desc=title, leave=False) as bar:
        for first in range(0, len(examples), batch_size):
            batch = examples[first : first + batch_size]
            with adapt([prompt_of(example) for example in batch]):
                yield first, batch
            bar.update(len(batch))
