"""Whether a model is the one that a memory was written for, without reading all of its weights."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Values that are looked at of each parameter: its first ones, and some spread over all of it.
_FIRST, _SPREAD = 16, 64


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Hashes of a model's parameters.

    Of the values only a sample is read, up to 80 of each parameter: a model of 8 billion takes
    milliseconds. Training moves nearly every value; a change to a few chosen ones may go unseen.

    Args:
        model: any, quantised too (then of its packed values).

    Returns:
        SHA-256 of the "names", "shapes", "dtypes" and "values", in hexadecimal.
    """
    named = list(model.named_parameters())
    samples = [_sample(parameter.detach()) for _, parameter in named]
    devices = dict.fromkeys(sample.device for sample in samples)
    # One transfer for each device.
    bytes_of = [torch.cat([s for s in samples if s.device == device]).cpu() for device in devices]
    return {
        "names": _hash(name.encode() for name, _ in named),
        "shapes": _hash(str(list(parameter.shape)).encode() for _, parameter in named),
        "dtypes": _hash(str(parameter.dtype).encode() for _, parameter in named),
        "values": _hash(part.numpy().tobytes() for part in bytes_of),
    }


def _sample(values: Tensor) -> Tensor:
    flat = values.flatten()
    spread = flat[:: max(1, len(flat) // _SPREAD)][:_SPREAD]
    return torch.cat((flat[:_FIRST], spread)).view(torch.uint8)


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part + b"\0")
    return digest.hexdigest()
