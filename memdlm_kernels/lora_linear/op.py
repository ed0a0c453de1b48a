"""lora_linear: public function, checks, registration, autograd, FLOP count, backend order."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memdlm_kernels._backends import CPU, REFERENCE, TRITON, choose, without_autocast
from memdlm_kernels._library import op
from memdlm_kernels.lora_linear import cpu, reference

Shape = Sequence[int]


def lora_linear(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    B_is_zero: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Add a low-rank update of fast weights to the output of a frozen linear layer.

    Replaces `base + scale * (x @ A.mT) @ B.mT`. Neither the update [..., out] nor its scaled copy
    is allocated, in forward or backward, and the shrink `x @ A.mT` is computed once for both. With
    `B_is_zero` nothing is computed or allocated in forward, and in backward only grad_B.

    Args:
        x: [..., in], float32, bfloat16, float64 or float16; the frozen layer's input.
        base: [..., out], x's dtype; the frozen layer's own output (with its bias and any outer
            LoRA). Not modified. Under autocast, x is cast to base's dtype first.
        A: [R, in], or [S, R, in] for one set of fast weights for each sequence, where x is
            [S, L, in] and base [S, L, out]. Any floating-point dtype, cast to x's for the products.
        B: [out, R] or [S, out, R], as A.
        scale: finite; lora_alpha / R.
        B_is_zero: a promise that B holds zeros, as fast weights do before their first step. Its
            values are then never read, so a broken promise goes unnoticed. The result
            shares base's memory; x and A get no gradient from it (None, where the op's would be
            zeros). The reference computes the whole expression all the same.
        backend: "cpu", "triton" or "reference"; None takes the first that fits. "triton" takes all
            dtypes but float64 on a GPU from sm_80 on.

    Returns:
        [..., out] in base's dtype. Differentiable in x, base, A and B, each gradient in its own
        dtype; twice with backend="reference" only.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or the backend cannot run.

    Source: E. J. Hu et al., "LoRA", arXiv 2106.09685; per-sample fast weights as in MemDLM, arXiv
    2603.22241v2.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(base.dtype)
    _check(x, base, A, B, scale)
    backend = choose("lora_linear", _ORDER, backend, x.device, x.dtype)
    if backend == "reference":
        with without_autocast(x.device.type):
            return reference.lora_linear(x, base, A, B, scale)
    grad_enabled = torch.is_grad_enabled()
    if B_is_zero:
        needed = grad_enabled and B.requires_grad
        return _ZeroB.apply(base, x, A, B, scale, backend) if needed else base
    out, _ = _forward(
        x,
        base,
        A,
        B,
        scale,
        grad_enabled and x.requires_grad,
        grad_enabled and A.requires_grad,
        grad_enabled and B.requires_grad,
        backend,
    )
    return out


def _check(x: Tensor, base: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    for name, tensor in (("x", x), ("base", base), ("A", A), ("B", B)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if base.dtype != x.dtype:
        raise ValueError(f"base must have x's dtype {x.dtype}, got {base.dtype}")
    if A.dim() not in (2, 3):
        raise ValueError(f"A must be [R, in] or [S, R, in], got {list(A.shape)}")
    if x.dim() == 0 or (A.dim() == 3 and x.dim() != 3):
        wanted = "[..., in]" if A.dim() == 2 else "[S, L, in] where A is [S, R, in]"
        raise ValueError(f"x must be {wanted}, got {list(x.shape)}")
    sets = (x.shape[0],) if A.dim() == 3 else ()
    rank = A.shape[-2]
    if A.shape != (*sets, rank, x.shape[-1]):
        raise ValueError(
            f"A must be {[*sets, 'R', x.shape[-1]]} for x {list(x.shape)}, got {list(A.shape)}"
        )
    if base.dim() != x.dim() or base.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"base must be {[*x.shape[:-1], 'out']}, got {list(base.shape)}")
    if B.shape != (*sets, base.shape[-1], rank):
        raise ValueError(
            f"B must be {[*sets, base.shape[-1], rank]} for base {list(base.shape)} and A "
            f"{list(A.shape)}, got {list(B.shape)}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


_ORDER = (CPU, TRITON, REFERENCE)


def _module(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    from memdlm_kernels.lora_linear import triton

    return triton


@op("lora_linear")
def _forward(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    need_grad_x: bool,
    need_grad_A: bool,
    need_grad_B: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out [..., out], shrink [..., R] = scale * x Aᵀ: empty where grad_B is not needed)."""
    out, shrink = _module(backend).lora_linear(x, base, A, B, scale)
    return out, shrink if need_grad_B else shrink.new_empty(0)


