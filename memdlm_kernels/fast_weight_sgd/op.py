"""fast_weight_sgd and fast_weight_sgd_: checks, registration, autograd, backend order.

The function is differentiable, the update in place has no autograd.
"""

import math
from typing import Any

import torch
from torch import Tensor

from memdlm_kernels._backends import CPU, CUDA, REFERENCE, choose
from memdlm_kernels._library import op
from memdlm_kernels._segments import check_cast, check_flat, check_segments, check_written
from memdlm_kernels.fast_weight_sgd import compiled, reference


def fast_weight_sgd_(
    param: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str = "tensor",
    loss: Tensor | None = None,
    *,
    cast: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Clip the gradient of every fast weight and take one SGD step, in place.

    Replaces, for each segment p of each row, `g = grad[s, p]`, `param[s, p] -= lr * g * min(1,
    max_norm / g.norm())` and the check that everything is finite: no loop over tensors, no wait for
    the device. A row whose loss, or any of whose gradient norms, is not finite is left untouched
    bit for bit; the other rows go on. No clipped copy of the gradient is allocated. With `cast`
    also `cast[s] = param[s].to(cast.dtype)` of each row that is not left alone, in the same pass.

    Args:
        param: [S, T], floating-point; row s is one set of fast weights. Written in place, outside
            autograd, also where it requires gradients.
        grad: [S, T], floating-point, not necessarily param's dtype. Not modified.
        segments: [P + 1] int64, ascending from 0 to T: fast weight p is columns
            segments[p]:segments[p + 1], and may be empty. Values are checked on the CPU only.
        lr: learning rate, finite.
        max_norm: largest gradient norm, above 0 (inf is allowed). Not read if clip is "none".
        clip: "tensor", each segment by its own norm; "global", each row by its whole norm; "none".
        loss: [S] floating-point or None; the loss that each row's gradient comes from.
        cast: [S, T], floating-point of another dtype than param, or None; the copy that the matmuls
            use. A row that is left alone is left alone here too: so start with the two in step,
            as fast_weight_reset_ leaves them.
        backend: "cpu", "cuda" or "reference"; None takes the first that fits.

    Returns:
        norm: [S, P] float32 (float64 if grad is), each segment's gradient norm before clipping,
            skipped rows' too. Squares are summed in float64, so none overflows or underflows.
        skipped: [S] bool, True where the row was left alone.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or the backend cannot
            run.

    Source: the inner step of MemDLM, arXiv 2603.22241v2.
    """
    check_written("param", param)
    _check(param, grad, segments, lr, max_norm, clip, loss)
    if cast is not None:
        check_cast(cast, param)
    backend = choose("fast_weight_sgd_", _ORDER, backend, param.device)
    with torch.no_grad():
        if backend == "reference":
            updated, norm, skipped = reference.fast_weight_sgd(
                param, grad, segments, lr, max_norm, clip, loss
            )
            param.copy_(updated)
            if cast is not None:
                cast.copy_(torch.where(skipped[:, None], cast, param.to(cast.dtype)))
            return norm, skipped
        return _step(param, grad, segments, lr, max_norm, clip, loss, cast, backend)


def fast_weight_sgd(
    param: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str = "tensor",
    loss: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """fast_weight_sgd_ as a function, which an exact meta-gradient differentiates through.

    Replaces, for each segment p of each row, `g = grad[s, p]`, `param[s, p] - lr * g * min(1,
    max_norm / g.norm())`, its backward pass, and the check that everything is finite. Each row of
    `updated` is what fast_weight_sgd_ on the same backend writes, bit for bit. Backward allocates
    grad's gradient alone: param's is updated's own.

    Args:
        param: [S, T], floating-point; row s is one set of fast weights. Not modified.
        grad: [S, T], floating-point, not necessarily param's dtype. Not modified.
        segments, lr, max_norm, clip, loss: as for fast_weight_sgd_.
        backend: "cpu", "cuda" or "reference"; None takes the first that fits.

    Returns:
        updated: [S, T] in param's dtype. Differentiable in param and grad, each gradient in its own
            dtype; twice with backend="reference" only. A gradient as long as max_norm counts as
            not clipped. A row that was left alone is constant in grad: zeros, whatever grad holds.
        norm: [S, P], as fast_weight_sgd_ returns it. Not differentiable.
        skipped: [S] bool, as fast_weight_sgd_ returns it.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or the backend cannot
            run.

    Source: the inner step of MemDLM, arXiv 2603.22241v2; differentiated as in MAML, arXiv
    1703.03400.
    """
    check_flat("param", param)
    _check(param, grad, segments, lr, max_norm, clip, loss)
    backend = choose("fast_weight_sgd", _ORDER, backend, param.device)
    if backend == "reference":
        return reference.fast_weight_sgd(param, grad, segments, lr, max_norm, clip, loss)
    return _forward(param, grad, segments, lr, max_norm, clip, loss, backend)


def _check(
    param: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str,
    loss: Tensor | None,
) -> None:
    if grad.shape != param.shape or not grad.is_floating_point():
        raise ValueError(
            f"grad must be floating-point of param's shape {list(param.shape)}, "
            f"got {grad.dtype} {list(grad.shape)}"
        )
    if grad.device != param.device:
        raise ValueError(f"grad must be on param's device {param.device}, got {grad.device}")
    check_segments(segments, param)
    if not math.isfinite(lr):
        raise ValueError(f"lr must be finite, got {lr}")
    if clip not in ("tensor", "global", "none"):
        raise ValueError(f"clip must be 'tensor', 'global' or 'none', got {clip!r}")
    if clip != "none" and not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    if loss is None:
        return
    if loss.shape != param.shape[:1] or not loss.is_floating_point():
        raise ValueError(
            f"loss must be floating-point [S] = [{param.shape[0]}], "
            f"got {loss.dtype} {list(loss.shape)}"
        )
    if loss.device != param.device:
        raise ValueError(f"loss must be on param's device {param.device}, got {loss.device}")


_ORDER = (CPU, CUDA, REFERENCE)


# `backend` has been chosen by the device, as the compiled ops will.
@op("fast_weight_sgd_", mutates=("param", "cast"))
def _step(
    param: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str,
    loss: Tensor | None,
    cast: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return compiled.fast_weight_sgd_(param, grad, segments, lr, max_norm, clip, loss, cast)


@_step.register_fake
def _(
    param: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str,
    loss: Tensor | None,
    cast: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows, norm_dtype = param.shape[0], torch.float32
    if grad.dtype == torch.float64:
        norm_dtype = torch.float64
    return (
        param.new_empty(rows, segments.shape[0] - 1, dtype=norm_dtype),
        param.new_empty(rows, dtype=torch.bool),
    )


@op("fast_weight_sgd")
def _forward(
    param: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str,
    loss: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    updated = param.clone(memory_format=torch.contiguous_format)
    step = compiled.fast_weight_sgd_(updated, grad, segments, lr, max_norm, clip, loss, None)
    return updated, *step


@_forward.register_fake
def _(
    param: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str,
    loss: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, norm_dtype = param.shape[0], torch.float32
    if grad.dtype == torch.float64:
        norm_dtype = torch.float64
    return (
        param.new_empty(param.shape),
        param.new_empty(rows, segments.shape[0] - 1, dtype=norm_dtype),
        param.new_empty(rows, dtype=torch.bool),
    )


@op("fast_weight_sgd_backward")
def _backward(
    grad_updated: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str,
    skipped: Tensor,
    backend: str,
) -> Tensor:
    """grad_grad [S, T]. The norms are summed again, beside what is summed anyway: in float32 they
    would leave 1e-7 of the part along grad, which clipping takes away."""
    return compiled.fast_weight_sgd_backward(
        grad_updated, grad, segments, lr, max_norm, clip, skipped
    )


@_backward.register_fake
def _(
    grad_updated: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str,
    skipped: Tensor,
    backend: str,
) -> Tensor:
    return grad.new_empty(grad.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, grad, segments, ctx.lr, ctx.max_norm, ctx.clip, _, ctx.backend = inputs
    _, norm, skipped = output
    ctx.mark_non_differentiable(norm, skipped)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad if ctx.needs_input_grad[1] else None, segments, skipped)


def _autograd(
    ctx: Any, grad_updated: Tensor | None, _norm: None, _skipped: None
) -> tuple[Tensor | None, ...]:
    grad, segments, skipped = ctx.saved_tensors
    grad_grad = None
    if grad_updated is not None and grad is not None:
        grad_grad = _backward(
            grad_updated, grad, segments, ctx.lr, ctx.max_norm, ctx.clip, skipped, ctx.backend
        )
    # d updated / d param is the identity: no op, no copy.
    return grad_updated, grad_grad, *(None,) * 6


_forward.register_autograd(_autograd, setup_context=_setup_context)
