"""An outer LoRA by PEFT, computed by the fused op: PEFT's layers, parameters and checkpoints."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from memdlm_kernels import lora_linear

_FUSED: ContextVar[bool] = ContextVar("_FUSED", default=False)

# Of PEFT's linear layers: the plain one, and the one around a 4-bit base.
_KINDS = ("Linear", "Linear4bit")


@contextlib.contextmanager
def fused_outer_lora() -> Iterator[None]:
    """In here, prepared layers add their LoRA to the base layer's output in one product.

    PEFT makes B A x, a scaled copy and a sum of the size of the output, and again in backward; here
    the sum is part of the product. The products are in the dtype of the layer, as under autocast,
    where PEFT's are in that of A and B. Layers with more than this (DoRA and other variants, a
    bias) or less (merged, disabled) go PEFT's way.
    """
    outer = _FUSED.set(True)
    try:
        yield
    finally:
        _FUSED.reset(outer)


def prepare_outer_lora(model: nn.Module) -> None:
    """Let PEFT's linear layers be fused; outside of `fused_outer_lora` they compute as before.

    Args:
        model: a PEFT model; what is no LoRA on a linear layer is left as it is.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer) and type(module).__name__ in _KINDS:
            module.forward = partial(_forward, module)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = not any(layer.lora_variant.get(name) or layer.lora_bias[name] for name in adapters)
    off = layer.disable_adapters or layer.merged
    if not _FUSED.get() or args or kwargs or off or not plain:
        return type(layer).forward(layer, x, *args, **kwargs)
    out = layer.base_layer(x)
    for name in adapters:
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        out = lora_linear(layer.lora_dropout[name](x).to(out.dtype), out, A, B, layer.scaling[name])
    return out
