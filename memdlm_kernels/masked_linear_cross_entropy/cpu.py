"""masked_linear_cross_entropy on the CPU: one pass over vocabulary chunks (csrc/cpu).

Ignored rows are left out whatever `compact` is: their number is known here without a wait.
"""

import torch
from torch import Tensor

from memdlm_kernels._reduction import check_targets


def _with_contiguous_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _prepare(
    hidden: Tensor, weight: Tensor, target: Tensor, index: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    # A compiled graph calls the op without the public function's checks.
    check_targets(target, ignore_index, weight.shape[0])
    if index is not None:
        check_index(index, hidden.shape[0])
        index = index.contiguous()
    return (
        _with_contiguous_rows(hidden),
        _with_contiguous_rows(weight),
        target.contiguous(),
        index,
    )


def check_index(index: Tensor, rows: int) -> None:
    bad = (index < 0) | (index >= rows)
    if bad.any():
        raise ValueError(f"index must be in [0, {rows}), got {index[bad][0].item()}")


def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    chunk_bytes: int | None,
    need_stash: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, target, index = _prepare(hidden, weight, target, index, ignore_index)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows, depth = hidden.shape[0] if index is None else index.shape[0], hidden.shape[1]
    # Not new_empty of a shape and a dtype, which takes twice as long.
    nll = torch.empty(rows, dtype=dtype)
    lse = torch.empty_like(nll)
    stash = nll.new_empty(rows, depth) if need_stash else nll.new_empty(0)
    torch.ops.memdlm_C.masked_linear_cross_entropy(
        hidden,
        weight,
        target,
        None if bias is None else bias.to(dtype).contiguous(),
        index,
        ignore_index,
        softcap,
        chunk_bytes,
        nll,
        lse,
        stash if need_stash else None,
    )
    return nll, lse, stash


def masked_linear_cross_entropy_backward(
    grad_nll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    nll: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    chunk_bytes: int | None,
    need_grad_hidden: bool,
    need_grad_weight: bool,
    need_grad_bias: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    dtype = hidden.dtype
    hidden, weight, target, index = _prepare(hidden, weight, target, index, ignore_index)
    # Of the rows read: several may read the same row of hidden.
    grad_rows = nll.new_empty((target.shape[0], hidden.shape[1]) if need_grad_hidden else (0,))
    grad_weight = weight.new_empty(weight.shape if need_grad_weight else (0,))
    grad_bias = nll.new_empty(weight.shape[:1] if need_grad_bias else (0,))
    torch.ops.memdlm_C.masked_linear_cross_entropy_backward(
        grad_nll.contiguous(),
        hidden,
        weight,
        target,
        None if bias is None else bias.to(nll.dtype).contiguous(),
        index,
        nll,
        lse,
        ignore_index,
        softcap,
        chunk_bytes,
        grad_rows if need_grad_hidden else None,
        grad_weight if need_grad_weight else None,
        grad_bias if need_grad_bias else None,
    )
    if need_grad_hidden:
        grad_rows = _scatter_rows(None, grad_rows, index, rows, dtype)
    return grad_rows.to(dtype), grad_weight, grad_bias.to(dtype)


def masked_linear_cross_entropy_stash_backward(
    grad_nll: Tensor, stash: Tensor, index: Tensor | None, rows: int, dtype: torch.dtype
) -> Tensor:
    return _scatter_rows(grad_nll.contiguous(), stash, index, rows, dtype)


def _scatter_rows(
    scale: Tensor | None, rows: Tensor, index: Tensor | None, count: int, dtype: torch.dtype
) -> Tensor:
    """[count, D] with scale * rows at `index`, rounded to `dtype` once, after duplicates add up."""
    out = rows.new_empty((count, rows.shape[1]), dtype=dtype)
    torch.ops.memdlm_C.scatter_rows(scale, rows, None if index is None else index.contiguous(), out)
    return out
