"""lora_swiglu: public function, checks, registration, autograd, FLOP count, backend order."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memdlm_kernels._backends import REFERENCE, TRITON, Backend, choose, without_autocast
from memdlm_kernels._library import op
from memdlm_kernels._offsets import check_offsets
from memdlm_kernels.lora_swiglu import reference

Shape = Sequence[int]


def lora_swiglu(
    x: Tensor | None,
    gate: Tensor,
    up: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    *,
    offsets: Tensor | None = None,
    B_is_zero: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The gated activation of an FFN whose gate and up projections have fast weights.

    Replaces `silu(gate + scale * (x @ Ag.mT) @ Bg.mT) * (up + scale * (x @ Au.mT) @ Bu.mT)`, where
    Ag, Au are the halves of A's rows and Bg, Bu of B's. The updated gate and up are not allocated,
    in forward or backward: both read the frozen layers' own outputs and the shrink `x @ A.mT`.
    Without fast weights it is `silu(gate) * up`, of which gate and up alone are kept for backward.

    Args:
        x: [..., in], gate's dtype; the input of the frozen layers. Under autocast it is cast to
            gate's dtype first. None, or anything, without fast weights.
        gate: [..., I], float32, bfloat16, float16 or float64; the frozen gate projection's output.
            [..., 2 * I] where up is None: both stacked, the gate's columns first. Not modified.
        up: [..., I] as gate, or None.
        A: [2 * R, in], the gate's rows first; [S, 2 * R, in] for one set of fast weights for each
            sequence, where x is [S, L, in]; with offsets [E, 2 * R, in] or [S, E, 2 * R, in]. Any
            floating-point dtype, cast to x's for the products; any strides. None: no fast weights.
        B: [..., 2 * I, R], the gate's rows first, with A's leading dimensions; None as A.
        scale: finite; lora_alpha / R.
        offsets: for experts, with x [N, in] sorted by expert (and then by sequence, if each has its
            own fast weights): int32 [E] or [E, S], the row at which each group ends, ascending, the
            last one N. A group may be empty. Looked at where that is free: on the CPU, and not
            while compiling. Not read without fast weights.
        B_is_zero: a promise that B holds zeros, as fast weights do before their first step. Forward
            is then `silu(gate) * up`, and backward gives B's gradient, but none to A (None, where
            it would be zeros) and no share to x. B's values are not read by "triton", so a broken
            promise goes unnoticed.
        backend: "triton" or "reference"; None takes the first that fits. "triton" takes all dtypes
            but float64 on a GPU from sm_80 on, up to 4,096 groups (E, or E * S), and never waits
            for it. "reference" reads offsets on the host, so a compiled graph breaks.

    Returns:
        [..., I] in gate's dtype. Differentiable in x, gate, up, A and B, each gradient in its own
        dtype (zeros for the fast weights of an empty group); twice with backend="reference" only.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or values, or the backend cannot
            run.

    Source: N. Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202; E. J. Hu et al.,
    "LoRA", arXiv 2106.09685; fast weights as in MemDLM, arXiv 2603.22241v2.
    """
    _check_base(gate, up)
    if A is None and B is None:
        x = offsets = None
    if x is not None and torch.is_autocast_enabled(x.device.type):
        x = x.to(gate.dtype)
    groups = _check_update(x, gate, up, A, B, scale, offsets)
    backend = choose("lora_swiglu", _ORDER, backend, gate.device, gate.dtype, groups)
    if backend == "reference":
        with without_autocast(gate.device.type):
            return reference.lora_swiglu(x, gate, up, A, B, scale, offsets, B_is_zero)
    keep_shrink = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, gate, up, A, B)
    )
    h, _ = _forward(x, gate, up, A, B, scale, offsets, B_is_zero, keep_shrink, backend)
    return h


def _check_base(gate: Tensor, up: Tensor | None) -> None:
    if not gate.is_floating_point():
        raise ValueError(f"gate must be floating-point, got {gate.dtype}")
    if gate.dim() == 0 or (up is None and gate.shape[-1] % 2):
        wanted = "[..., I]" if up is not None else "[..., 2 * I] where up is None"
        raise ValueError(f"gate must be {wanted}, got {list(gate.shape)}")
    if up is not None:
        if up.dtype != gate.dtype or up.device != gate.device:
            raise ValueError(
                f"up must be {gate.dtype} on {gate.device} as gate is, got {up.dtype} on "
                f"{up.device}"
            )
        if up.shape != gate.shape:
            raise ValueError(f"up must be {list(gate.shape)} as gate is, got {list(up.shape)}")


