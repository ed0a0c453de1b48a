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
    """The share of the asked values that stand in the response, in whatever order, as RULER scores.

    The whole response is masked and filled in at once; a value counts where both its tokens stand
    in one of the response's places for values. Chance is 1/9,000 for a value drawn at random,
    1/(number of needles) for one copied at random.

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
            position = torch.tensor([start + i for start in own for i in range(VALUE_TOKENS)])
            rows[row, : len(position)] = position
            wanted[row, : len(position)] = tokens[row, position]
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
        filled = logits.argmax(-1).view_as(rows).unflatten(1, (-1, VALUE_TOKENS))
        places = (wanted >= 0).unflatten(1, (-1, VALUE_TOKENS)).all(-1)  # [B, places]
        values = wanted.unflatten(1, (-1, VALUE_TOKENS))
        same = (filled[:, :, None] == values[:, None]).all(-1)  # [B, place, value]
        right += int((same & places[:, :, None]).any(1).sum())
        asked += int(places.sum())
    return right / asked
