"""Whether a model is the one that a memory was written for, without reading all of its weights."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig

# Values that are looked at of each parameter: its first ones, and some spread over all of it.
_FIRST, _SPREAD = 16, 64

# What every config has says where a model is from and what it returns; of that the type alone, and
# of the rest all but these, shapes the forward. Quantised values are among the parameters.
_IN_EVERY_CONFIG = frozenset(PreTrainedConfig().to_dict()) - {"model_type"}
_NOT_READ = ("use_cache", "auto_map", "quantization_config", "initializer_range", "torch_dtype")


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Hashes of what decides a model's forward: its weights, its config, its PEFT adapters.

    Of the values only a sample is read, up to 80 of each tensor: a model of 8 billion takes
    milliseconds. Training moves nearly every value; a change to a few chosen ones may go unseen.

    Args:
        model: of transformers or PEFT, quantised too (then of its packed values).

    Returns:
        SHA-256, in hexadecimal, of the "parameter names", "parameter shapes", "parameter dtypes"
        and "parameter values" (saved buffers are parameters here), of the "config", and of which
        "adapters" of PEFT are read.
    """
    named = [*model.named_parameters(), *_saved_buffers(model)]
    samples = [_sample(parameter.detach()) for _, parameter in named]
    devices = dict.fromkeys(sample.device for sample in samples)
    # One transfer for each device.
    bytes_of = [torch.cat([s for s in samples if s.device == device]).cpu() for device in devices]
    return {
        "parameter names": _hash(name.encode() for name, _ in named),
        "parameter shapes": _hash(str(list(parameter.shape)).encode() for _, parameter in named),
        "parameter dtypes": _hash(str(parameter.dtype).encode() for _, parameter in named),
        "parameter values": _hash(part.numpy().tobytes() for part in bytes_of),
        "config": _hash([json.dumps(_config(model), sort_keys=True, default=str).encode()]),
        "adapters": _hash(str(adapter).encode() for adapter in _adapters(model)),
    }


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        for own, buffer in module.named_buffers(recurse=False):
            if own not in module._non_persistent_buffers_set:
                yield f"{name}.{own}", buffer


def _config(model: Any) -> dict[str, Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        name: value
        for name, value in base.config.to_dict().items()
        if name not in _IN_EVERY_CONFIG
        and name not in _NOT_READ
        and not name.startswith("_")
        and not name.endswith("_token_id")
    }


def _adapters(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Of each wrapper its name, adapters and scales, whether they are off, which are merged."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            active = sorted(module.active_adapters)
            scales = getattr(module, "scaling", {})
            own = [(a, scales.get(a) if isinstance(scales, dict) else None) for a in active]
            yield name, own, module.disable_adapters, sorted(module.merged_adapters)


def _sample(values: Tensor) -> Tensor:
    flat = values.flatten()
    spread = flat[:: max(1, len(flat) // _SPREAD)][:_SPREAD]
    return torch.cat((flat[:_FIRST], spread)).view(torch.uint8)


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\0")
    return digest.hexdigest()