def _check_update(
    x: Tensor | None,
    gate: Tensor,
    up: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    offsets: Tensor | None,
) -> int:
    """Raise ValueError unless the update fits; return how many groups the offsets have, or 1."""
    if A is None and B is None:
        return 1
    if x is None or A is None or B is None:
        missing = [name for name, value in (("x", x), ("A", A), ("B", B)) if value is None]
        raise ValueError(f"x, A and B must be given together, got None for {', '.join(missing)}")
    for name, tensor in (("x", x), ("A", A), ("B", B), ("offsets", offsets)):
        if tensor is not None and tensor.device != gate.device:
            raise ValueError(f"{name} must be on gate's device {gate.device}, got {tensor.device}")
    if x.dtype != gate.dtype:
        raise ValueError(f"x must have gate's dtype {gate.dtype}, got {x.dtype}")
    for name, tensor in (("A", A), ("B", B)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}")
    if x.dim() != gate.dim() or x.shape[:-1] != gate.shape[:-1]:
        raise ValueError(f"x must be {[*gate.shape[:-1], 'in']} for gate, got {list(x.shape)}")
    leading = _leading(x, A, offsets)
    if A.dim() != len(leading) + 2 or A.shape[-1] != x.shape[-1] or A.shape[-2] % 2:
        raise ValueError(
            f"A must be {[*leading, '2 * R', x.shape[-1]]} for x {list(x.shape)}, got "
            f"{list(A.shape)}"
        )
    stacked, rank = gate.shape[-1] * (1 if up is None else 2), A.shape[-2] // 2
    if B.shape != (*leading, stacked, rank) or rank == 0:
        raise ValueError(
            f"B must be {[*leading, stacked, rank]} for gate {list(gate.shape)} and A "
            f"{list(A.shape)}, R at least 1, got {list(B.shape)}"
        )
    if offsets is not None:
        check_offsets(offsets, leading[::-1], x.shape[0], "A")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return 1 if offsets is None else math.prod(leading)


def _leading(x: Tensor, A: Tensor, offsets: Tensor | None) -> list[int]:
    """The dimensions of A before its rows, as far as the other arguments say them."""
    if offsets is not None:
        if x.dim() != 2:
            raise ValueError(f"x must be [N, in] with offsets, got {list(x.shape)}")
        if A.dim() not in (3, 4):
            raise ValueError(
                f"A must be [E, 2 * R, in] or [S, E, 2 * R, in] with offsets, got {list(A.shape)}"
            )
        return list(A.shape[:-2])
    if A.dim() not in (2, 3):
        raise ValueError(f"A must be [2 * R, in] or [S, 2 * R, in], got {list(A.shape)}")
    if A.dim() == 2:
        return []
    if x.dim() != 3 or x.shape[0] != A.shape[0]:
        raise ValueError(
            f"x must be [{A.shape[0]}, 'L', 'in'] for A {list(A.shape)}, got {list(x.shape)}"
        )
    return [x.shape[0]]


_MOST_TRITON_GROUPS = 4096  # each program looks at the ends of all of them


def _triton_unfit(device: torch.device, dtype: torch.dtype, groups: int) -> str | None:
    if groups > _MOST_TRITON_GROUPS:
        return f"there must be at most {_MOST_TRITON_GROUPS} groups, got {groups}"
    return TRITON.unfit(device, dtype)


_ORDER = (Backend(TRITON.name, _triton_unfit), REFERENCE)


