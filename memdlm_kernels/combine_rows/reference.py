"""combine_rows and spread_rows in plain PyTorch: the oracle. Never optimised."""

import torch
from torch import Tensor


def combine_rows(rows: Tensor, index: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    chosen = rows.index_select(0, index.flatten()).unflatten(0, index.shape)  # [N, k, D]
    if weight is None:
        return chosen.sum(1).to(dtype)
    return (chosen.to(weight.dtype).mT @ weight[..., None])[..., 0].to(dtype)


def spread_rows(rows: Tensor, index: Tensor) -> Tensor:
    repeated = rows.repeat_interleave(index.shape[1], 0)
    return torch.zeros_like(repeated).index_copy(0, index.flatten(), repeated)
