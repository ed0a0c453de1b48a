"""grouped_lora_linear: public function, checks, registration, autograd, FLOP count, order."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memdlm_kernels._backends import CPU, REFERENCE, TRITON, Backend, choose, without_autocast
from memdlm_kernels._library import op
from memdlm_kernels._offsets import check_offsets
from memdlm_kernels.grouped_lora_linear import cpu, grouped_mm, reference

Shape = Sequence[int]


def grouped_lora_linear(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float,
    *,
    B_is_zero: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Add the experts' low-rank updates of fast weights to the output of their frozen layer.

    Replaces, for each group of rows x[begin:end] of one expert e,
    `base[begin:end] + scale * (x[begin:end] @ A[e].mT) @ B[e].mT`. By "cpu" and "triton", neither
    the update [N, out] nor its scaled copy is allocated, in forward or backward; "grouped_mm"
    allocates the update of one projection at a time, [N, out / P], and no scaled copy. With
    `B_is_zero` nothing is computed or allocated in forward, and in backward only grad_B. P
    projections of the same input (a gate and an up projection) may be stacked: then the shrink
    `x @ A.mT` is one product for them all, and block p of the columns of out is the product of its
    own R columns with the rows of B[e] in block p.

    Args:
        x: [N, in], float32, bfloat16, float64 or float16; the frozen layer's input, its rows
            sorted by expert (and then by sequence, if each has its own fast weights).
        base: [N, out], x's dtype; the frozen layer's own output (with its bias and any outer
            LoRA). Not modified. Under autocast, x is cast to base's dtype first.
        A: [E, P * R, in], or [S, E, P * R, in] for one set of fast weights for each sequence. Any
            floating-point dtype, cast to x's for the products; any strides.
        B: [E, out, R] or [S, E, out, R], as A.
        offsets: int32 [E], as torch.nn.functional.grouped_mm takes it, or [E, S] for one set of
            fast weights for each sequence: the row at which each group ends, ascending, the last
            one N. A group may be empty. Looked at where that is free: on the CPU, and not while
            compiling.
        scale: finite; lora_alpha / R.
        B_is_zero: a promise that B holds zeros, as fast weights do before their first step. Its
            values are then never read, so a broken promise goes unnoticed. The result
            shares base's memory; x and A get no gradient from it (None, where the op's would be
            zeros). The reference computes the whole expression all the same.
        backend: "cpu", "triton", "grouped_mm" or "reference"; None takes the first that fits. "cpu"
            takes CPU tensors. "triton" takes all dtypes but float64 on a GPU from sm_80 on, up to
            4,096 groups (E, or E * S), and never waits for it. "grouped_mm" takes float32, bfloat16
            and float16 on the CPU and on CUDA, if the rows of in, out / P and R elements are
            multiples of 16 bytes, and up to 1,023 groups. It never waits for the GPU in bfloat16 on
            sm90 and sm100; elsewhere torch's own grouped_mm reads offsets on the host. "reference"
            reads them there too, so a compiled graph breaks.

    Returns:
        [N, out] in base's dtype. Differentiable in x, base, A and B, each gradient in its own
        dtype (zeros for the fast weights of an empty group); twice with backend="reference" only.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values, or the backend cannot
            run.

    Source: E. J. Hu et al., "LoRA", arXiv 2106.09685; fast weights of experts as in MemDLM, arXiv
    2603.22241v2.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(base.dtype)
    _check(x, base, A, B, offsets, scale)
    projections = A.shape[-2] // B.shape[-1]
    sizes = (x.shape[1], base.shape[1], B.shape[-1], projections, offsets.numel())
    backend = choose("grouped_lora_linear", _ORDER, backend, x.device, x.dtype, *sizes)
    if backend == "reference":
        with without_autocast(x.device.type):
            return reference.grouped_lora_linear(x, base, A, B, offsets, scale)
    grad_enabled = torch.is_grad_enabled()
    if B_is_zero:
        needed = grad_enabled and B.requires_grad
        return _ZeroB.apply(base, x, A, B, offsets, scale, backend) if needed else base
    out, _ = _forward(
        x,
        base,
        A,
        B,
        offsets,
        scale,
        grad_enabled and x.requires_grad,
        grad_enabled and A.requires_grad,
        grad_enabled and B.requires_grad,
        backend,
    )
    return out


def _check(x: Tensor, base: Tensor, A: Tensor, B: Tensor, offsets: Tensor, scale: float) -> None:
    for name, tensor in (("x", x), ("base", base), ("A", A), ("B", B)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
    for name, tensor in (("base", base), ("A", A), ("B", B), ("offsets", offsets)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if base.dtype != x.dtype:
        raise ValueError(f"base must have x's dtype {x.dtype}, got {base.dtype}")
    if x.dim() != 2:
        raise ValueError(f"x must be [N, in], got {list(x.shape)}")
    if base.dim() != 2 or base.shape[0] != x.shape[0]:
        raise ValueError(f"base must be [{x.shape[0]}, 'out'], got {list(base.shape)}")
    if A.dim() not in (3, 4):
        raise ValueError(f"A must be [E, P * R, in] or [S, E, P * R, in], got {list(A.shape)}")
    *groups, ranks, columns = A.shape
    if columns != x.shape[1]:
        raise ValueError(
            f"A must be {[*groups, 'P * R', x.shape[1]]} for x {list(x.shape)}, got {list(A.shape)}"
        )
    out = base.shape[1]
    if B.dim() != A.dim() or B.shape[:-1] != (*groups, out):
        raise ValueError(
            f"B must be {[*groups, out, 'R']} for base {list(base.shape)} and A {list(A.shape)}, "
            f"got {list(B.shape)}"
        )
    rank = B.shape[-1]
    if rank == 0 or ranks == 0 or ranks % rank or out % (ranks // rank):
        raise ValueError(
            f"A must have P * R = P * {rank} rows for B {list(B.shape)}, with a P of at least 1 "
            f"that divides out = {out}, got {list(A.shape)}"
        )
    check_offsets(offsets, groups[::-1], x.shape[0], "A")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


_MOST_TRITON_GROUPS = 4096  # each program looks at the ends of all of them


def _triton_unfit(device: torch.device, dtype: torch.dtype, *sizes: int) -> str | None:
    *_, groups = sizes
    if groups > _MOST_TRITON_GROUPS:
        return f"there must be at most {_MOST_TRITON_GROUPS} groups, got {groups}"
    return TRITON.unfit(device, dtype)


_ORDER = (CPU, Backend(TRITON.name, _triton_unfit), grouped_mm.GROUPED_MM, REFERENCE)


def _module(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    if backend == "grouped_mm":
        return grouped_mm
    from memdlm_kernels.grouped_lora_linear import triton

    return triton


@op("grouped_lora_linear")
def _forward(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float,
    need_grad_x: bool,
    need_grad_A: bool,
    need_grad_B: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(out [N, out], shrink [N, P * R] = scale * x Aᵀ: empty where grad_B is not needed)."""
    out, shrink = _module(backend).grouped_lora_linear(x, base, A, B, offsets, scale)
    return out, shrink if need_grad_B else shrink.new_empty(0)


