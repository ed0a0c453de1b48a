"""grouped_linear: public function, checks, registration, autograd, FLOP count, backend order."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memdlm_kernels._backends import REFERENCE, TRITON, choose, without_autocast
from memdlm_kernels._library import op
from memdlm_kernels._offsets import check_offsets
from memdlm_kernels.grouped_linear import grouped_mm, reference

Shape = Sequence[int]


def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, *, backend: str | None = None
) -> Tensor:
    """The linear layers of stacked experts, each on its own rows.

    Replaces, for each group of rows x[begin:end] of one expert e, `x[begin:end] @ weight[e].mT`.
    Nothing is allocated but the result and, in backward, the gradients that are needed.

    Args:
        x: [N, in], float32, bfloat16, float16 or float64, its rows sorted by expert; any strides.
        weight: [E, out, in], x's dtype; any strides, so that a transposed stack needs no copy.
            Under autocast, x and weight are cast to its dtype first.
        offsets: int32 [E], as torch.nn.functional.grouped_mm takes it: the row at which each
            group ends, ascending, the last one N. A group may be empty. Looked at where that is
            free: on the CPU, and not while compiling.
        backend: "grouped_mm", "triton" or "reference"; None takes the first that fits.
            "grouped_mm" is the library's: where in and out are multiples of 16 bytes, on the CPU
            in all dtypes but float64, on a GPU in bfloat16 on sm_90 and sm_100 with up to 1,023
            groups. "triton" takes all dtypes but float64 on a GPU from sm_80 on; its float32 is
            as exact as `torch.backends.cuda.matmul` asks for. Neither waits for the GPU.
            "reference" reads offsets on the host, so a compiled graph breaks.

    Returns:
        [N, out] in x's dtype. Differentiable in x and weight (zeros for an empty group), any
        number of times.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values, or the backend cannot
            run.

    Source: T. Gale et al., "MegaBlocks", arXiv 2211.15841, for experts as one grouped product.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    _check(x, weight, offsets)
    groups, out, columns = weight.shape
    backend = choose("grouped_linear", _ORDER, backend, x.device, x.dtype, columns, out, groups)
    if backend == "reference":
        with without_autocast(device):
            return reference.grouped_linear(x, weight, offsets)
    return _forward(x, weight, offsets, backend)


def _check(x: Tensor, weight: Tensor, offsets: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point, got {x.dtype}")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must have x's dtype {x.dtype}, got {weight.dtype}")
    for name, tensor in (("weight", weight), ("offsets", offsets)):
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if x.dim() != 2:
        raise ValueError(f"x must be [N, in], got {list(x.shape)}")
    if weight.dim() != 3 or weight.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"weight must be ['E', 'out', {x.shape[-1]}] for x {list(x.shape)}, got "
            f"{list(weight.shape)}"
        )
    check_offsets(offsets, weight.shape[:1], x.shape[0], "weight")


_ORDER = (grouped_mm.GROUPED_MM, TRITON, REFERENCE)


def _module(backend: str) -> Any:
    if backend == "grouped_mm":
        return grouped_mm
    from memdlm_kernels.grouped_linear import triton

    return triton


@op("grouped_linear")
def _forward(x: Tensor, weight: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return _module(backend).grouped_linear(x, weight, offsets)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@op("grouped_linear_outer")
def _outer(a: Tensor, b: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """a[begin:end].mT @ b[begin:end] for each group: [E, m, n] of a [N, m] and b [N, n]."""
    return _module(backend).grouped_linear_outer(a, b, offsets)


@_outer.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return a.new_empty(offsets.shape[0], a.shape[1], b.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    first, second, offsets, ctx.backend = inputs
    need_first, need_second, *_ = ctx.needs_input_grad
    # Each is kept for the other's gradient alone: no row where the weights are frozen.
    ctx.save_for_backward(first if need_second else None, second if need_first else None, offsets)


# The gradients of each of the two ops are products by the two again.
def _forward_autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    grad_x = grad_weight = None
    if weight is not None:
        grad_x = _forward(grad_out, weight.mT, offsets, ctx.backend)
    if x is not None:
        grad_weight = _outer(grad_out, x, offsets, ctx.backend)
    return grad_x, grad_weight, None, None


def _outer_autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    a, b, offsets = ctx.saved_tensors
    grad_a = grad_b = None
    if b is not None:
        grad_a = _forward(b, grad_out, offsets, ctx.backend)
    if a is not None:
        grad_b = _forward(a, grad_out.mT, offsets, ctx.backend)
    return grad_a, grad_b, None, None


_forward.register_autograd(_forward_autograd, setup_context=_setup_context)
_outer.register_autograd(_outer_autograd, setup_context=_setup_context)


def _forward_flops(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * weight[1] * weight[2]


def _outer_flops(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.memdlm.grouped_linear: _forward_flops,
    torch.ops.memdlm.grouped_linear_outer: _outer_flops,
}
