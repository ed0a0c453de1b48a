"""lora_linear on the CPU: two library GEMMs forward, one to four backward (csrc/cpu)."""

import torch
from torch import Tensor


def shrink_of(x: Tensor, A: Tensor, scale: float) -> Tensor:
    shrink = x.new_empty(*x.shape[:-1], A.shape[-2])
    rows = shrink.view(-1, shrink.shape[-1]) if A.dim() == 2 else shrink
    nothing = rows.new_empty(*rows.shape[:-1], 0)  # no column of an output is asked for
    A = A.to(x.dtype)
    torch.ops.memdlm_C.lora_linear(
        x.reshape(*rows.shape[:-1], x.shape[-1]), nothing, A, A.mT[..., :0, :], scale, nothing, rows
    )
    return shrink


def lora_linear(
    x: Tensor, base: Tensor, A: Tensor, B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out = base.new_empty(base.shape)
    shrink = x.new_empty(*x.shape[:-1], A.shape[-2])
    rows = _as_rows if A.dim() == 2 else _as_it_is
    torch.ops.memdlm_C.lora_linear(
        rows(x), rows(base), A.to(x.dtype), B.to(x.dtype), scale, rows(out), rows(shrink)
    )
    return out, shrink


def lora_linear_backward(
    grad_out: Tensor,
    x: Tensor | None,
    shrink: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    need_grad_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    leading, dtype = grad_out.shape[:-1], grad_out.dtype
    grad_shrink = grad_out.new_empty(*leading, A.shape[-2])
    grad_x = grad_out.new_empty(*leading, A.shape[-1]) if need_grad_x else None
    grad_A = A.new_empty(A.shape, dtype=dtype) if x is not None else None
    grad_B = B.new_empty(B.shape, dtype=dtype) if shrink is not None else None
    rows = _as_rows if A.dim() == 2 else _as_it_is
    torch.ops.memdlm_C.lora_linear_backward(
        # The gradient of a sum has stride 0, which sends the library down a slow path.
        rows(grad_out.contiguous()),
        rows(x),
        rows(shrink),
        A.to(dtype),
        B.to(dtype),
        scale,
        rows(grad_shrink),
        rows(grad_x),
        grad_A,
        grad_B,
    )
    return (
        grad_out.new_empty(0) if grad_x is None else grad_x,
        A.new_empty(0) if grad_A is None else grad_A.to(A.dtype),
        B.new_empty(0) if grad_B is None else grad_B.to(B.dtype),
    )


def _as_rows(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1])


def _as_it_is(tensor: Tensor | None) -> Tensor | None:
    return tensor
