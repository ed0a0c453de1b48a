"""masked_linear_cross_entropy in plain PyTorch: the oracle. Never optimised."""

import torch
from torch import Tensor


def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    ignore_index: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """(nll [M], lse [M]), in float64 for float64 inputs, else in float32."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    keep = target != ignore_index  # [M]
    rows = hidden if index is None else hidden[index]
    # where() and not a product: an ignored row may hold nan, and its gradient is still zero.
    rows = torch.where(keep[:, None], rows, 0).to(dtype)  # [M, D]
    logits = rows @ weight.to(dtype).mT  # [M, V]
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(dim=-1)
    label = torch.where(keep, target, 0)
    nll = lse - logits.gather(-1, label[:, None]).squeeze(-1)
    return torch.where(keep, nll, 0), torch.where(keep, lse, 0).detach()
