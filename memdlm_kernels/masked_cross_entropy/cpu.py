"""masked_cross_entropy on the CPU: the rows that are not ignored, two passes each (csrc/cpu)."""

import torch
from torch import Tensor

from memdlm_kernels._reduction import check_targets


def masked_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    # A compiled graph calls the op without the public function's checks.
    check_targets(target, ignore_index, logits.shape[-1])
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    nll = logits.new_empty(target.shape, dtype=dtype)
    lse = torch.empty_like(nll)
    torch.ops.memdlm_C.masked_cross_entropy(
        logits.contiguous(), target.contiguous(), ignore_index, softcap, nll, lse
    )
    return nll, lse


def masked_cross_entropy_backward(
    grad_nll: Tensor,
    logits: Tensor,
    target: Tensor,
    nll: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
) -> Tensor:
    grad_logits = logits.new_empty(logits.shape)
    _write_gradient(grad_logits, grad_nll, logits, target, nll, lse, ignore_index, softcap)
    return grad_logits


def masked_cross_entropy_(
    logits: Tensor, target: Tensor, ignore_index: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    nll, lse = masked_cross_entropy(logits, target, ignore_index, softcap)
    # With a softcap the kernel reads the target's logit again after it has written the row.
    out = logits if softcap is None else logits.new_empty(logits.shape)
    ones = torch.ones_like(nll)
    _write_gradient(out, ones, logits, target, nll, lse, ignore_index, softcap)
    if out is not logits:
        logits.copy_(out)
    return nll, lse


def scale_rows_(grad_logits: Tensor, grad_nll: Tensor, target: Tensor, ignore_index: int) -> None:
    scale = torch.where(target == ignore_index, 0, grad_nll)
    grad_logits.mul_(scale.unsqueeze(-1))


def _write_gradient(
    grad_logits: Tensor,
    grad_nll: Tensor,
    logits: Tensor,
    target: Tensor,
    nll: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
) -> None:
    torch.ops.memdlm_C.masked_cross_entropy_backward(
        grad_nll.contiguous(),
        logits.contiguous(),
        target.contiguous(),
        nll,
        lse,
        ignore_index,
        softcap,
        grad_logits,
    )
