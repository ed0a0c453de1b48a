"""An arm of an evaluation, and what its folder says before the model is loaded."""

from dataclasses import dataclass
from pathlib import Path

from memdlm.inference import ADAPTER_FILE, read_config


@dataclass(frozen=True)
class Arm:
    """A model, with its memory or without.

    Attributes:
        name: in tables and rows.
        folder: of the model, or its hub name.
        memory: whether a memory is written from each prompt.
    """

    name: str
    folder: str
    memory: bool = False


def read_positions(folder: str) -> int:
    """Positions that the model of a folder or hub name has.

    Raises:
        ValueError: a folder without a model, or one that cannot be read.
    """
    path = Path(folder)
    if path.is_dir() and not any((path / n).is_file() for n in ("config.json", ADAPTER_FILE)):
        raise ValueError(f"base, plain and model must each hold a model, got {folder}")
    return int(read_config(folder)[1].max_position_embeddings)
