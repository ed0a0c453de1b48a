"""masked_linear_kl: public function, checks, registration, autograd, backend order."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memdlm_kernels._backends import REFERENCE, TRITON, choose, preferred, without_autocast
from memdlm_kernels._library import op
from memdlm_kernels._reduction import check_reduction, is_eager_cpu
from memdlm_kernels.masked_linear_kl import reference

Shape = Sequence[int]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DIRECTIONS = ("forward", "reverse")


def masked_linear_kl(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
    token_weight: Tensor | None = None,
    softcap: float | None = None,
    index: Tensor | None = None,
    reduction: str = "none",
    normalizer: float | Tensor | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """KL divergence of two hidden states through one language-model head.

    Replaces `F.kl_div(((student @ weight.mT).float() / temperature).log_softmax(-1), ((teacher @
    weight.mT).float() / temperature).log_softmax(-1), reduction="none", log_target=True).sum(-1)`,
    the arguments changed about for "reverse". Neither side's logits [M, V] are allocated, nor their
    gradient, which is made in the same pass and kept as [M, D] in float32. The logits are float32:
    those of bfloat16 lose most of a small divergence. There is no factor `temperature ** 2`.

    Args:
        student: [M, D]; float32, bfloat16, float16 or float64.
        teacher: [M, D], student's dtype; a constant: it gets no gradient.
        weight: [V, D], student's dtype; the head. It may require grad with backend="reference"
            only, which then differentiates the student's logits in it.
        bias: [V], student's dtype, as weight.
        direction: "forward" for KL(teacher || student), "reverse" for KL(student || teacher).
        temperature: positive; divides the logits, after the softcap.
        token_weight: [K], any floating-point dtype; multiplies the row's divergence.
        softcap: positive; logits become `softcap * tanh(logits / softcap)`.
        index: [K] int64, in [0, M): the rows of student and teacher to compare, all of them if
            None. Rows may repeat; those not named get gradient 0.
        reduction: "none", "sum" or "mean".
        normalizer: positive; what "mean" divides by, in place of the number of rows compared (at
            least 1).
        chunk_bytes: bytes of logits that a GPU may hold at a time, 256 MiB if None; at least 128
            rows of each side are.
        backend: "triton" (not float64) or "reference"; None takes the first that fits.

    Returns:
        The divergence: [K], or a scalar where it is reduced; float64 for float64 inputs, else
        float32; never negative before `token_weight`, and 0 with gradient 0 where both sides have
        the same logits. Differentiable in student and token_weight; twice with backend="reference"
        only.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, the head requires grad
            while grad is enabled and backend is not "reference", or the backend cannot run. An
            index out of range is found on the CPU only.

    Source: G. Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; Y.
    Gu et al., "MiniLLM", arXiv 2306.08543, for the reverse direction.
    """
    if torch.is_autocast_enabled(student.device.type):
        dtype = torch.get_autocast_dtype(student.device.type)
        student, teacher, weight = student.to(dtype), teacher.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(student, teacher, weight, bias, direction, temperature, softcap, index, chunk_bytes)
    rows = student.shape[0] if index is None else index.shape[0]
    _check_token_weight(token_weight, rows, student.device)
    check_reduction(student, None, reduction, normalizer)
    if preferred(backend) != "reference":
        _check_constant(weight, bias)
    backend = choose("masked_linear_kl", _ORDER, backend, student.device, student.dtype)
    with without_autocast(student.device.type):
        if backend == "reference":
            kl = reference.masked_linear_kl(
                student, teacher, weight, bias, index, direction, temperature, softcap
            )
        else:
            kl, _ = _forward(
                student,
                teacher.detach(),
                weight,
                bias,
                index,
                direction,
                temperature,
                softcap,
                chunk_bytes,
                torch.is_grad_enabled() and student.requires_grad,
                backend,
            )
        if token_weight is not None:
            kl = kl * token_weight.to(kl.dtype)
        if reduction == "none":
            return kl
        if reduction == "sum":
            return kl.sum()
        if normalizer is None:
            normalizer = max(rows, 1)
        elif isinstance(normalizer, Tensor):
            normalizer = normalizer.reshape(())
        return kl.sum() / normalizer


def _check(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    direction: str,
    temperature: float,
    softcap: float | None,
    index: Tensor | None,
    chunk_bytes: int | None,
) -> None:
    if student.dim() != 2:
        raise ValueError(f"student must be [M, D], got {list(student.shape)}")
    if student.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        raise ValueError(f"student must be one of {names}, got {student.dtype}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"teacher must be {list(student.shape)} like student, got {list(teacher.shape)}"
        )
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != student.shape[1]:
        raise ValueError(
            f"weight must be [V, {student.shape[1]}] for student {list(student.shape)}, with V at "
            f"least 1, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias must be [{weight.shape[0]}] for weight {list(weight.shape)}, "
            f"got {list(bias.shape)}"
        )
    for name, tensor in (("teacher", teacher), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != student.dtype:
            raise ValueError(
                f"{name} must have student's dtype {student.dtype}, got {tensor.dtype}"
            )
    for name, tensor in (
        ("teacher", teacher),
        ("weight", weight),
        ("bias", bias),
        ("index", index),
    ):
        if tensor is not None and tensor.device != student.device:
            raise ValueError(
                f"{name} must be on student's device {student.device}, got {tensor.device}"
            )
    if index is not None and (index.dtype != torch.int64 or index.dim() != 1):
        raise ValueError(f"index must be [K] torch.int64, got {list(index.shape)} {index.dtype}")
    if direction not in _DIRECTIONS:
        names = ", ".join(repr(name) for name in _DIRECTIONS)
        raise ValueError(f"direction must be one of {names}, got {direction!r}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or positive and finite, got {softcap}")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be None or at least 1, got {chunk_bytes}")
    if index is not None and is_eager_cpu(index):
        bad = (index < 0) | (index >= student.shape[0])
        if bad.any():
            raise ValueError(
                f"index must be in [0, {student.shape[0]}), got {index[bad][0].item()}"
            )


def _check_constant(weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require grad, the head gets no gradient here: detach it, or take "
                "backend='reference'"
            )


def _check_token_weight(token_weight: Tensor | None, rows: int, device: torch.device) -> None:
    if token_weight is None:
        return
    if not token_weight.is_floating_point():
        raise ValueError(f"token_weight must be floating-point, got {token_weight.dtype}")
    if token_weight.shape != (rows,):
        raise ValueError(
            f"token_weight must be [{rows}], a number for each row compared, "
            f"got {list(token_weight.shape)}"
        )
    if token_weight.device != device:
        raise ValueError(
            f"token_weight must be on student's device {device}, got {token_weight.device}"
        )


_ORDER = (TRITON, REFERENCE)


@op("masked_linear_kl")
def _forward(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    direction: str,
    temperature: float,
    softcap: float | None,
    chunk_bytes: int | None,
    need_stash: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(kl [K], stash [K, D] = d kl_k / d student_k: empty where not needed)."""
    # Only here: Triton need not be installed.
    from memdlm_kernels.masked_linear_kl import triton

    return triton.masked_linear_kl(
        student,
        teacher,
        weight,
        bias,
        index,
        direction,
        temperature,
        softcap,
        chunk_bytes,
        need_stash,
    )


