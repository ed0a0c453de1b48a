"""`memdlm convert`: a causal language model made ready for training as a masked diffusion one.

The weights stay as they are, but for the mask token's row. What changes is what the folder says:

- `mask_token` of the tokenizer and `mask_token_id` of the config.
- `is_causal: false`. With it `AutoModelForCausalLM.from_pretrained(folder)(input_ids)` attends in
  both directions, padded or not, with sdpa and with eager attention; nothing needs to be passed.
  transformers reads it from 5.2 on: older versions attend causally without a word. It is read in
  the model's forward, so who calls single layers passes `is_causal=False`, as `Backbone` does.
- `use_cache: false`: what a later token changes cannot be cached.
- `right_shift_logits`: whether the logits of a position are those of the next token. A forward of
  transformers does not know this key: its logits are never shifted.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerBase,
)

from memdlm.backbone import Backbone

# Those of Backbone's families that start out causal.
CAUSAL_FAMILIES = ("llama", "qwen2", "qwen3", "olmoe")
MASK_TOKEN = "<|mask|>"


@dataclass(frozen=True)
class ConvertOptions:
    """What `memdlm convert` is told.

    Attributes:
        model: local folder or hub name of a causal language model.
        output_dir: folder to save to; new or empty.
        mask_token: the mask token, one of the tokenizer's special tokens or a new one; if not
            given, the tokenizer's own, else "<|mask|>".
        mask_token_id: instead, the id of a special token that serves.
        right_shift_logits: true: position i predicts token i + 1, as the causal model did (Dream,
            DiffuLLaMA); false: position i predicts token i (LLaDA).
        dtype: of the saved weights; "auto" is what they were saved in.
        gguf_file: name of a GGUF file in `model` to read everything from; it is dequantised.

    Raises:
        ValueError: both `mask_token` and `mask_token_id`.
    """

    model: str
    output_dir: str
    mask_token: str | None = None
    mask_token_id: int | None = None
    right_shift_logits: bool = True
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    gguf_file: str | None = None

    def __post_init__(self) -> None:
        if self.mask_token is not None and self.mask_token_id is not None:
            raise ValueError("mask_token would not be read: mask_token_id is given")


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        options: as given.
        mask_token, mask_token_id: which token it is.
        added: whether the tokenizer did not have it before.
        shape_before, shape: of the embedding, [V, D].
        tied: whether the head is the embedding.
    """

    options: ConvertOptions
    mask_token: str
    mask_token_id: int
    added: bool
    shape_before: tuple[int, int]
    shape: tuple[int, int]
    tied: bool

    def __str__(self) -> str:
        how = "added to the tokenizer" if self.added else "was in the tokenizer"
        before, now = ("{} x {}".format(*shape) for shape in (self.shape_before, self.shape))
        rows = now if before == now else f"{before} -> {now}"
        shifted = self.options.right_shift_logits
        predicts = "the next token" if shifted else "its own token"
        return "\n".join(
            [
                f"mask token: {self.mask_token}, id {self.mask_token_id}, {how}",
                f"embedding:  {rows}, {'tied to' if self.tied else 'apart from'} the head",
                "attention:  in both directions (is_causal false)",
                f"logits:     of {predicts} (right_shift_logits {str(shifted).lower()})",
                f"saved to:   {self.options.output_dir}",
            ]
        )


