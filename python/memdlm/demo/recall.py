"""Needle recall: which values does the model fill in where the whole response is masked."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from memdlm.backbone import Backbone

VALUE_TOKENS = 2
ROWS_PER_BATCH = 16

Write = Callable[[Sequence[Sequence[int]]], contextlib.AbstractContextManager[None]]


def no_memory(prompts: Sequence[Sequence[int]]) -> contextlib.AbstractContextManager[None]:
    """Write nothing: what `PromptMemory.write` is without a memory.

    Args:
        prompts: lists of token ids.

    Returns:
        A context that does nothing.
    """
    return contextlib.nullcontext()


@torch.no_grad()
def recall(
    model: nn.Module,
    examples: Sequence[dict[str, Any]],
    mask_id: int,
    write: Write = no_memory,
) -> float:
    """The share of values that are filled in exactly, both tokens, each in its place.

    The whole response is masked and filled in at once. Chance is 1/9,000 for a value drawn at
    random, 1/(number of needles) for one copied at random.

    Args:
        model: as for `Backbone`, in evaluation mode.
        examples: recall examples of one length (`memdlm.demo.examples.build_examples`).
        mask_id: id of the mask token, which is never an answer.
        write: writes a memory from prompts, and returns the context under which it is read.

    Returns:
        float in [0, 1].
    """
    backbone = Backbone(model)
    weight, _ = backbone.head()
    right = asked = 0
    for first in range(0, len(examples), ROWS_PER_BATCH):
        batch = examples[first : first + ROWS_PER_BATCH]
        tokens = torch.tensor([example["input_ids"] for example in batch])
        masked = torch.tensor([example["labels"] for example in batch]) >= 0
        starts = [example["value_positions"] for example in batch]
        # Every value has as many places as the most that one example asks for.
        width = VALUE_TOKENS * max(map(len, starts))
        rows = torch.zeros(len(batch), width, dtype=torch.int64)
        wanted = torch.full((len(batch), width), -1)
        for row, own in enumerate(starts):
            places = torch.tensor([start + i for start in own for i in range(VALUE_TOKENS)])
            rows[row, : len(places)] = places
            wanted[row, : len(places)] = tokens[row, places]
        with write([row[~own].tolist() for row, own in zip(tokens, masked, strict=True)]):
            noisy = tokens.masked_fill(masked, mask_id)
            context = backbone.context(noisy, None, rows)
            hidden = backbone.suffix(
                backbone.prefix(noisy, context),
                torch.arange(rows.numel()),
                context,
                contextlib.nullcontext(),
            )  # [B * W, D]
        logits = hidden @ weight.mT
        logits[:, mask_id] = -torch.inf
        same = (logits.argmax(-1).view_as(rows) == wanted).unflatten(1, (-1, VALUE_TOKENS))
        right += int(same.all(-1).sum())
        asked += sum(map(len, starts))
    return right / asked
