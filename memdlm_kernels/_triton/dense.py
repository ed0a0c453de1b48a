"""The low-rank products by the library, which is best at many rows of one update.

As those of `low_rank.py`, of one expert: weights are [S, 1, P, R, C], rows of S sequences.
"""

import torch
from torch import Tensor


def shrink(wide: Tensor, weight: Tensor, ends: None, scale: float) -> Tensor:
    """scale * wide @ weightᵀ: [N, P * C] to [N, P * R]."""
    return _product(wide, weight.mT, scale)


def expand(narrow: Tensor, weight: Tensor, ends: None) -> Tensor:
    """narrow @ weight: [N, P * R] to [N, P * C]."""
    return _product(narrow, weight, 1)


def outer(narrow: Tensor, wide: Tensor, ends: None, grad: Tensor) -> None:
    """Write narrowᵀ @ wide of each set and projection to grad, as a weight."""
    parts = grad.squeeze(1).unbind(1)  # P of [S, R, C]
    narrow, wide = _by_set(narrow, grad), _by_set(wide, grad)
    rows = zip(narrow.chunk(len(parts), -1), wide.chunk(len(parts), -1), strict=True)
    for part, (n, w) in zip(parts, rows, strict=True):
        part.copy_(torch.bmm(n.mT, w))


def _product(rows: Tensor, weight: Tensor, scale: float) -> Tensor:
    parts = weight.squeeze(1).unbind(1)
    rows = _by_set(rows, weight)
    out = rows.new_empty(*rows.shape[:2], len(parts) * weight.shape[-1])
    pairs = zip(out.chunk(len(parts), -1), rows.chunk(len(parts), -1), strict=True)
    for part, (o, r) in zip(parts, pairs, strict=True):
        # The scale is in the product's epilogue.
        o.baddbmm_(r, part.to(r.dtype), beta=0, alpha=scale)
    return out.flatten(0, 1)


def _by_set(rows: Tensor, weight: Tensor) -> Tensor:
    """[S, L, columns]."""
    sets = weight.shape[0]
    return rows.unflatten(0, (sets, rows.shape[0] // sets))
