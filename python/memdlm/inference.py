"""A trained model as inference needs it: loaded with what it was trained with, and its logits."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import memdlm.models  # noqa: F401 - teaches AutoModelForCausalLM the families
from memdlm.backbone import FAMILIES, Backbone
from memdlm.checkpoint import METHOD_FILE
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.four_bit import four_bit_config, prepare_four_bit
from memdlm.sdpa import check_sdpa_backend, set_sdpa_backend

# Tokens of a block that published block-diffusion models were trained with; their configs do not
# say.
PUBLISHED_BLOCK_SIZES = {"llada2_moe": 32}
ADAPTER_FILE = "adapter_config.json"
# What `method_of` says.
_METHOD_KEYS = ("objective", "mask_token_id", "seed", "diffusion", "memory")


@dataclass(frozen=True)
class Checkpoint:
    """A model and its method.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: saved with it, or with its base.
        mask_token_id: of the mask token.
        diffusion: what it was trained with, from the folder's `memdlm.json`; where there is none,
            the defaults, with blocks of 32 tokens for LLaDA2.x, as published.
        memory: likewise; None for a model that was trained without a memory.
        folder: where it is from.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    diffusion: DiffusionConfig
    memory: MemoryConfig | None
    folder: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.get_input_embeddings().weight.device

    @property
    def pad_token_id(self) -> int:
        """What fills a batch; it is never seen, so any token serves."""
        pad = self.tokenizer.pad_token_id
        return self.mask_token_id if pad is None else pad

    @property
    def max_length(self) -> int:
        """Positions that the model has."""
        return int(self.model.config.max_position_embeddings)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a response; empty where the model does not say."""
        configs = (getattr(self.model, "generation_config", None), self.model.config)
        known = [getattr(config, "eos_token_id", None) for config in configs]
        ids = next((i for i in (*known, self.tokenizer.eos_token_id) if i is not None), ())
        return tuple(ids) if isinstance(ids, list | tuple) else (ids,)


def read_config(folder: str) -> tuple[str, Any]:
    """What a model is, before any of its weights are read.

    Args:
        folder: as for `load_checkpoint`.

    Returns:
        The folder or hub name of the model, which for an adapter is its base, and its config.

    Raises:
        ValueError: it cannot be read.
    """
    base = folder
    try:
        if (Path(folder) / ADAPTER_FILE).is_file():
            base = str(PeftConfig.from_pretrained(folder).base_model_name_or_path)
        return base, AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {folder} cannot be read: {first_line(error)}") from error


def read_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name; an adapter without one has its base's.

    Raises:
        ValueError: it cannot be read.
    """
    own = (Path(folder) / "tokenizer_config.json").is_file()
    source = folder if own else read_config(folder)[0]
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer of {folder} cannot be read: {first_line(error)}") from error
    return tokenizer


def load_checkpoint(
    folder: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str = "sdpa",
    sdpa_backend: str = "auto",
    load_in_4bit: bool = False,
) -> Checkpoint:
    """Load a model for inference.

    Args:
        folder: what `memdlm train` or `memdlm convert` wrote (a model or a PEFT adapter), or any
            model of a known family, as a folder or a hub name.
        dtype: of the weights: "auto" is what they were saved in, or "float32", "bfloat16".
        device: where it goes, as PyTorch names it; None for the first GPU if there is one.
        attn_implementation: attention of transformers.
        sdpa_backend: see `set_sdpa_backend`.
        load_in_4bit: quantise the weights to NF4 (bitsandbytes).

    Returns:
        The checkpoint.

    Raises:
        ValueError: it cannot be read, is of another family, or has no mask token; a device that is
            not here, or has not that attention.
    """
    where = _device(device)
    check_sdpa_backend(sdpa_backend, where)
    method = _method(Path(folder) / METHOD_FILE)
    base, config = read_config(folder)
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model must be one of {', '.join(FAMILIES)}, got {folder}, whose model_type is "
            f"{config.model_type!r}"
        )
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if load_in_4bit:
        own = config.dtype or torch.float32
        options["quantization_config"] = four_bit_config(
            own if dtype == "auto" else getattr(torch, dtype)
        )
        options["device_map"] = {"": where}
    tokenizer = read_tokenizer(folder)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(base, **options)
        if base != folder:
            model = PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(f"model {folder} cannot be loaded: {first_line(error)}") from error
    if load_in_4bit:
        prepare_four_bit(model)
    else:
        model = model.to(where)
    set_sdpa_backend(model, sdpa_backend)
    mask = method.mask_token_id
    if mask is None:
        mask = known_mask_token(config, tokenizer)
    if mask is None:
        raise ValueError(f"{folder} has no mask token, in its config or its tokenizer")
    published = DiffusionConfig(block_size=PUBLISHED_BLOCK_SIZES.get(config.model_type))
    return Checkpoint(
        model.eval(), tokenizer, mask, method.diffusion or published, method.memory, folder
    )


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = ["cpu"]
    if torch.accelerator.is_available():
        accelerator: Any = torch.accelerator.current_accelerator()
        count = torch.accelerator.device_count()
        known += [accelerator.type, *(f"{accelerator.type}:{number}" for number in range(count))]
    if name not in known:
        raise ValueError(f"device must be one that is here, {', '.join(known)}, got {name!r}")
    return torch.device(name)


