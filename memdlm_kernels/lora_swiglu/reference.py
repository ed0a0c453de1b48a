"""lora_swiglu in plain PyTorch: the oracle. Never optimised."""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_swiglu(
    x: Tensor | None,
    gate: Tensor,
    up: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    offsets: Tensor | None,
    B_is_zero: bool,
) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    if x is not None and A is not None and B is not None:
        A, B = A.to(x.dtype), B.to(x.dtype)
        if B_is_zero:  # then only B has a gradient
            x, A = x.detach(), A.detach()
        gate_update, up_update = _update(x, A, B, offsets).chunk(2, dim=-1)
        gate = gate + scale * gate_update
        up = up + scale * up_update
    return F.silu(gate) * up


def _update(x: Tensor, A: Tensor, B: Tensor, offsets: Tensor | None) -> Tensor:
    """[..., 2 I]."""
    if offsets is None:
        return _both(x, A, B)
    if A.dim() == 4:  # to the groups' order: by expert, then by sequence
        A, B = A.transpose(0, 1).flatten(0, 1), B.transpose(0, 1).flatten(0, 1)
    ends = offsets.flatten()
    lengths = ends.diff(prepend=ends.new_zeros(1)).tolist()
    groups = zip(x.split(lengths), A, B, strict=True)
    return torch.cat([_both(rows, a, b) for rows, a, b in groups])


def _both(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    shrinks = (x @ A.mT).chunk(2, dim=-1)  # 2 of [..., R]
    blocks = B.chunk(2, dim=-2)  # 2 of [..., I, R]
    return torch.cat([s @ b.mT for s, b in zip(shrinks, blocks, strict=True)], dim=-1)
