"""A trained model as inference needs it: loaded with what it was trained with, and its logits."""

import contextlib
import json
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


@dataclass(frozen=True)
class Checkpoint:
    """A model and its method.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: saved with it, or with its base.
        mask_token_id: of the mask token.
        diffusion: what it was trained with; the defaults where the folder does not say.
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


def load_checkpoint(
    folder: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str = "sdpa",
    load_in_4bit: bool = False,
) -> Checkpoint:
    """Load a model for inference.

    Args:
        folder: what `memdlm train` or `memdlm convert` wrote (a model or a PEFT adapter), or any
            model of a known family, as a folder or a hub name.
        dtype: of the weights: "auto" is what they were saved in, or "float32", "bfloat16".
        device: where it goes; None for the first GPU if there is one.
        attn_implementation: attention of transformers.
        load_in_4bit: quantise the weights to NF4 (bitsandbytes).

    Returns:
        The checkpoint.

    Raises:
        ValueError: it cannot be read, is of another family, or has no mask token.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(folder)
    is_adapter = (path / "adapter_config.json").is_file()
    try:
        base = folder
        if is_adapter:
            base = str(PeftConfig.from_pretrained(folder).base_model_name_or_path)
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {folder} cannot be read: {first_line(error)}") from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model must be one of {', '.join(FAMILIES)}, got {folder}, whose model_type is "
            f"{config.model_type!r}"
        )
    method = _method(path)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if load_in_4bit:
        own = config.dtype or torch.float32
        options["quantization_config"] = four_bit_config(
            own if dtype == "auto" else getattr(torch, dtype)
        )
        options["device_map"] = {"": torch.device(device)}
    try:
        has_tokenizer = (path / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder if has_tokenizer else base)
        model: Any = AutoModelForCausalLM.from_pretrained(base, **options)
        if is_adapter:
            model = PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(f"model {folder} cannot be loaded: {first_line(error)}") from error
    if load_in_4bit:
        prepare_four_bit(model)
    else:
        model = model.to(device)
    mask = method.get("mask_token_id", known_mask_token(config, tokenizer))
    if mask is None:
        raise ValueError(f"{folder} has no mask token, in its config or its tokenizer")
    memory = method.get("memory")
    return Checkpoint(
        model.eval(),
        tokenizer,
        mask,
        DiffusionConfig(**method.get("diffusion", {})),
        None if memory is None else MemoryConfig(**memory),
        folder,
    )


def _method(folder: Path) -> dict[str, Any]:
    path = folder / METHOD_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


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
def token_logits(
    backbone: Backbone,
    input_ids: Tensor,
    positions: Tensor,
    attention_mask: Tensor | None = None,
    *,
    clean_ids: Tensor | None = None,
    canvas_block: int | None = None,
) -> Tensor:
    """Logits of chosen tokens alone, under whatever memory is being read.

    Replaces `model(input_ids, attention_mask).logits[:, positions]` without the [B, L, V] logits.

    Args:
        backbone: the model, with any boundary.
        input_ids: [B, L] int64, some of them masked.
        positions: [B, W] int64, the tokens that are predicted. Where the model's logits are those
            of the next token, the row before each is read.
        attention_mask: [B, L] bool, False for padding, or None.
        clean_ids: [B, L] int64, for a backbone with a block size: what earlier blocks hold.
        canvas_block: for one without: see `Backbone.context`.

    Returns:
        [B, W, V] in the model's dtype.
    """
    rows = (positions - 1).clamp_min(0) if backbone.right_shift_logits else positions
    context = backbone.context(input_ids, attention_mask, rows, canvas_block=canvas_block)
    every = torch.arange(rows.numel(), device=rows.device)
    start = backbone.prefix(input_ids, context, clean_ids)
    hidden = backbone.suffix(start, every, context, contextlib.nullcontext())  # [B * W, D]
    weight, bias = backbone.head()
    return nn.functional.linear(hidden, weight, bias).unflatten(0, rows.shape)