def convert(options: ConvertOptions) -> Conversion:
    """Load a causal language model, give it a mask token, and save it as a bidirectional one.

    A token that is new to the tokenizer takes the first free row of the embedding, which grows
    where there is none. Its row, there and in an untied head, becomes the mean of the rows before.

    Args:
        options: see `ConvertOptions`.

    Returns:
        What was done.

    Raises:
        ValueError: an output folder that is not empty or cannot be written, a model or tokenizer
            that cannot be read, or that `Backbone` cannot split, or that is not causal; a mask
            token that is ordinary text or has another role already. Nothing is saved then.
    """
    _prepare_folder(options.output_dir)
    _check_config(options)
    tokenizer = _load(AutoTokenizer, options)
    token, added = _choose_mask_token(options, tokenizer)
    if token != tokenizer.mask_token:
        tokenizer.add_special_tokens({"mask_token": token})
    mask_token_id: int = tokenizer.mask_token_id

    # A model that transformers kept in GGUF's blocks could not be saved.
    dense = {"quantization_config": GgufConfig(dequantize=True)} if options.gguf_file else {}
    model = _load(AutoModelForCausalLM, options, dtype=options.dtype, **dense)
    embedding = model.get_input_embeddings().weight
    shape_before = (embedding.shape[0], embedding.shape[1])
    if added or mask_token_id >= shape_before[0]:
        _write_row(model, mask_token_id)
    model.config.is_causal = False
    model.config.use_cache = False
    model.config.mask_token_id = mask_token_id
    model.config.right_shift_logits = options.right_shift_logits
    tokenizer.save_pretrained(options.output_dir)
    model.save_pretrained(options.output_dir)
    return Conversion(
        options=options,
        mask_token=token,
        mask_token_id=mask_token_id,
        added=added,
        shape_before=shape_before,
        shape=(model.config.vocab_size, shape_before[1]),
        tied=bool(model.config.tie_word_embeddings),
    )


def _prepare_folder(output_dir: str) -> None:
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ValueError(
                f"output_dir must be new or empty, got {output_dir}, which holds files"
            )
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {output_dir} cannot be written: {error.strerror}") from error


def _check_config(options: ConvertOptions) -> None:
    """Look at the model without its weights."""
    config = _load(AutoConfig, options)
    if config.model_type not in CAUSAL_FAMILIES:
        raise ValueError(
            f"model must be a causal decoder, one of {', '.join(CAUSAL_FAMILIES)}, got "
            f"{options.model}, whose model_type is {config.model_type!r}"
        )
    if not getattr(config, "is_causal", True):
        raise ValueError(f"model must be causal, got {options.model}, which was converted already")
    with torch.device("meta"):
        Backbone(AutoModelForCausalLM.from_config(config))


def _load(kind: Any, options: ConvertOptions, **extra: Any) -> Any:
    """`kind.from_pretrained`, from the GGUF file if there is one."""
    if options.gguf_file is not None:
        extra["gguf_file"] = options.gguf_file
    try:
        return kind.from_pretrained(options.model, **extra)
    except (OSError, ValueError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model {options.model} cannot be read: {reason}") from error


def _choose_mask_token(
    options: ConvertOptions, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, bool]:
    """The mask token, and whether it is new to the tokenizer."""
    vocabulary = tokenizer.get_vocab()
    key, token = "mask_token", options.mask_token or tokenizer.mask_token or MASK_TOKEN
    if options.mask_token_id is not None:
        key = "mask_token_id"
        by_id = {index: token for token, index in vocabulary.items()}
        if options.mask_token_id not in by_id:
            raise ValueError(
                f"mask_token_id must be the id of a token of {options.model}, got "
                f"{options.mask_token_id}"
            )
        token = by_id[options.mask_token_id]
    if token == tokenizer.mask_token:
        return token, False
    if token not in vocabulary:
        return token, True
    if vocabulary[token] not in tokenizer.added_tokens_decoder:
        raise ValueError(
            f"{key} must be a special token or a new one, got {token!r}, which is ordinary text to "
            f"the tokenizer of {options.model}"
        )
    roles = [role for role, own in tokenizer.special_tokens_map.items() if own == token]
    if roles:
        raise ValueError(
            f"{key} must have no other role, got {token!r}, the {roles[0]} of {options.model}"
        )
    return token, False


@torch.no_grad()
def _write_row(model: Any, row: int) -> None:
    """Make a row of embedding and head the mean of those before, and both long enough for it."""
    old_rows = model.get_input_embeddings().weight.shape[0]
    if row >= old_rows:
        model.resize_token_embeddings(row + 1, mean_resizing=False)
    first = min(row, old_rows)
    weights: list[Tensor] = [model.get_input_embeddings().weight]
    if not model.config.tie_word_embeddings:
        weights.append(model.get_output_embeddings().weight)
    for weight in weights:
        weight[first : row + 1] = weight[:first].mean(0, dtype=torch.float32)
