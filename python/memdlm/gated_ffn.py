"""A dense gated FFN with its activation, and the fast weights before it, in one kernel."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memdlm_kernels import lora_swiglu


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of a linear layer's output: scale * (x Aᵀ) Bᵀ.

    Attributes:
        A: [R, in], or [S, R, in] for one set for each sequence.
        B: [out, R] or [S, out, R].
        scale: see above.
        B_is_zero: whether B is known to hold zeros.
    """

    A: Tensor
    B: Tensor
    scale: float
    B_is_zero: bool


_DEFERRED: ContextVar[list[LowRank] | None] = ContextVar("_DEFERRED", default=None)


def defer(update: LowRank) -> bool:
    """Leave an update to the activation that follows.

    Args:
        update: of the gate or the up projection that is being computed.

    Returns:
        False where nobody waits for it, or for one more: the caller must add it itself.
    """
    deferred = _DEFERRED.get()
    if deferred is None or deferred:
        return False
    deferred.append(update)
    return True


def fuses(x: Tensor) -> bool:
    """Whether an activation is one kernel here: there is one for GPUs alone."""
    return x.is_cuda


def run_gated_ffn(mlp: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)).

    Args:
        mlp: with `gate_proj`, `up_proj` and `down_proj`; called as it is where its activation is
            another, or where there is no kernel.
        x: [..., D].

    Returns:
        [..., D].
    """
    config = getattr(mlp, "config", None)
    if not fuses(x) or getattr(config, "hidden_act", "silu") != "silu":
        return mlp(x)
    gate, own = _project(mlp.gate_proj, x)
    up, other = _project(mlp.up_proj, x)
    if not own and not other:
        return mlp.down_proj(lora_swiglu(None, gate, up, None, None, 1.0))
    (first,), (second,) = own, other
    # Small beside x and the outputs; stacked, one shrink reads x for both.
    A = torch.cat((first.A, second.A), dim=-2)  # [2 R, in]
    B = torch.cat((first.B, second.B), dim=-2)  # [2 I, R]
    inner = lora_swiglu(x, gate, up, A, B, first.scale, B_is_zero=first.B_is_zero)
    return mlp.down_proj(inner)


def _project(linear: Any, x: Tensor) -> tuple[Tensor, list[LowRank]]:
    with _deferring() as updates:
        return linear(x), updates


@contextlib.contextmanager
def _deferring() -> Iterator[list[LowRank]]:
    updates: list[LowRank] = []
    outer = _DEFERRED.set(updates)
    try:
        yield updates
    finally:
        _DEFERRED.reset(outer)
