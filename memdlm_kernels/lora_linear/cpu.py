"""lora_linear on the CPU: library GEMMs over row blocks that stay in the cache (csrc/cpu)."""

import torch
from torch import Tensor


def lora_linear(
    x: Tensor, base: Tensor, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.ops.memdlm_C.lora_linear(x, base, A, B, scale)


def lora_linear_backward(
    grad_out: Tensor,
    x: Tensor | None,
    shrink: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.memdlm_C.lora_linear_backward(grad_out, x, shrink, A, B, scale, need_grad_x)
