"""combine_rows and spread_rows by PyTorch's own operators: the sum is N products of one row.

Neither a weighted copy of the rows nor, where the weights are wider than they, a wider one is kept
for backward, which gathers them again.
"""

import torch
from torch import Tensor


def combine_rows(rows: Tensor, index: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    chosen = _chosen(rows, index)
    if weight is None:
        return chosen.sum(1).to(dtype)
    with torch.autocast(rows.device.type, enabled=False):
        return (weight[:, None] @ chosen.to(weight.dtype))[:, 0].to(dtype)


def combine_rows_backward(
    grad_out: Tensor,
    rows: Tensor | None,
    index: Tensor,
    weight: Tensor,
    count: int,
    dtype: torch.dtype,
    need_grad_rows: bool,
) -> tuple[Tensor, Tensor]:
    grad_out = grad_out.to(weight.dtype)
    grad_rows, grad_weight = grad_out.new_empty(0, dtype=dtype), weight.new_empty(0)
    if need_grad_rows:
        grad_chosen = (weight[..., None] * grad_out[:, None]).to(dtype)  # [N, k, D]
        grad_rows = _put(grad_chosen.flatten(0, 1), index, count)
    if rows is not None:
        # As any product's gradient, in autocast's dtype where backward runs under it.
        products = _chosen(rows, index).to(weight.dtype) @ grad_out[..., None]
        grad_weight = products[..., 0].to(weight.dtype)
    return grad_rows, grad_weight


def spread_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    return _put(rows, index, count)


def _chosen(rows: Tensor, index: Tensor) -> Tensor:
    """[N, k, D]."""
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape)


def _put(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """[P, D] with each row where the index says, repeated if there are k times as many places."""
    source = torch.arange(index.numel(), device=index.device)
    if len(rows) < index.numel():
        source //= index.shape[1]
    if count > index.numel():
        out = rows.new_zeros(count, rows.shape[1])
        return out.index_copy_(0, index.flatten(), rows.index_select(0, source))
    # Gathered by the inverse of the index, since a scatter of rows has one thread.
    inverse = torch.empty_like(source).scatter_(0, index.flatten(), source)
    return rows.index_select(0, inverse)
