"""fast_weight_sgd_ on the CPU: one pass for the norms, one for the update (csrc/cpu)."""

import torch
from torch import Tensor


def fast_weight_sgd_(
    param: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str,
    loss: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sets, count = param.shape[0], segments.shape[0] - 1
    norm_dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    norm = param.new_empty(sets, count, dtype=norm_dtype)
    skipped = param.new_zeros(sets, dtype=torch.bool) if loss is None else ~loss.isfinite()
    # The kernel wants adjacent columns; rows may lie anywhere.
    work = param if param.stride(1) == 1 else param.contiguous()
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    torch.ops.memdlm_C.fast_weight_sgd_(
        work, grad, segments.contiguous(), lr, max_norm, clip, norm, skipped
    )
    if work is not param:
        param.copy_(work)
    return norm, skipped
