"""Offsets of rows that are sorted into groups, as torch.nn.functional.grouped_mm takes them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_offsets(offsets: Tensor, shape: Sequence[int], rows: int, owner: str) -> None:
    """Raise ValueError unless `offsets` cuts `rows` rows into the groups of `owner`.

    The values are looked at where that is free: on the CPU, and not while compiling.

    Args:
        offsets: to be int32 of this shape: the row at which each group ends.
        shape: [E] or [E, S].
        rows: N, where the last group must end.
        owner: the argument that has the groups, for the error text.
    """
    if offsets.dtype != torch.int32 or list(offsets.shape) != [*shape] or offsets.numel() == 0:
        raise ValueError(
            f"offsets must be int32 {[*shape]} for {owner}, and not empty, got {offsets.dtype} "
            f"{list(offsets.shape)}"
        )
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    ends = offsets.flatten()
    first, last = ends[0].item(), ends[-1].item()
    if first < 0 or last != rows:
        raise ValueError(f"offsets must run from 0 or more to N = {rows}, got {first} to {last}")
    if (ends[1:] < ends[:-1]).any():
        raise ValueError(f"offsets must ascend, got {offsets.tolist()}")
