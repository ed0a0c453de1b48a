"""combine_rows and spread_rows: checks, registration, autograd, FLOP counts, backend order.

Each is the other's gradient, but for the weights of the sum.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memdlm_kernels._backends import REFERENCE, TRITON, Backend, choose, without_autocast
from memdlm_kernels._library import op
from memdlm_kernels.combine_rows import cpu, reference

Shape = Sequence[int]


def combine_rows(
    rows: Tensor,
    index: Tensor,
    weight: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The outputs of each row's k experts, from where the experts left them, weighted and summed.

    Replaces `(weight[..., None] * rows[index]).sum(1)`. Nothing is allocated but the result and, in
    backward, the gradients that are needed; `rows` and `weight` are kept for each other's gradient
    alone. "cpu" also gathers [N, k, D], in forward and again in backward.

    Args:
        rows: [P, D], float32, bfloat16, float16 or float64; any strides.
        index: [N, k] int64, k at least 1, rows that are summed. Each row is named at most once (of
            N * k experts' outputs each is), so that a gradient is written where it belongs, and
            nothing is added up. Rows that are not named are not read, and have a gradient of zeros.
            Looked at where that is free: on the CPU, and not while compiling.
        weight: [N, k], any floating-point dtype; any strides. None: ones.
        dtype: floating-point, of the result; None takes weight's, or rows' without weights. The sum
            is taken in weight's dtype (rows' without) and then cast; "triton" sums in float32 and
            rounds once.
        backend: "cpu", "triton" or "reference"; None takes the first that fits. "triton" takes all
            dtypes but float64 on a GPU from sm_80 on. It is one launch forward, and one backward,
            where rows that are not named take one more.

    Returns:
        [N, D] in dtype. Differentiable in rows and weight, each gradient in its own dtype; twice
        with backend="reference", or without weights.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values, or the backend cannot
            run.

    Source: N. Shazeer et al., "Outrageously Large Neural Networks", arXiv 1701.06538, equation 1.
    """
    _check(rows, index)
    _check_weight(rows, index, weight)
    if dtype is None:
        dtype = rows.dtype if weight is None else weight.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating-point, got {dtype}")
    _check_values(index, len(rows))
    widest = torch.promote_types(rows.dtype, dtype)
    if weight is not None:
        widest = torch.promote_types(widest, weight.dtype)
    backend = choose("combine_rows", _ORDER, backend, rows.device, widest)
    if backend == "reference":
        with without_autocast(rows.device.type):
            return reference.combine_rows(rows, index, weight, dtype)
    return _combine(rows, index, weight, dtype, backend)


def spread_rows(rows: Tensor, index: Tensor, *, backend: str | None = None) -> Tensor:
    """Each row k times, to where its k experts expect it.

    Replaces `out[index[n, j]] = rows[n]` for all n and j, and in backward the sum over j. Nothing
    is allocated but the result and the gradient.

    Args:
        rows: [N, D], float32, bfloat16, float16 or float64; any strides.
        index: [N, k] int64, k at least 1, a permutation of the N * k places. Looked at where that
            is free: on the CPU, and not while compiling.
        backend: as for combine_rows.

    Returns:
        [N * k, D] in rows' dtype. Differentiable in rows, any number of times.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values, or the backend cannot
            run.

    Source: as of combine_rows.
    """
    _check(rows, index)
    if len(index) != len(rows):
        raise ValueError(
            f"index must be [{len(rows)}, k] for rows {list(rows.shape)}, got {list(index.shape)}"
        )
    _check_values(index, index.numel())
    backend = choose("spread_rows", _ORDER, backend, rows.device, rows.dtype)
    if backend == "reference":
        return reference.spread_rows(rows, index)
    return _spread(rows, index, index.numel(), backend)


def _check(rows: Tensor, index: Tensor) -> None:
    if not rows.is_floating_point():
        raise ValueError(f"rows must be floating-point, got {rows.dtype}")
    if rows.dim() != 2:
        raise ValueError(f"rows must be two-dimensional, got {list(rows.shape)}")
    if index.device != rows.device:
        raise ValueError(f"index must be on rows' device {rows.device}, got {index.device}")
    if index.dtype != torch.int64 or index.dim() != 2 or index.shape[1] == 0:
        raise ValueError(
            f"index must be int64 [N, k], k at least 1, got {index.dtype} {list(index.shape)}"
        )


def _check_weight(rows: Tensor, index: Tensor, weight: Tensor | None) -> None:
    if weight is None:
        return
    if weight.device != rows.device:
        raise ValueError(f"weight must be on rows' device {rows.device}, got {weight.device}")
    if not weight.is_floating_point() or weight.shape != index.shape:
        raise ValueError(
            f"weight must be floating-point {list(index.shape)} as index is, got {weight.dtype} "
            f"{list(weight.shape)}"
        )


