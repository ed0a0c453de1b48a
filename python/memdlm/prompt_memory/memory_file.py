"""A memory as a file: safetensors, with what it was written for and by."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from memdlm.config import MemoryConfig
from memdlm.experts import PROJECTIONS
from memdlm.fast_weights import FastWeights

_FORMAT = 2
_KEY = "memdlm_prompt_memory"
# What decides how a layer reads its fast weights; the rest decided how they were written.
_READ_BY = ("adapter", "rank", "lora_alpha", "target", "layer_fraction", "state_dtype")


@dataclass(frozen=True)
class Header:
    """What a file says beside its tensors.

    Attributes:
        lengths: tokens of each prompt.
        memory: the inner loop that wrote it.
        model: the `fingerprint` of the model it was written for.
        format: version of the file.
    """

    lengths: tuple[int, ...]
    memory: dict[str, Any]
    model: dict[str, str]
    format: int = _FORMAT


def header(lengths: tuple[int, ...], memory: MemoryConfig, model: dict[str, str]) -> Header:
    """The header of a memory that was just written."""
    return Header(lengths, dataclasses.asdict(memory), model)


def write_memory_file(
    path: str | os.PathLike[str], fast_weights: FastWeights, described: Header
) -> None:
    """Write fast weights; a file of that name is replaced once the new one is complete.

    Args:
        path: the file; its folder exists.
        fast_weights: a tensor [S, ...] of each layer is stored under the layer's name and its own,
            say "3.mlp.up_proj.A" or "3.mlp.experts.down_proj.B".
        described: its header.

    Raises:
        ValueError: the file cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in _labelled(fast_weights).items()}
    part = Path(f"{os.fspath(path)}.part")
    try:
        save_file(tensors, part, {_KEY: json.dumps(dataclasses.asdict(described))})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path {os.fspath(path)} cannot be written: {error}") from error


def read_header(path: str | os.PathLike[str]) -> Header:
    """What a file says of itself.

    Raises:
        ValueError: it cannot be read, or is no memory, or of another version.
    """
    name = os.fspath(path)
    try:
        with safe_open(name, "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path {name} cannot be read: {error}") from error
    if text is None:
        raise ValueError(
            f"path {name} must be a file that PromptMemory.save wrote: no {_KEY} in it"
        )
    try:
        fields = json.loads(text)
        found = fields["format"]
        if found == _FORMAT:
            return _checked(Header(**fields | {"lengths": tuple(fields["lengths"])}))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"path {name} has a {_KEY} that cannot be read: {error!r}") from error
    raise ValueError(f"path {name} must be of format {_FORMAT}, got format {found!r}")


def _checked(found: Header) -> Header:
    lengths = found.lengths
    if not lengths or any(type(length) is not int or length < 1 for length in lengths):
        raise ValueError(f"lengths must be whole numbers, at least 1, got {list(lengths)}")
    for part in ("memory", "model"):
        if not isinstance(getattr(found, part), dict):
            raise ValueError(f"{part} must be a JSON object, got {getattr(found, part)!r}")
    return found


def check_header(
    path: str | os.PathLike[str], saved: Header, memory: MemoryConfig, model: dict[str, str]
) -> None:
    """Refuse a file that this model would read otherwise than it was written for.

    Args:
        path: the file, for the message.
        saved: its header.
        memory: the inner loop here.
        model: the `fingerprint` of the model here.

    Raises:
        ValueError: another model or another way of reading; says what differs.
    """
    name = os.fspath(path)
    for option in _READ_BY:
        here, there = getattr(memory, option), saved.memory.get(option)
        if here != there:
            raise ValueError(
                f"path {name} must hold a memory with {option} {here!r} as here, got {there!r}"
            )
    differs = [kind for kind, own in model.items() if saved.model.get(kind) != own]
    if differs:
        raise ValueError(
            f"path {name} must hold a memory of this model, got one of a model with "
            f"other {', '.join(differs)}"
        )


def read_memory_file(
    path: str | os.PathLike[str], fast_weights: FastWeights, sets: int
) -> dict[str, Tensor]:
    """The tensors of a file, by the names of the fast weights, in their order.

    Args:
        path: the file; its header fits.
        fast_weights: the layers here; not changed.
        sets: S, how many the file holds of each tensor.

    Raises:
        ValueError: tensors are missing, too many, of another shape or dtype, or not finite.
    """
    name = os.fspath(path)
    wanted = _labelled(fast_weights)
    device = fast_weights.param.device
    try:
        with safe_open(name, "pt", str(device)) as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path {name} cannot be read: {error}") from error
    if found.keys() != wanted.keys():
        raise ValueError(f"path {name} must hold the tensors {sorted(wanted)}, got {sorted(found)}")
    for key, tensor in found.items():
        dtype, shape = wanted[key].dtype, [sets, *wanted[key].shape[1:]]
        if list(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"path {name} must hold {key} as {dtype} {shape}, got {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"path {name} must hold finite values, got others in {key}")
    return {key: found[key] for key in wanted}


def _labelled(fast_weights: FastWeights) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer, own in fast_weights.named().items():
        kinds: tuple[str, ...] = ("A", "B") if fast_weights.config.adapter == "lora" else ("delta",)
        if not isinstance(fast_weights.modules[layer], nn.Linear):
            kinds = tuple(f"{part}.{kind}" for part in PROJECTIONS for kind in kinds)
        tensors |= {f"{layer}.{kind}": tensor for kind, tensor in zip(kinds, own, strict=True)}
    return tensors
