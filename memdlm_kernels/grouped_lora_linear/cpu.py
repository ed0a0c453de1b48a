"""grouped_lora_linear on the CPU: library GEMMs on each group's rows, in parallel (csrc/cpu)."""

import torch
from torch import Tensor


def shrink_of(x: Tensor, A: Tensor, B: Tensor, offsets: Tensor, scale: float) -> Tensor:
    # No column of an output is asked for.
    return grouped_lora_linear(x, x[:, :0], A, B[..., :0, :], offsets, scale)[1]


def grouped_lora_linear(
    x: Tensor, base: Tensor, A: Tensor, B: Tensor, offsets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out = base.new_empty(base.shape)
    shrink = x.new_empty(x.shape[0], A.shape[-2])
    torch.ops.memdlm_C.grouped_lora_linear(
        x, base, A.to(x.dtype), B.to(x.dtype), offsets.contiguous(), scale, out, shrink
    )
    return out, shrink


def grouped_lora_linear_backward(
    grad_out: Tensor,
    x: Tensor | None,
    shrink: Tensor | None,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = grad_out.shape[0], grad_out.dtype
    grad_shrink = grad_out.new_empty(rows, A.shape[-2])
    grad_x = grad_out.new_empty(rows, A.shape[-1]) if need_grad_x else None
    grad_A = A.new_empty(A.shape, dtype=dtype) if x is not None else None
    grad_B = B.new_empty(B.shape, dtype=dtype) if shrink is not None else None
    torch.ops.memdlm_C.grouped_lora_linear_backward(
        # The gradient of a sum has stride 0, which sends the library down a slow path.
        grad_out.contiguous(),
        x,
        shrink,
        A.to(dtype),
        B.to(dtype),
        offsets.contiguous(),
        scale,
        grad_shrink,
        grad_x,
        grad_A,
        grad_B,
    )
    return (
        grad_out.new_empty(0) if grad_x is None else grad_x,
        A.new_empty(0) if grad_A is None else grad_A.to(A.dtype),
        B.new_empty(0) if grad_B is None else grad_B.to(B.dtype),
    )