def _check_values(index: Tensor, count: int) -> None:
    if index.device.type != "cpu" or torch.compiler.is_compiling() or index.numel() == 0:
        return
    lowest, highest = (end.item() for end in index.aminmax())
    if lowest < 0 or highest >= count:
        raise ValueError(f"index must be in 0 to {count - 1}, got {lowest} to {highest}")
    times = index.flatten().bincount()
    if times.max() > 1:
        raise ValueError(f"index must name no row twice, got {times.argmax().item()} twice")


def _cpu_unfit(device: torch.device, *_: Any) -> str | None:
    return None if device.type == "cpu" else f"the tensors are on {device.type}"


# Not the compiled ops' "cpu": these are PyTorch's own operators.
_ORDER = (Backend("cpu", _cpu_unfit), TRITON, REFERENCE)


def _module(backend: str) -> Any:
    if backend == "cpu":
        return cpu
    from memdlm_kernels.combine_rows import triton

    return triton


@op("combine_rows")
def _combine(
    rows: Tensor, index: Tensor, weight: Tensor | None, dtype: torch.dtype, backend: str
) -> Tensor:
    return _module(backend).combine_rows(rows, index, weight, dtype)


@_combine.register_fake
def _(
    rows: Tensor, index: Tensor, weight: Tensor | None, dtype: torch.dtype, backend: str
) -> Tensor:
    return rows.new_empty(index.shape[0], rows.shape[1], dtype=dtype)


@op("combine_rows_backward")
def _combine_backward(
    grad_out: Tensor,
    rows: Tensor | None,
    index: Tensor,
    weight: Tensor,
    count: int,
    dtype: torch.dtype,
    need_grad_rows: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(grad_rows [P, D] in dtype, grad_weight [N, k]): empty where not needed.

    P is `count`. rows is given where grad_weight is needed.
    """
    return _module(backend).combine_rows_backward(
        grad_out, rows, index, weight, count, dtype, need_grad_rows
    )


@_combine_backward.register_fake
def _(
    grad_out: Tensor,
    rows: Tensor | None,
    index: Tensor,
    weight: Tensor,
    count: int,
    dtype: torch.dtype,
    need_grad_rows: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return (
        grad_out.new_empty((count, grad_out.shape[1]) if need_grad_rows else 0, dtype=dtype),
        weight.new_empty(0 if rows is None else weight.shape),
    )


@op("spread_rows")
def _spread(rows: Tensor, index: Tensor, count: int, backend: str) -> Tensor:
    """[count, D]: zeros where the index names no place."""
    return _module(backend).spread_rows(rows, index, count)


@_spread.register_fake
def _(rows: Tensor, index: Tensor, count: int, backend: str) -> Tensor:
    return rows.new_empty(count, rows.shape[1])


def _setup_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, index, weight, _, ctx.backend = inputs
    ctx.count, ctx.dtype = rows.shape[0], rows.dtype
    _, _, need_grad_weight, *_ = ctx.needs_input_grad
    # Where routers' weights are constants, as of a first layer that is adapted, no row is kept.
    ctx.save_for_backward(rows if need_grad_weight else None, index, weight)


def _combine_autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    rows, index, weight = ctx.saved_tensors
    if weight is None:
        grad_rows = _spread(grad_out.to(ctx.dtype), index, ctx.count, ctx.backend)
        return grad_rows, None, None, None, None
    need_grad_rows, *_ = ctx.needs_input_grad
    grad_rows, grad_weight = _combine_backward(
        grad_out, rows, index, weight, ctx.count, ctx.dtype, need_grad_rows, ctx.backend
    )
    return (
        grad_rows if need_grad_rows else None,
        None,
        None if rows is None else grad_weight,
        None,
        None,
    )


def _setup_spread(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, _, ctx.backend = inputs
    ctx.save_for_backward(index)


def _spread_autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    grad_rows = _combine(grad_out, index, None, grad_out.dtype, ctx.backend)
    return grad_rows, None, None, None


_combine.register_autograd(_combine_autograd, setup_context=_setup_combine)
_spread.register_autograd(_spread_autograd, setup_context=_setup_spread)


def _combine_flops(rows: Shape, index: Shape, weight: Shape | None, *_: Any, **__: Any) -> int:
    return 0 if weight is None else 2 * index[0] * index[1] * rows[1]


def _combine_backward_flops(
    grad_out: Shape, rows: Shape | None, index: Shape, *_: Any, **__: Any
) -> int:
    return 0 if rows is None else 2 * index[0] * index[1] * grad_out[1]


FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.memdlm.combine_rows: _combine_flops,
    torch.ops.memdlm.combine_rows_backward: _combine_backward_flops,
}
