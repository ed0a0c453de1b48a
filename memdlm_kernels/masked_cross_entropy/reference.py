"""masked_cross_entropy in plain PyTorch: the oracle. Never optimised."""

import torch
from torch import Tensor


def masked_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(nll [...], lse [...]), in float64 for float64 inputs, else in float32."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    keep = target != ignore_index  # [...]
    # where() and not a product: an ignored row may hold nan, and its gradient is still zero.
    logits = torch.where(keep[..., None], logits, 0).to(dtype)  # [..., V]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(dim=-1)
    label = torch.where(keep, target, 0)
    nll = lse - logits.gather(-1, label[..., None]).squeeze(-1)
    return torch.where(keep, nll, 0), torch.where(keep, lse, 0).detach()


def masked_cross_entropy_(
    logits: Tensor, target: Tensor, ignore_index: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The same, with d nll / d logits over the logits."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        nll, lse = masked_cross_entropy(leaf, target, ignore_index, softcap)
        (grad_logits,) = torch.autograd.grad(nll.sum(), leaf)
    logits.copy_(grad_logits)
    return nll.detach(), lse


def scale_rows_(grad_logits: Tensor, grad_nll: Tensor, target: Tensor, ignore_index: int) -> None:
    scale = torch.where(target == ignore_index, 0, grad_nll)
    grad_logits.mul_(scale.unsqueeze(-1))