@_forward.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    direction: str,
    temperature: float,
    softcap: float | None,
    chunk_bytes: int | None,
    need_stash: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = student.shape[0] if index is None else index.shape[0]
    return (
        student.new_empty(rows, dtype=torch.float32),
        student.new_empty((rows, student.shape[1]) if need_stash else (0,), dtype=torch.float32),
    )


@op("masked_linear_kl_backward")
def _backward(
    grad_kl: Tensor,
    stash: Tensor,
    index: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """grad_student [rows, D]."""
    from memdlm_kernels.masked_linear_kl import triton

    return triton.masked_linear_kl_backward(grad_kl, stash, index, rows, dtype)


@_backward.register_fake
def _(
    grad_kl: Tensor,
    stash: Tensor,
    index: Tensor | None,
    rows: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return stash.new_empty((rows, stash.shape[1]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, _, _, _, index, *_, ctx.need_stash, ctx.backend = inputs
    # The stash neither: a second derivative must fail, not take it for a constant.
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.rows, ctx.dtype = student.shape[0], student.dtype
    ctx.save_for_backward(output[1], index)


def _autograd(ctx: Any, grad_kl: Tensor | None, _stash: None) -> tuple[Tensor | None, ...]:
    grad_student = None
    if grad_kl is not None and ctx.need_stash:
        stash, index = ctx.saved_tensors
        grad_student = _backward(grad_kl, stash, index, ctx.rows, ctx.dtype, ctx.backend)
    return grad_student, *(None,) * 10


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _forward_flops(
    student: Shape,
    teacher: Shape,
    weight: Shape,
    bias: Shape | None,
    index: Shape | None,
    direction: str,
    temperature: float,
    softcap: float | None,
    chunk_bytes: int | None,
    need_stash: bool,
    *_: Any,
    **__: Any,
) -> int:
    rows = student[0] if index is None else index[0]
    return 2 * rows * math.prod(weight) * (2 + need_stash)


def _backward_flops(*_: Any, **__: Any) -> int:
    return 0  # a product of every element with its row's gradient: no matrix product


FLOP_FORMULAS = {
    torch.ops.memdlm.masked_linear_kl: _forward_flops,
    torch.ops.memdlm.masked_linear_kl_backward: _backward_flops,
}
