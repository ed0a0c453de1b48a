"""Which backend of PyTorch's `scaled_dot_product_attention` a model tries first."""

import contextlib
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.backends.cuda import (
    cudnn_sdp_enabled,
    flash_sdp_enabled,
    math_sdp_enabled,
    mem_efficient_sdp_enabled,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

SdpaBackend = Literal["auto", "cudnn", "flash", "efficient", "math"]

# What follows takes what the first one cannot: a mask, heads that share keys, a dtype. cuDNN runs
# where it is asked for alone. Math takes everything; on a CPU, where flash comes first whatever the
# order, it runs if it stands alone.
_ORDERS = {
    "cudnn": (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ),
    "flash": (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "math": (SDPBackend.MATH,),
}
_ENABLED = {
    SDPBackend.CUDNN_ATTENTION: cudnn_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: mem_efficient_sdp_enabled,
    SDPBackend.MATH: math_sdp_enabled,
}
_ON_CPU = ("auto", "flash", "math")


def check_sdpa_backend(choice: str, device: torch.device) -> None:
    """Whether a device has the backend that is to be tried first.

    Args:
        choice: of `SdpaBackend`.
        device: where the model will run.

    Raises:
        ValueError: it is no choice, or its backend is for CUDA and the device is not.
    """
    _check(choice, get_args(SdpaBackend) if device.type == "cuda" else _ON_CPU, device.type)


def set_sdpa_backend(model: nn.Module, choice: str) -> None:
    """Have every `Backbone` of a model try one backend first, from now on.

    Replaces `sdpa_kernel([first, ...], set_priority=True)` around each pass: training, a prompt's
    memory, the sampler and evaluation all run their layers by a `Backbone`, and a layer that
    backward recomputes is under the same order. What the first backend cannot take goes to the
    next of flash, efficient and math, and so does everything where the device has no such backend.

    Args:
        model: a causal LM, or a PEFT model of one.
        choice: of `SdpaBackend`; "auto" leaves the order to PyTorch.

    Raises:
        ValueError: it is no choice.
    """
    _check(choice, get_args(SdpaBackend))
    base: Any = model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    base.get_decoder().sdpa_backend = choice


def _check(choice: str, known: tuple[str, ...], device: str | None = None) -> None:
    if choice not in known:
        names = ", ".join(repr(name) for name in known)
        where = "" if device is None else f" on {device}"
        raise ValueError(f"sdpa_backend must be one of {names}{where}, got {choice!r}")


def sdpa_backend(decoder: nn.Module) -> str:
    """What `set_sdpa_backend` said last."""
    return str(getattr(decoder, "sdpa_backend", "auto"))


def in_order(choice: str) -> contextlib.AbstractContextManager[Any]:
    """In here attention tries one backend first, then those that take what it cannot.

    Inside another `sdpa_kernel` only what that allows is tried: what is to be differentiated twice
    asks for math alone. The order is the process's: threads share it.

    Args:
        choice: of `SdpaBackend`.

    Returns:
        A context to enter once.
    """
    if choice == "auto":
        return contextlib.nullcontext()
    order = [backend for backend in _ORDERS[choice] if _ENABLED[backend]()]
    return sdpa_kernel(order, set_priority=True) if order else contextlib.nullcontext()
