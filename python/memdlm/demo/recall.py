"""Needle recall: which values does the model fill in where the whole response is masked."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from memdlm.backbone import Backbone
from memdlm.demo.examples import build_examples
from memdlm.evaluation.held_out import Adapt, adapted_batches, no_memory
from memdlm.inference import token_logits

VALUE_TOKENS = 2
ROWS_PER_BATCH = 16

# The share of questions that ask for several values.
KINDS = {"one": 0.0, "several": 1.0}


def recalls(
    model: nn.Module, mask_id: int, adapt: Adapt, lengths: Sequence[int], count: int
) -> dict[str, float]:
    """Recall on held-out questions of each length, for one value and for several.

    Args:
        model, mask_id, adapt: as for `recall`.
        lengths: tokens of an example, each at least 96.
        count: questions of each kind.

    Returns:
        "recall_256_one" and so on, to the share.
    """
    found = {}
    for length, (kind, several) in itertools.product(lengths, KINDS.items()):
        asked = build_examples(
            "validation", count, length, 1, recall_share=1.0, several_share=several
        )
        found[f"recall_{length}_{kind}"] = recall(model, asked, mask_id, adapt)
    return found


@torch.no_grad()
def recall(
    model: nn.Module,
    examples: Sequence[dict[str, Any]],
    mask_id: int,
    adapt: Adapt = no_memory,
) -> float:
    """The share of the asked values that stand in the response, in whatever order, as RULER scores.

    The whole response is masked and filled in at once; a value counts where both its tokens stand
    in one of the response's places for values. Chance is 1/9,000 for a value drawn at random,
    1/(number of needles) for one copied at random.

    Args:
        model: as for `Backbone`, in evaluation mode.
        examples: recall examples of one length (`memdlm.demo.examples.build_examples`).
        mask_id: id of the mask token, which is never an answer.
        adapt: `no_memory`, or `PromptMemory.adapt`.

    Returns:
        float in [0, 1].
    """
    backbone = Backbone(model)
    right = asked = 0
    for _, batch in adapted_batches(examples, ROWS_PER_BATCH, adapt, "recall"):
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
        logits = token_logits(backbone, tokens.masked_fill(masked, mask_id), rows)  # [B, W, V]
        logits[..., mask_id] = -torch.inf
        filled = logits.argmax(-1).unflatten(1, (-1, VALUE_TOKENS))
        places = (wanted >= 0).unflatten(1, (-1, VALUE_TOKENS)).all(-1)  # [B, places]
        values = wanted.unflatten(1, (-1, VALUE_TOKENS))
        same = (filled[:, :, None] == values[:, None]).all(-1)  # [B, place, value]
        right += int((same & places[:, :, None]).any(1).sum())
        asked += int(places.sum())
    return right / asked
