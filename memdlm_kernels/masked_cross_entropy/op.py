"""masked_cross_entropy: public function, checks, registration, autograd, backend order."""

import math
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from memdlm_kernels._backends import CPU, REFERENCE, TRITON, choose, without_autocast
from memdlm_kernels._library import op
from memdlm_kernels._reduction import check_reduction, check_targets, is_eager_cpu, reduce_nll
from memdlm_kernels.masked_cross_entropy import cpu, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "none",
    normalizer: float | Tensor | None = None,
    return_lse: Literal[False] = False,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "none",
    normalizer: float | Tensor | None = None,
    return_lse: Literal[True],
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "none",
    normalizer: float | Tensor | None = None,
    return_lse: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of logits at the masked rows; the other rows are not read.

    Replaces `F.cross_entropy(logits.float().flatten(0, -2), target.flatten(), reduction="none")`.
    Neither a float32 copy of the logits nor their log-softmax is allocated: the backward pass makes
    the gradient from the logits themselves, which must not be changed before it. With `inplace` the
    gradient is not allocated either.

    Args:
        logits: [..., V]; float32, bfloat16, float16 or float64.
        target: [...] int64, in [0, V) or `ignore_index`. Loss and gradient of ignored rows are 0.
        token_weight: [...], any floating-point dtype; multiplies the row's loss.
        ignore_index: the target of rows to leave out.
        softcap: positive; logits become `softcap * tanh(logits / softcap)`.
        reduction: "none", "sum" or "mean".
        normalizer: positive; what "mean" divides by, in place of the number of rows that are not
            ignored (at least 1).
        return_lse: also return the rows' log-sum-exp.
        inplace: forward overwrites the logits, which must be contiguous, with their gradient, if
            one is needed. Only where nothing reads them again; backward runs once. Where the op
            before has saved them for its own backward, PyTorch raises there. No effect under
            torch.compile, which plans memory itself.
        backend: "cpu", "triton" (not float64) or "reference"; None takes the first that fits.

    Returns:
        The loss: [...], or a scalar where it is reduced; float64 for float64 logits, else float32;
        never negative before `token_weight`. Differentiable in logits and token_weight; twice with
        backend="reference" only. With `return_lse` also lse [...], detached, 0 where ignored.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or the backend cannot
            run. A target out of range is found on the CPU only.
        RuntimeError: a second backward with `inplace`.

    Source: P.-L. Hsu et al., "Liger Kernel", arXiv 2410.10989.
    """
    _check(logits, target, softcap, inplace)
    check_reduction(target, token_weight, reduction, normalizer)
    backend = choose("masked_cross_entropy", _ORDER, backend, logits.device, logits.dtype)
    if backend != "cpu" and is_eager_cpu(target):  # which looks at them itself
        check_targets(target, ignore_index, logits.shape[-1])
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    with without_autocast(logits.device.type):
        if inplace and needs_grad and not torch.compiler.is_compiling():
            nll, lse = _Overwrite.apply(logits, target, ignore_index, softcap, backend)
        elif backend == "reference":
            nll, lse = reference.masked_cross_entropy(logits, target, ignore_index, softcap)
        else:
            nll, lse = _forward(logits, target, ignore_index, softcap, backend)
        loss = reduce_nll(nll, target, token_weight, ignore_index, reduction, normalizer)
    return (loss, lse) if return_lse else loss


def _check(logits: Tensor, target: Tensor, softcap: float | None, inplace: bool) -> None:
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V], with V at least 1, got {list(logits.shape)}")
    if logits.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        raise ValueError(f"logits must be one of {names}, got {logits.dtype}")
    if target.dtype != torch.int64:
        raise ValueError(f"target must be torch.int64, got {target.dtype}")
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must be {list(logits.shape[:-1])} for logits {list(logits.shape)}, "
            f"got {list(target.shape)}"
        )
    if target.device != logits.device:
        raise ValueError(f"target must be on logits' device {logits.device}, got {target.device}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or positive and finite, got {softcap}")
    if inplace and not logits.is_contiguous():
        raise ValueError(
            f"logits must be contiguous with inplace=True, got strides {list(logits.stride())}"
        )
    if inplace and logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits must not be a leaf that requires grad with inplace=True")


_ORDER = (CPU, TRITON, REFERENCE)


def _implementation(backend: str) -> ModuleType:
    if backend != "triton":
        return cpu if backend == "cpu" else reference
    # Only here: Triton need not be installed.
    from memdlm_kernels.masked_cross_entropy import triton

    return triton


@op("masked_cross_entropy")
def _forward(
    logits: Tensor, target: Tensor, ignore_index: int, softcap: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    """(nll [...], lse [...])."""
    return _implementation(backend).masked_cross_entropy(logits, target, ignore_index, softcap)


def _fake(
    logits: Tensor, target: Tensor, ignore_index: int, softcap: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(target.shape, dtype=dtype),
        logits.new_empty(target.shape, dtype=dtype),
    )


_forward.register_fake(_fake)


@op("masked_cross_entropy_backward")
def _backward(
    grad_nll: Tensor,
    logits: Tensor,
    target: Tensor,
    nll: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    backend: str,
) -> Tensor:
    """grad_logits [..., V]."""
    return _implementation(backend).masked_cross_entropy_backward(
        grad_nll, logits, target, nll, lse, ignore_index, softcap
    )


@_backward.register_fake
def _(
    grad_nll: Tensor,
    logits: Tensor,
    target: Tensor,
    nll: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, target, ctx.ignore_index, ctx.softcap, ctx.backend = inputs
    nll, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, nll, lse)


def _autograd(ctx: Any, grad_nll: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grad_logits = None
    if grad_nll is not None:
        grad_logits = _backward(
            grad_nll, *ctx.saved_tensors, ctx.ignore_index, ctx.softcap, ctx.backend
        )
    return grad_logits, *(None,) * 4


_forward.register_autograd(_autograd, setup_context=_setup_context)


@op("masked_cross_entropy_", mutates=("logits",))
def _forward_(
    logits: Tensor, target: Tensor, ignore_index: int, softcap: float | None, backend: str
) -> tuple[Tensor, Tensor]:
    """(nll [...], lse [...]), and d nll / d logits over the logits."""
    return _implementation(backend).masked_cross_entropy_(logits, target, ignore_index, softcap)


_forward_.register_fake(_fake)


@op("masked_cross_entropy_scale_", mutates=("grad_logits",))
def _scale_(
    grad_logits: Tensor, grad_nll: Tensor, target: Tensor, ignore_index: int, backend: str
) -> None:
    """Multiply the rows that are not ignored."""
    _implementation(backend).scale_rows_(grad_logits, grad_nll, target, ignore_index)


class _Overwrite(torch.autograd.Function):
    """The gradient in the memory of the logits: made in forward, scaled once in backward.

    A custom op may not both mutate an input and have a derivative.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        ignore_index: int,
        softcap: float | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        grad_logits = logits.detach()  # shares the version: who saved the logits will know
        if backend == "reference":  # by autograd, which a custom op cannot run
            nll, lse = reference.masked_cross_entropy_(grad_logits, target, ignore_index, softcap)
        else:
            nll, lse = _forward_(grad_logits, target, ignore_index, softcap, backend)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.ignore_index, ctx.backend = ignore_index, backend
        ctx.grad_logits, ctx.target = grad_logits, target
        return nll, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_nll: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_nll is None:
            return (None,) * 5
        if ctx.grad_logits is None:
            raise RuntimeError(
                "masked_cross_entropy: a second backward needs inplace=False, the first has used "
                "the gradient up"
            )
        grad_logits, ctx.grad_logits = ctx.grad_logits, None
        _scale_(grad_logits, grad_nll, ctx.target, ctx.ignore_index, ctx.backend)
        return grad_logits, *(None,) * 4


def _flops(*_: Any, **__: Any) -> int:
    return 0  # no matrix product


FLOP_FORMULAS = {
    torch.ops.memdlm.masked_cross_entropy: _flops,
    torch.ops.memdlm.masked_cross_entropy_backward: _flops,
    torch.ops.memdlm.masked_cross_entropy_: _flops,
    torch.ops.memdlm.masked_cross_entropy_scale_: _flops,
}