@dataclass(frozen=True)
class _Method:
    """What `memdlm.json` says of the method; None where it does not."""

    mask_token_id: int | None = None
    diffusion: DiffusionConfig | None = None
    memory: MemoryConfig | None = None


def _method(path: Path) -> _Method:
    if not path.is_file():
        return _Method()
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        _check_keys("it", said, _METHOD_KEYS)
        mask = said.get("mask_token_id")
        if mask is not None and (type(mask) is not int or mask < 0):
            raise ValueError(f"mask_token_id must be a whole number, at least 0, got {mask!r}")
        return _Method(
            mask, _config("diffusion", said, DiffusionConfig), _config("memory", said, MemoryConfig)
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error


def _config(name: str, said: dict[str, Any], kind: Any) -> Any:
    own = said.get(name)
    if own is None:
        return None
    _check_keys(name, own, [field.name for field in dataclasses.fields(kind)])
    return kind(**own)


def _check_keys(name: str, said: Any, known: Sequence[str]) -> None:
    if not isinstance(said, dict):
        raise ValueError(f"{name} must be a JSON object, got {said!r}")
    for key in said:
        if key not in known:
            raise ValueError(f"{name} must have no keys but {', '.join(known)}, got {key!r}")


def known_mask_token(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of the mask token that a model was trained with, if its files say so."""
    # LLaDA-8B's tokenizer does not; its config does.
    for known in (getattr(config, "mask_token_id", None), tokenizer.mask_token_id):
        if known is not None:
            return int(known)
    return None


def first_line(error: Exception) -> str:
    """What an error says, for a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@torch.no_grad()
def token_hidden(
    backbone: Backbone,
    input_ids: Tensor,
    positions: Tensor,
    attention_mask: Tensor | None = None,
    *,
    canvas_block: int | None = None,
) -> Tensor:
    """What the head reads for chosen tokens alone, under whatever memory is being read.

    Args:
        backbone: the model, with any boundary.
        input_ids: [B, L] int64, some of them masked.
        positions: [B, W] int64, the tokens that are predicted. Where the model's logits are those
            of the next token, the row before each is read.
        attention_mask: [B, L] bool, False for padding, or None.
        canvas_block: see `Backbone.context`.

    Returns:
        [B, W, D].
    """
    rows = (positions - 1).clamp_min(0) if backbone.right_shift_logits else positions
    context = backbone.context(input_ids, attention_mask, rows, canvas_block=canvas_block)
    every = torch.arange(rows.numel(), device=rows.device)
    start = backbone.prefix(input_ids, context)
    hidden = backbone.suffix(start, every, context, contextlib.nullcontext())  # [B * W, D]
    return hidden.unflatten(0, rows.shape)


@torch.no_grad()
def token_logits(
    backbone: Backbone,
    input_ids: Tensor,
    positions: Tensor,
    attention_mask: Tensor | None = None,
    *,
    canvas_block: int | None = None,
) -> Tensor:
    """Logits of chosen tokens alone, under whatever memory is being read.

    Replaces `model(input_ids, attention_mask).logits[:, positions]` without the [B, L, V] logits.

    Args:
        backbone, input_ids, positions, attention_mask, canvas_block: as for `token_hidden`.

    Returns:
        [B, W, V] in the model's dtype.
    """
    hidden = token_hidden(backbone, input_ids, positions, attention_mask, canvas_block=canvas_block)
    return nn.functional.linear(hidden, *backbone.head())
