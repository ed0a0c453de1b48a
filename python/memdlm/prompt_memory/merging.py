"""Fast weights added to the weights that they adapt, for as long as they are read."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from memdlm.config import MemoryConfig
from memdlm.experts import PROJECTIONS, is_four_bit
from memdlm.fast_weights import FastWeights

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A memory moves most weights by less than half a step of bfloat16: rounding would drop it.
_KEEP_SMALL_CHANGES = (torch.float32, torch.float64)


def merges(model: nn.Module, fast_weights: FastWeights, prompts: int, merge: bool | None) -> bool:
    """Whether a memory is to be merged.

    Args:
        model: whose layers are adapted.
        fast_weights: theirs.
        prompts: how many the memory is of.
        merge: True demands it; None merges a single prompt where nothing is lost by it, into
            float32 or float64 weights; False never does.

    Raises:
        ValueError: it is demanded, and impossible.
    """
    if merge is False:
        return False
    reason = _why_not(model, fast_weights, prompts)
    if merge and reason is not None:
        raise ValueError(f"merge must be None or False {reason}, got True")
    if merge or reason is not None:
        return bool(merge)
    own = [weight for pair in _adapted(fast_weights).values() for weight in pair]
    return all(weight.dtype in _KEEP_SMALL_CHANGES for weight in own)


def _why_not(model: nn.Module, fast_weights: FastWeights, prompts: int) -> str | None:
    if prompts != 1:
        return f"for several prompts ({prompts}), each with weights of its own"
    for name, module in fast_weights.modules.items():
        # First, since asking a 4-bit parameter for its value dequantises it.
        quantised = isinstance(module, nn.Linear) and type(module) is not nn.Linear
        if quantised or is_parametrized(module) or is_four_bit(module):
            return f"for weights in 4 bits or otherwise not plain ({name})"
    own = _adapted(fast_weights)
    for name, pair in own.items():
        for weight in pair:
            if weight.dtype not in _PLAIN:
                return f"for weights in {weight.dtype} ({name})"
    shared = _shared(model, own)
    if shared is not None:
        return f"for a weight that is also another's ({shared})"
    adapted = {id(module) for module in fast_weights.modules.values()}
    for name, layer in model.named_modules():
        # DoRA and the like scale by the norm of the weight that would change.
        if (
            isinstance(layer, LoraLayer)
            and id(layer.get_base_layer()) in adapted
            and any(layer.lora_variant.get(adapter) for adapter in layer.active_adapters)
        ):
            return f"under a LoRA variant such as DoRA ({name})"
    return None


def _adapted(fast_weights: FastWeights) -> dict[str, tuple[Tensor, ...]]:
    """Layer name to the parameters that its fast weights are added to, in their order."""
    return {name: _parameters(module) for name, module in fast_weights.modules.items()}


def _parameters(module: Any) -> tuple[Tensor, ...]:
    if isinstance(module, nn.Linear):
        return (module.weight,)
    return tuple(getattr(module, name) for name in PROJECTIONS)


def _shared(model: nn.Module, own: dict[str, tuple[Tensor, ...]]) -> str | None:
    """The first adapted layer whose memory another parameter, or another layer, lies in too."""
    ranges: dict[int, list[tuple[int, int]]] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        begin = parameter.data_ptr()
        storage = parameter.untyped_storage().data_ptr()
        ranges.setdefault(storage, []).append((begin, begin + parameter.nbytes))
    for name, pair in own.items():
        for weight in pair:
            begin, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
            others = ranges[weight.untyped_storage().data_ptr()]
            if sum(first < end and begin < last for first, last in others) > 1:
                return name
    return None


@contextlib.contextmanager
def merged(fast_weights: FastWeights) -> Iterator[None]:
    """In here the adapted weights are W + scale * B A; afterwards they are W, bit for bit.

    The sums are made in float32, or float64 for such weights, and rounded to the weight's dtype. A
    copy of the adapted weights is kept meanwhile.

    Args:
        fast_weights: of one set.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for module, tensors in zip(
            fast_weights.modules.values(), fast_weights.named().values(), strict=True
        ):
            weights = _parameters(module)
            size = len(tensors) // len(weights)
            for number, weight in enumerate(weights):
                # Through .data: a backward that is still to come reads W, which is back by then.
                kept.append((weight.data, weight.detach().clone()))
                update = [tensor[0] for tensor in tensors[number * size : (number + 1) * size]]
                _add(weight.data, update, fast_weights.config)
        yield
    finally:
        for weight, original in kept:
            weight.copy_(original)


def _add(weight: Tensor, update: list[Tensor], config: MemoryConfig) -> None:
    if weight.dim() == 3:
        # One expert after another: all of them in float32 would be a large copy.
        for expert, own in enumerate(weight):
            _add(own, [tensor[expert] for tensor in update], config)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(weight.to(wide) + _change([tensor.to(wide) for tensor in update], config))


def _change(factors: list[Tensor], config: MemoryConfig) -> Tensor:
    """[out, in]: the matrix itself, or scale * B A for each projection stacked in the rows."""
    if config.adapter == "full":
        return factors[0]
    A, B = factors  # [P R, in], [out, R]
    count = len(A) // config.rank
    pairs = zip(B.chunk(count), A.chunk(count), strict=True)
    return (config.lora_alpha / config.rank) * torch.cat([b @ a for b, a in pairs])
