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
    return torch.ops.memdlm_C.fast_weight_sgd_(param, grad, segments, lr, max_norm, clip, loss)
