"""An outer LoRA by PEFT, computed by the fused op: PEFT's layers, parameters and checkpoints."""

from functools import partial
from typing import Any

from torch import Tensor, nn

from memdlm_kernels import lora_linear


def fuse_outer_lora(model: nn.Module) -> None:
    """Let PEFT's linear layers add their LoRA to the base layer's output in one product, in place.

    PEFT makes B A x, a scaled copy and a sum of the size of the output, and again in backward; here
    the sum is part of the product. The products are in the dtype of the layer, as under autocast,
    where PEFT's are in that of A and B. A layer with more than this (DoRA and other variants,
    several adapters in one batch) or less (merged, disabled) goes PEFT's way.

    Args:
        model: a PEFT model; one without adapters is left as it is.
    """
    for module in model.modules():
        if isinstance(getattr(module, "base_layer", None), nn.Linear) and hasattr(module, "lora_A"):
            module.forward = partial(_forward, module)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = not any(layer.lora_variant.get(name) or layer.lora_bias[name] for name in adapters)
    if args or kwargs or layer.disable_adapters or layer.merged or not plain:
        return type(layer).forward(layer, x, *args, **kwargs)
    out = layer.base_layer(x)
    for name in adapters:
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        out = lora_linear(layer.lora_dropout[name](x).to(out.dtype), out, A, B, layer.scaling[name])
    return out
