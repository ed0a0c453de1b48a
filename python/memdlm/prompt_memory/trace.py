"""What writing a memory from prompts saw."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memdlm.inner_loop import InnerTrace


@dataclass(frozen=True)
class PromptTrace:
    """The inner steps of S prompts, on the device.

    A prompt that was cut into fewer chunks than another took fewer steps: the rest of its column is
    nan, or False.

    Attributes:
        loss: [steps, S] float32 (float64 for a float64 model), each step's loss before its update.
        norm: [steps, S, P], gradient norms before clipping.
        skipped: [steps, S] bool, updates left out because a loss or gradient was not finite.
        chunks: S numbers, how many chunks each prompt was cut into; 1 for a whole one.
    """

    loss: Tensor
    norm: Tensor
    skipped: Tensor
    chunks: tuple[int, ...]


def joined(parts: Sequence[tuple[Sequence[int], Sequence[InnerTrace]]], count: int) -> PromptTrace:
    """Put the traces of several writings in the order of the prompts.

    Args:
        parts: of each writing, its prompts' numbers and the traces of its chunks.
        count: S, prompts in all.

    Returns:
        The trace.
    """
    first = parts[0][1][0]
    steps = max(sum(len(trace.loss) for trace in traces) for _, traces in parts)
    loss = first.loss.new_full((steps, count), torch.nan)
    norm = first.norm.new_full((steps, count, first.norm.shape[-1]), torch.nan)
    skipped = first.skipped.new_zeros((steps, count))
    chunks = [1] * count
    for prompts, traces in parts:
        own = list(prompts)
        for whole, name in ((loss, "loss"), (norm, "norm"), (skipped, "skipped")):
            values = torch.cat([getattr(trace, name) for trace in traces])
            whole[: len(values), own] = values
        for prompt in own:
            chunks[prompt] = len(traces)
    return PromptTrace(loss, norm, skipped, tuple(chunks))
