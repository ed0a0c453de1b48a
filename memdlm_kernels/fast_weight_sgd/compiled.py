"""fast_weight_sgd_ and the backward of fast_weight_sgd in C++ (csrc/cpu) or CUDA (csrc/cuda).

Each is one op, for which the tensors' device chooses.
"""

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
    cast: Tensor | None,
) -> tuple[Tensor, Tensor]:
    sets, count = param.shape[0], segments.shape[0] - 1
    norm_dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    norm = param.new_empty(sets, count, dtype=norm_dtype)
    skipped = param.new_empty(sets, dtype=torch.bool)
    work, work_cast = _adjacent(param), None if cast is None else _adjacent(cast)
    torch.ops.memdlm_C.fast_weight_sgd_(
        *(work, _adjacent(grad), segments.contiguous(), lr, max_norm, clip, loss),
        *(norm, skipped, work_cast),
    )
    if work is not param:
        param.copy_(work)
    if cast is not None and work_cast is not None and work_cast is not cast:
        cast.copy_(work_cast)
    return norm, skipped


def fast_weight_sgd_backward(
    grad_updated: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str,
    skipped: Tensor,
) -> Tensor:
    grad_grad = grad.new_empty(grad.shape)
    torch.ops.memdlm_C.fast_weight_sgd_backward(
        *(_adjacent(grad_updated), _adjacent(grad), segments.contiguous(), lr, max_norm, clip),
        *(skipped, grad_grad),
    )
    return grad_grad


def _adjacent(flat: Tensor) -> Tensor:
    """`flat`, or a copy with adjacent columns, which the kernels want; rows may lie anywhere."""
    return flat if flat.stride(1) == 1 else flat.contiguous()
