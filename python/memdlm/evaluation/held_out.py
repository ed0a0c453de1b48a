"""Held-out examples in batches, each under the memory of its prompt, and their NLL."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from memdlm.backbone import Backbone
from memdlm.config import DiffusionConfig
from memdlm.data.collator import IGNORE_INDEX, MaskCollator
from memdlm.objective import anchor_boundary
from memdlm_kernels import masked_linear_cross_entropy

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


@torch.no_grad()
def held_out_nll(
    model: nn.Module,
    examples: Sequence[dict[str, Any]],
    diffusion: DiffusionConfig,
    *,
    mask_token_id: int,
    pad_token_id: int,
    adapt: Adapt = no_memory,
    draws: int = 2,
    batch_size: int = 8,
    seed: int = 0,
) -> Tensor:
    """MDLM's bound on the NLL of responses: the outer loss of training, memory off or on.

    With a memory it is written from the prompt alone: nothing of the response is seen.

    Args:
        model: as for `Backbone`, in evaluation mode.
        examples: with `input_ids` and `labels`.
        diffusion: noise and weights; each example counts alike, whatever its `loss_norm`.
        mask_token_id, pad_token_id: as for `MaskCollator`.
        adapt: `no_memory`, or `PromptMemory.adapt`.
        draws: how often each example is masked, which steadies the estimate; at least 1.
        batch_size: examples of a batch.
        seed: of the masks.

    Returns:
        [n] float64, nats per response token of each example.
    """
    backbone = Backbone(model, block_size=diffusion.block_size)
    weight, bias = backbone.head()
    collator = MaskCollator(
        mask_token_id,
        pad_token_id,
        backbone.config.vocab_size,
        dataclasses.replace(diffusion, loss_norm="sequence"),
        seed=seed,
        pad_to_multiple_of=diffusion.block_size or 1,
        right_shift_logits=backbone.right_shift_logits,
    )
    found = torch.zeros(len(examples), dtype=torch.float64)
    for first, batch in adapted_batches(examples, batch_size, adapt, "held-out NLL"):
        for draw in range(draws):
            features = [
                {**example, "example": first + row, "epoch": draw}
                for row, example in enumerate(batch)
            ]
            made = send_to_device(collator(features), weight.device)
            anchor = made["anchor"]
            boundary = anchor_boundary(backbone, made)
            hidden = backbone.suffix(
                boundary.activations, anchor["valid"], boundary.context, contextlib.nullcontext()
            )  # [M, D]
            nll = masked_linear_cross_entropy(hidden, weight, anchor["target"], bias=bias)
            share = (nll.double() * anchor["weight"]).cpu() / draws
            found.index_add_(0, first + anchor["sample"].cpu(), share)
    return found
