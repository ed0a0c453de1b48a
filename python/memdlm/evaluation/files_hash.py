"""Whether a folder still holds the same model, without reading all of it."""

import hashlib
import json
from pathlib import Path

_PATTERNS = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.txt", "*/*.jinja")
# 2 MiB of each file, from all over it: in a large one, some of every layer.
_PIECES = 512
_PIECE_BYTES = 1 << 12


def files_hash(folder: Path) -> str | None:
    """A short name for the weights, config and tokenizer of a folder.

    Of each file, its size and evenly spaced pieces; of one below 2 MiB, all. An adapter's base
    counts, where it is a folder too.

    Args:
        folder: of a model or an adapter.

    Returns:
        16 hexadecimal digits; None for what is not a folder, a hub name.
    """
    if not folder.is_dir():
        return None
    parts = []
    for path in sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)}):
        parts.append(f"{path.relative_to(folder)} {_pieces_hash(path)}")
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        parts.append(f"base {files_hash(Path(base)) if base else None}")
    return short_hash("\n".join(parts).encode())


def short_hash(content: bytes) -> str:
    """The first 16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def _pieces_hash(path: Path) -> str:
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _PIECES * _PIECE_BYTES:
            found.update(file.read())
        else:
            for number in range(_PIECES):
                file.seek(number * (size - _PIECE_BYTES) // (_PIECES - 1))
                found.update(file.read(_PIECE_BYTES))
    return found.hexdigest()[:16]