@op("lora_swiglu")
def _forward(
    x: Tensor | None,
    gate: Tensor,
    up: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    offsets: Tensor | None,
    B_is_zero: bool,
    keep_shrink: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(h [..., I], shrink [N, 2 R] = scale * x Aᵀ: empty where it is not kept or not computed)."""
    from memdlm_kernels.lora_swiglu import triton

    h, shrink = triton.lora_swiglu(x, gate, up, A, B, scale, offsets, B_is_zero)
    return h, shrink if shrink is not None and keep_shrink else gate.new_empty(0)


@_forward.register_fake
def _(
    x: Tensor | None,
    gate: Tensor,
    up: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    offsets: Tensor | None,
    B_is_zero: bool,
    keep_shrink: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    columns = gate.shape[-1] // (2 if up is None else 1)
    h = gate.new_empty(*gate.shape[:-1], columns)
    if A is None or B_is_zero or not keep_shrink:
        return h, gate.new_empty(0)
    return h, gate.new_empty(math.prod(gate.shape[:-1]), A.shape[-2])


@op("lora_swiglu_backward")
def _backward(
    grad_h: Tensor,
    x: Tensor | None,
    gate: Tensor,
    up: Tensor | None,
    shrink: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    offsets: Tensor | None,
    need_grad_x: bool,
    need_grad_A: bool,
    need_grad_B: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(grad_x, grad_gate, grad_up, grad_A, grad_B): empty where not needed, or there is no up.

    shrink is given unless there is no update or B is zero. x is given where grad_A is needed, and
    where grad_B is but shrink is not given.
    """
    from memdlm_kernels.lora_swiglu import triton

    return triton.lora_swiglu_backward(
        grad_h, x, gate, up, shrink, A, B, scale, offsets, need_grad_x, need_grad_A, need_grad_B
    )


@_backward.register_fake
def _(
    grad_h: Tensor,
    x: Tensor | None,
    gate: Tensor,
    up: Tensor | None,
    shrink: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    scale: float,
    offsets: Tensor | None,
    need_grad_x: bool,
    need_grad_A: bool,
    need_grad_B: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_x = (*gate.shape[:-1], A.shape[-1]) if A is not None and need_grad_x else (0,)
    return (
        gate.new_empty(grad_x),
        gate.new_empty(gate.shape),
        gate.new_empty(0 if up is None else up.shape),
        A.new_empty(A.shape) if A is not None and need_grad_A else gate.new_empty(0),
        B.new_empty(B.shape) if B is not None and need_grad_B else gate.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gate, up, A, B, ctx.scale, offsets, B_is_zero, _, ctx.backend = inputs
    _, shrink = output
    ctx.mark_non_differentiable(shrink)
    need_x, _, _, need_A, need_B, *_ = ctx.needs_input_grad
    updated = A is not None and not B_is_zero
    ctx.needs = (updated and need_x, updated and need_A, need_B)
    _, need_grad_A, need_grad_B = ctx.needs
    # In the outer pass A and B need no gradient: then x is not kept.
    keep_x = need_grad_A or (need_grad_B and B_is_zero)
    ctx.save_for_backward(
        x if keep_x else None, gate, up, shrink if updated else None, A, B, offsets
    )


def _autograd(ctx: Any, grad_h: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, gate, up, shrink, A, B, offsets = ctx.saved_tensors
    grads = _backward(
        grad_h, x, gate, up, shrink, A, B, ctx.scale, offsets, *ctx.needs, ctx.backend
    )
    grad_x, grad_gate, grad_up, grad_A, grad_B = grads
    need_grad_x, need_grad_A, need_grad_B = ctx.needs
    return (
        grad_x if need_grad_x else None,
        grad_gate,
        None if up is None else grad_up,
        grad_A if need_grad_A else None,
        grad_B if need_grad_B else None,
        *(None,) * 5,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)


def _forward_flops(
    x: Shape | None,
    gate: Shape,
    up: Shape | None,
    A: Shape | None,
    B: Shape | None,
    scale: float,
    offsets: Shape | None,
    B_is_zero: bool,
    *_: Any,
    **__: Any,
) -> int:
    if A is None or B is None or B_is_zero:
        return 0
    return 2 * math.prod(gate[:-1]) * (A[-2] * A[-1] + B[-2] * B[-1])


def _backward_flops(
    grad_h: Shape,
    x: Shape | None,
    gate: Shape,
    up: Shape | None,
    shrink: Shape | None,
    A: Shape | None,
    B: Shape | None,
    scale: float,
    offsets: Shape | None,
    need_grad_x: bool,
    need_grad_A: bool,
    need_grad_B: bool,
    *_: Any,
    **__: Any,
) -> int:
    if A is None or B is None:
        return 0
    given = shrink is not None  # then gate and up are updated again; else the shrink is computed
    through_B = given + (need_grad_x or need_grad_A) + need_grad_B  # products as large as shrink Bᵀ
    through_A = need_grad_x + need_grad_A + (need_grad_B and not given)  # and as x Aᵀ
    return 2 * math.prod(gate[:-1]) * (through_A * A[-2] * A[-1] + through_B * B[-2] * B[-1])


FLOP_FORMULAS = {
    torch.ops.memdlm.lora_swiglu: _forward_flops,
    torch.ops.memdlm.lora_swiglu_backward: _backward_flops,
}
