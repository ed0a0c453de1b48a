"""grouped_lora_linear in plain PyTorch: the oracle. Never optimised."""

import torch
from torch import Tensor


def grouped_lora_linear(
    x: Tensor, base: Tensor, A: Tensor, B: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    A, B = A.to(x.dtype), B.to(x.dtype)
    if A.dim() == 4:  # to the groups' order: by expert, then by sequence
        A, B = A.transpose(0, 1).flatten(0, 1), B.transpose(0, 1).flatten(0, 1)
    rank = B.shape[-1]
    projections = A.shape[-2] // rank
    ends = offsets.flatten()
    lengths = ends.diff(prepend=ends.new_zeros(1)).tolist()
    updates = []
    for rows, a, b in zip(x.split(lengths), A, B, strict=True):
        shrinks = (rows @ a.mT).split(rank, dim=-1)  # P of [n, R]
        blocks = b.chunk(projections)  # P of [out / P, R]
        update = [shrink @ block.mT for shrink, block in zip(shrinks, blocks, strict=True)]
        updates.append(torch.cat(update, dim=-1))  # [n, out]
    return base + scale * torch.cat(updates)
