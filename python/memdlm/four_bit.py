"""Frozen weights in 4-bit NF4, by bitsandbytes: the base of a QLoRA run.

transformers quantises linear layers as it loads; stacked experts, which are most of a sparse model,
it leaves as they are, so that they are quantised here.
"""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from memdlm.experts import PROJECTIONS, stacked_experts

# On the CPU, bitsandbytes (0.50) dequantises rows of other lengths wrongly.
_CPU_MULTIPLE = 64


def four_bit_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What `from_pretrained` takes as `quantization_config`: NF4, double quantisation.

    Args:
        compute_dtype: of the matrix products.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def prepare_four_bit(model: nn.Module) -> None:
    """Make a model that was loaded with `four_bit_config` ready for training, in place.

    Quantises the stacked experts, and keeps layers on the CPU from being packed for inference,
    which would drop their gradients.

    Args:
        model: loaded, with its outer LoRA already on its linear layers: PEFT takes what holds a
            4-bit parameter for a layer of that name.

    Raises:
        ValueError: a layer on the CPU with an input size that is no multiple of 64.
    """
    from bitsandbytes.nn.modules import Linear4bit
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            _check_input(name, module.in_features, module.weight.device)
            # The packed layer of the CPU has no gradient, and stays packed in training.
            module.support_avx512bf16_for_cpu = False
    for name, module in list(model.named_modules()):
        experts: Any = stacked_experts(module)
        if experts is module:
            for projection in PROJECTIONS:
                weight = getattr(experts, projection)
                _check_input(f"{name}.{projection}", weight.shape[-1], weight.device)
                replace_parameter_4bit(
                    experts, projection, compress_statistics=True, quant_type="nf4"
                )


def _check_input(name: str, size: int, device: torch.device) -> None:
    if device.type == "cpu" and size % _CPU_MULTIPLE:
        raise ValueError(
            f"{name} must have an input size that is a multiple of {_CPU_MULTIPLE} to be kept in "
            f"4 bits on the CPU, got {size}"
        )
