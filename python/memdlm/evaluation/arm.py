"""An arm of an evaluation, and what its folder says before the model is loaded."""

from dataclasses import dataclass
from pathlib import Path

from peft import PeftConfig
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from memdlm.inference import first_line

_ADAPTER_FILE = "adapter_config.json"


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


def base_of(folder: str) -> str:
    """The model of a folder or hub name: an adapter's base, else itself.

    Raises:
        ValueError: a folder without a model, or an adapter that cannot be read.
    """
    path = Path(folder)
    if path.is_dir() and not any((path / n).is_file() for n in ("config.json", _ADAPTER_FILE)):
        raise ValueError(f"base, plain and model must each hold a model, got {folder}")
    if not (path / _ADAPTER_FILE).is_file():
        return folder
    try:
        return str(PeftConfig.from_pretrained(folder).base_model_name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {folder} cannot be read: {first_line(error)}") from error


def read_positions(folder: str) -> int:
    """Positions that the model of a folder or hub name has.

    Raises:
        ValueError: it cannot be read.
    """
    base = base_of(folder)
    try:
        return int(AutoConfig.from_pretrained(base).max_position_embeddings)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {folder} cannot be read: {first_line(error)}") from error


def read_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name; an adapter without one has its base's.

    Raises:
        ValueError: it cannot be read.
    """
    base = base_of(folder)
    own = (Path(folder) / "tokenizer_config.json").is_file()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder if own else base)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer of {folder} cannot be read: {first_line(error)}") from error
    return tokenizer