@_forward.register_fake
def _(
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float,
    need_grad_x: bool,
    need_grad_A: bool,
    need_grad_B: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shrink = (x.shape[0], A.shape[-2]) if need_grad_B else (0,)
    return base.new_empty(base.shape), x.new_empty(shrink)


@op("grouped_lora_linear_backward")
def _backward(
    grad_out: Tensor,
    x: Tensor | None,
    shrink: Tensor | None,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float,
    need_grad_x: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_A, grad_B): empty where not needed.

    x is given where grad_A is needed, shrink (scale * x Aᵀ) where grad_B is.
    """
    return _module(backend).grouped_lora_linear_backward(
        grad_out, x, shrink, A, B, offsets, scale, need_grad_x
    )


@_backward.register_fake
def _(
    grad_out: Tensor,
    x: Tensor | None,
    shrink: Tensor | None,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float,
    need_grad_x: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = (grad_out.shape[0], A.shape[-1]) if need_grad_x else (0,)
    return (
        grad_out.new_empty(grad_x),
        A.new_empty(A.shape if x is not None else (0,)),
        B.new_empty(B.shape if shrink is not None else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, A, B, offsets, ctx.scale, *needs, ctx.backend = inputs
    ctx.need_grad_x, ctx.need_grad_A, ctx.need_grad_B = needs
    _, shrink = output
    ctx.mark_non_differentiable(shrink)
    # In the outer pass only x needs a gradient: then no activation is kept at all.
    ctx.save_for_backward(
        x if ctx.need_grad_A else None, shrink if ctx.need_grad_B else None, A, B, offsets
    )


def _autograd(ctx: Any, grad_out: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, shrink, A, B, offsets = ctx.saved_tensors
    grad_x = grad_A = grad_B = None
    if ctx.need_grad_x or ctx.need_grad_A or ctx.need_grad_B:
        grad_x, grad_A, grad_B = _backward(
            grad_out, x, shrink, A, B, offsets, ctx.scale, ctx.need_grad_x, ctx.backend
        )
    return (
        grad_x if ctx.need_grad_x else None,
        # d out / d base is the identity: no op, no copy.
        grad_out,
        grad_A if ctx.need_grad_A else None,
        grad_B if ctx.need_grad_B else None,
        *(None,) * 6,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)


@op("grouped_lora_linear_grad_B")
def _grad_B(
    grad_out: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    """The gradient of B without a forward pass; of B itself no value is read."""
    module = _module(backend)
    shrink = module.shrink_of(x, A, B, offsets, scale)
    grads = module.grouped_lora_linear_backward(grad_out, None, shrink, A, B, offsets, scale, False)
    return grads[2]


@_grad_B.register_fake
def _(
    grad_out: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float,
    backend: str,
) -> Tensor:
    return B.new_empty(B.shape)


class _ZeroB(torch.autograd.Function):
    """base itself, with the gradient of a B that holds zeros: an op may not alias its input."""

    @staticmethod
    def forward(
        base: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        offsets: Tensor,
        scale: float,
        backend: str,
    ) -> Tensor:
        return base.view_as(base)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, A, B, offsets, ctx.scale, ctx.backend = inputs
        ctx.save_for_backward(x, A, B, offsets)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_B = _grad_B(grad_out, *ctx.saved_tensors, ctx.scale, ctx.backend)
        return grad_out, None, None, grad_B, None, None, None


def _forward_flops(x: Shape, base: Shape, A: Shape, B: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * (A[-2] * x[1] + B[-1] * base[1])


def _backward_flops(
    grad_out: Shape,
    x: Shape | None,
    shrink: Shape | None,
    A: Shape,
    B: Shape,
    offsets: Shape,
    scale: float,
    need_grad_x: bool,
    *_: Any,
    **__: Any,
) -> int:
    need_grad_A, need_grad_B = x is not None, shrink is not None
    through_B = (need_grad_x or need_grad_A) + need_grad_B  # products as large as shrink Bᵀ
    through_A = need_grad_x + need_grad_A  # and as x Aᵀ
    return 2 * grad_out[0] * (through_B * B[-1] * grad_out[1] + through_A * A[-2] * A[-1])


def _grad_B_flops(grad_out: Shape, x: Shape, A: Shape, B: Shape, *_: Any, **__: Any) -> int:
    return _forward_flops(x, grad_out, A, B)


FLOP_FORMULAS = {
    torch.ops.memdlm.grouped_lora_linear: _forward_flops,
    torch.ops.memdlm.grouped_lora_linear_backward: _backward_flops,
    torch.ops.memdlm.grouped_lora_linear_grad_B: _grad_B_flops,
}