@_forward.register_fake
def _(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    need_grad_x: bool,
    need_grad_A: bool,
    need_grad_B: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shrink = (*x.shape[:-1], A.shape[-2]) if need_grad_B else (0,)
    return base.new_empty(base.shape), x.new_empty(shrink)


@op("lora_linear_backward")
def _backward(
    grad_out: Tensor,
    x: Tensor | None,
    shrink: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    need_grad_x: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_A, grad_B): empty where not needed.

    x is given where grad_A is needed, shrink (scale * x Aᵀ) where grad_B is.
    """
    return _module(backend).lora_linear_backward(grad_out, x, shrink, A, B, scale, need_grad_x)


@_backward.register_fake
def _(
    grad_out: Tensor,
    x: Tensor | None,
    shrink: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    need_grad_x: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = (*grad_out.shape[:-1], A.shape[-1]) if need_grad_x else (0,)
    return (
        grad_out.new_empty(grad_x),
        A.new_empty(A.shape if x is not None else (0,)),
        B.new_empty(B.shape if shrink is not None else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, A, B, ctx.scale, ctx.need_grad_x, ctx.need_grad_A, ctx.need_grad_B, ctx.backend = inputs
    _, shrink = output
    ctx.mark_non_differentiable(shrink)
    # In the outer pass only x needs a gradient: then no activation is kept at all.
    ctx.save_for_backward(x if ctx.need_grad_A else None, shrink if ctx.need_grad_B else None, A, B)


def _autograd(ctx: Any, grad_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, shrink, A, B = ctx.saved_tensors
    grad_x = grad_A = grad_B = None
    if ctx.need_grad_x or ctx.need_grad_A or ctx.need_grad_B:
        grad_x, grad_A, grad_B = _backward(
            grad_out, x, shrink, A, B, ctx.scale, ctx.need_grad_x, ctx.backend
        )
    return (
        grad_x if ctx.need_grad_x else None,
        # d out / d base is the identity: no op, no copy.
        grad_out,
        grad_A if ctx.need_grad_A else None,
        grad_B if ctx.need_grad_B else None,
        *(None,) * 5,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)


@op("lora_linear_grad_B")
def _grad_B(
    grad_out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, backend: str
) -> Tensor:
    """The gradient of B without a forward pass; of B itself no value is read."""
    module = _module(backend)
    shrink = module.shrink_of(x, A, scale)
    return module.lora_linear_backward(grad_out, None, shrink, A, B, scale, False)[2]


@_grad_B.register_fake
def _(grad_out: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, backend: str) -> Tensor:
    return B.new_empty(B.shape)


class _ZeroB(torch.autograd.Function):
    """base itself, with the gradient of a B that holds zeros: an op may not alias its input."""

    @staticmethod
    def forward(
        base: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, backend: str
    ) -> Tensor:
        return base.view_as(base)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, A, B, ctx.scale, ctx.backend = inputs
        ctx.save_for_backward(x, A, B)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B = ctx.saved_tensors
        grad_B = _grad_B(grad_out, x, A, B, ctx.scale, ctx.backend)
        return grad_out, None, None, grad_B, None, None


def _forward_flops(x: Shape, base: Shape, A: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * A[-2] * (x[-1] + base[-1])


def _backward_flops(
    grad_out: Shape,
    x: Shape | None,
    shrink: Shape | None,
    A: Shape,
    B: Shape,
    scale: float,
    need_grad_x: bool,
    *_: Any,
    **__: Any,
) -> int:
    need_grad_A, need_grad_B = x is not None, shrink is not None
    through_B = (need_grad_x or need_grad_A) + need_grad_B  # products as large as shrink Bᵀ
    through_A = need_grad_x + need_grad_A  # and as x Aᵀ
    columns = through_B * grad_out[-1] + through_A * A[-1]
    return 2 * math.prod(grad_out[:-1]) * A[-2] * columns


def _grad_B_flops(grad_out: Shape, x: Shape, A: Shape, *_: Any, **__: Any) -> int:
    return _forward_flops(x, grad_out, A)


FLOP_FORMULAS = {
    torch.ops.memdlm.lora_linear: _forward_flops,
    torch.ops.memdlm.lora_linear_backward: _backward_flops,
    torch.ops.memdlm.lora_linear_grad_B: _grad_B_flops,
}
