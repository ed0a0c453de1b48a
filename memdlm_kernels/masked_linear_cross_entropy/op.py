"""masked_linear_cross_entropy: public function, checks, registration, autograd, backend order."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from memdlm_kernels._backends import CPU, REFERENCE, TRITON, choose, without_autocast
from memdlm_kernels._library import op
from memdlm_kernels._reduction import check_reduction, check_targets, is_eager_cpu, reduce_nll
from memdlm_kernels.masked_linear_cross_entropy import cpu, reference

Shape = Sequence[int]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    index: Tensor | None = None,
    reduction: str = "none",
    normalizer: float | Tensor | None = None,
    return_lse: Literal[False] = False,
    chunk_bytes: int | None = None,
    compact: bool = True,
    backend: str | None = None,
) -> Tensor: ...
@overload
def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    index: Tensor | None = None,
    reduction: str = "none",
    normalizer: float | Tensor | None = None,
    return_lse: Literal[True],
    chunk_bytes: int | None = None,
    compact: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    index: Tensor | None = None,
    reduction: str = "none",
    normalizer: float | Tensor | None = None,
    return_lse: bool = False,
    chunk_bytes: int | None = None,
    compact: bool = True,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of a language-model head at the masked rows, without the logits.

    Replaces `F.cross_entropy((hidden[index] @ weight.mT + bias).float(), target,
    reduction="none")`. The logits [M, V] are never allocated, nor is their gradient. With a
    frozen weight and bias the gradient of hidden is made in the same pass over the vocabulary
    and kept as [M, D] in float32; otherwise the backward pass goes over the vocabulary again.

    Args:
        hidden: [M, D], or [N, D] with `index`; float32, bfloat16, float16 or float64.
        weight: [V, D], hidden's dtype; the head.
        target: [M] int64, in [0, V) or `ignore_index`. Ignored rows are not read: their loss and
            gradient are 0.
        bias: [V], hidden's dtype.
        token_weight: [M], any floating-point dtype; multiplies the row's loss.
        ignore_index: the target of rows to leave out.
        softcap: positive; logits become `softcap * tanh(logits / softcap)`.
        index: [M] int64, in [0, N): the row of hidden that each target belongs to. Rows may
            repeat; those not named get gradient 0.
        reduction: "none", "sum" or "mean".
        normalizer: positive; what "mean" divides by, in place of the number of rows that are not
            ignored (at least 1).
        return_lse: also return the rows' log-sum-exp.
        chunk_bytes: bytes of logits that one thread of a CPU, or a GPU, may hold at a time; None
            fits the cache. On a GPU at least 1,024 rows are held, of as many words as then fit.
        compact: without `index`, leave ignored rows out of a GPU's products. The host waits for
            their number, once in forward and once in backward of a head that trains; not while a
            CUDA graph is captured, which takes all rows. False: nothing waits, and an ignored row
            costs what another does. With `index`, made on the host with the batch, nothing waits
            either: give it the rows that are not ignored. A CPU always leaves them out.
        backend: "cpu", "triton" (not float64) or "reference"; None takes the first that fits.

    Returns:
        The loss: [M], or a scalar where it is reduced; float64 for float64 inputs, else float32;
        never negative before `token_weight`. Differentiable in hidden, weight, bias and
        token_weight; twice with backend="reference" only. With `return_lse` also lse [M], detached,
        0 where ignored.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or the backend cannot
            run. A target or index out of range is found on the CPU only.

    Source: E. Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv
    2411.09009, and P.-L. Hsu et al., "Liger Kernel", arXiv 2410.10989, for the gradient in forward.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(hidden, weight, target, bias, softcap, index, chunk_bytes)
    check_reduction(target, token_weight, reduction, normalizer)
    facts = (hidden.device, hidden.dtype)
    backend = choose("masked_linear_cross_entropy", _ORDER, backend, *facts)
    if backend != "cpu" and is_eager_cpu(target):  # which looks at them itself
        check_targets(target, ignore_index, weight.shape[0])
        if index is not None:
            cpu.check_index(index, hidden.shape[0])
    with without_autocast(hidden.device.type):
        if backend == "reference":
            nll, lse = reference.masked_linear_cross_entropy(
                hidden, weight, target, bias, index, ignore_index, softcap
            )
        else:
            head_is_frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
            nll, lse, _ = _forward(
                hidden,
                weight,
                target,
                bias,
                index,
                ignore_index,
                softcap,
                chunk_bytes,
                torch.is_grad_enabled() and hidden.requires_grad and head_is_frozen,
                compact,
                backend,
            )
        loss = reduce_nll(nll, target, token_weight, ignore_index, reduction, normalizer)
    return (loss, lse) if return_lse else loss


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    index: Tensor | None,
    chunk_bytes: int | None,
) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [M, D], got {list(hidden.shape)}")
    if hidden.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        raise ValueError(f"hidden must be one of {names}, got {hidden.dtype}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[1]}] for hidden {list(hidden.shape)}, with V at "
            f"least 1, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [{weight.shape[0]}] for weight {list(weight.shape)}, "
            f"got {list(bias.shape)}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} must have hidden's dtype {hidden.dtype}, got {tensor.dtype}")
    for name, tensor in (("target", target), ("index", index)):
        if tensor is not None and tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be torch.int64, got {tensor.dtype}")
    if target.dim() != 1 or (index is None and target.shape != hidden.shape[:1]):
        wanted = "[M]" if index is not None else f"[{hidden.shape[0]}], the rows of hidden"
        raise ValueError(f"target must be {wanted}, got {list(target.shape)}")
    if index is not None and index.shape != target.shape:
        raise ValueError(f"index must be {list(target.shape)} like target, got {list(index.shape)}")
    for name, tensor in (("weight", weight), ("target", target), ("bias", bias), ("index", index)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(
                f"{name} must be on hidden's device {hidden.device}, got {tensor.device}"
            )
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or positive and finite, got {softcap}")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be None or at least 1, got {chunk_bytes}")


_ORDER = (CPU, TRITON, REFERENCE)


def _implementation(backend: str) -> ModuleType:
    if backend == "cpu":
        return cpu
    # Only here: Triton need not be installed.
    from memdlm_kernels.masked_linear_cross_entropy import triton

    return triton


@op("masked_linear_cross_entropy")
def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    chunk_bytes: int | None,
    need_stash: bool,
    compact: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(nll [M], lse [M], stash [M, D] = d nll_i / d h_i: empty where not needed)."""
    return _implementation(backend).masked_linear_cross_entropy(
        hidden, weight, target, bias, index, ignore_index, softcap, chunk_bytes, need_stash, compact
    )


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    chunk_bytes: int | None,
    need_stash: bool,
    compact: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _loss_dtype(hidden.dtype)
    rows = target.shape[0]
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty((rows, hidden.shape[1]) if need_stash else (0,), dtype=dtype),
    )


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@op("masked_linear_cross_entropy_stash_backward")
def _stash_backward(
    grad_nll: Tensor,
    stash: Tensor,
    index: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """grad_hidden [rows, D] of a frozen head."""
    implementation = _implementation(backend)
    return implementation.masked_linear_cross_entropy_stash_backward(
        grad_nll, stash, index, rows, dtype
    )


@_stash_backward.register_fake
def _(
    grad_nll: Tensor,
    stash: Tensor,
    index: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return stash.new_empty((rows, stash.shape[1]), dtype=dtype)


@op("masked_linear_cross_entropy_backward")
def _backward(
    grad_nll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    nll: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    chunk_bytes: int | None,
    need_grad_hidden: bool,
    need_grad_weight: bool,
    need_grad_bias: bool,
    compact: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_hidden, grad_weight, grad_bias); what is not needed is an empty tensor."""
    return _implementation(backend).masked_linear_cross_entropy_backward(
        grad_nll,
        hidden,
        weight,
        target,
        bias,
        index,
        nll,
        lse,
        ignore_index,
        softcap,
        chunk_bytes,
        need_grad_hidden,
        need_grad_weight,
        need_grad_bias,
        compact,
    )


@_backward.register_fake
def _(
    grad_nll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    nll: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    chunk_bytes: int | None,
    need_grad_hidden: bool,
    need_grad_weight: bool,
    need_grad_bias: bool,
    compact: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_grad_hidden else (0,)),
        weight.new_empty(weight.shape if need_grad_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_grad_bias else (0,)),
    )


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    hidden, weight, target, bias, index, *options = inputs
    ctx.ignore_index, ctx.softcap, ctx.chunk_bytes, ctx.need_stash, *options = options
    ctx.compact, ctx.backend = options
    nll, lse, stash = output
    # Not the stash either: a second derivative must fail, not take it for a constant.
    ctx.mark_non_differentiable(lse, stash)
    ctx.set_materialize_grads(False)
    if ctx.need_stash:
        ctx.rows, ctx.dtype = hidden.shape[0], hidden.dtype
        ctx.save_for_backward(stash, index)
    else:
        ctx.save_for_backward(hidden, weight, target, bias, index, nll, lse)


def _autograd(
    ctx: Any, grad_nll: Tensor | None, _lse: None, _stash: None
) -> tuple[Tensor | None, ...]:
    grad_hidden = grad_weight = grad_bias = None
    if grad_nll is not None and ctx.need_stash:
        stash, index = ctx.saved_tensors
        grad_hidden = _stash_backward(grad_nll, stash, index, ctx.rows, ctx.dtype, ctx.backend)
    elif grad_nll is not None:
        hidden, weight, target, bias, index, nll, lse = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        grad_hidden, grad_weight, grad_bias = _backward(
            grad_nll,
            hidden,
            weight,
            target,
            bias,
            index,
            nll,
            lse,
            ctx.ignore_index,
            ctx.softcap,
            ctx.chunk_bytes,
            need_hidden,
            need_weight,
            need_bias,
            ctx.compact,
            ctx.backend,
        )
        grad_hidden = grad_hidden if need_hidden else None
        grad_weight = grad_weight if need_weight else None
        grad_bias = grad_bias if need_bias else None
    return grad_hidden, grad_weight, None, grad_bias, *(None,) * 7


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _forward_flops(
    hidden: Shape,
    weight: Shape,
    target: Shape,
    bias: Shape | None,
    index: Shape | None,
    ignore_index: int,
    softcap: float | None,
    chunk_bytes: int | None,
    need_stash: bool,
    *_: Any,
    **__: Any,
) -> int:
    # Shapes alone are known: ignored rows are counted, though they are not computed.
    return 2 * math.prod(target) * math.prod(weight) * (1 + need_stash)


def _stash_backward_flops(*_: Any, **__: Any) -> int:
    return 0  # a product of every element with its row's gradient: no matrix product


def _backward_flops(
    grad_nll: Shape,
    hidden: Shape,
    weight: Shape,
    target: Shape,
    bias: Shape | None,
    index: Shape | None,
    nll: Shape,
    lse: Shape,
    ignore_index: int,
    softcap: float | None,
    chunk_bytes: int | None,
    need_grad_hidden: bool,
    need_grad_weight: bool,
    *_: Any,
    **__: Any,
) -> int:
    products = 1 + need_grad_hidden + need_grad_weight  # the logits are computed again
    return 2 * math.prod(target) * math.prod(weight) * products


FLOP_FORMULAS = {
    torch.ops.memdlm.masked_linear_cross_entropy: _forward_flops,
    torch.ops.memdlm.masked_linear_cross_entropy_stash_backward: _stash_backward_flops,
    torch.ops.memdlm.masked_linear_cross_entropy_backward: _backward_flops,
}
