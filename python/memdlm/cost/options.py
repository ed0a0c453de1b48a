"""What `memdlm plan` is told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig

import memdlm.models  # noqa: F401 - its families become known to AutoConfig
from memdlm.cost.flops import Training
from memdlm.models.published import PUBLISHED

DEFAULT_LORA_RANK = 32


@dataclass(frozen=True)
class PlanOptions:
    """What `memdlm plan` is told.

    Attributes:
        model: a published shape (LLaDA-8B, LLaDA-MoE-7B-A1B, LLaDA2.x-mini, Dream-7B,
            SmolLM2-135M), or a folder with a config.json; weights are not read.
        batch_size: sequences of one step, at least 1; --batch for short.
        length: tokens of a sequence, at least 2.
        prompt: share of each sequence that is prompt, never masked, in [0, 1).
        k: inner steps, at least 1.
        outer: "full" trains every weight, "lora" a LoRA on attention and FFN, experts too,
            "lora_attention" one on the attention alone.
        lora_rank: rank of that LoRA, at least 1; 32 if not given.
        gradient_checkpointing: recompute each layer's activations in backward.
        dtype: of the weights.
        prefix_reuse: as for `memdlm train`; what the levers are compared with.
        memory_gib: say whether a step fits into so much; above 0.

    Raises:
        ValueError: an option outside its range, or one that would not be read.
    """

    model: str
    batch_size: int = 1
    length: int = 4096
    prompt: float = 0.9
    k: int = 2
    outer: Literal["lora", "lora_attention", "full"] = "lora"
    lora_rank: int | None = None
    gradient_checkpointing: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    prefix_reuse: Literal["none", "prompt_kv"] = "none"
    memory_gib: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("length", 2), ("k", 1), ("lora_rank", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= self.prompt < 1:
            raise ValueError(f"prompt must be in [0, 1), got {self.prompt}")
        if self.prefix_reuse != "none" and self.k == 1:
            raise ValueError(
                "prefix_reuse would not be read: with k 1 the anchor is the only state"
            )
        if self.memory_gib is not None and not self.memory_gib > 0:
            raise ValueError(f"memory_gib must be above 0, got {self.memory_gib}")
        if self.outer == "full" and self.lora_rank is not None:
            raise ValueError("lora_rank would not be read: outer is 'full'")

    @property
    def maskable(self) -> int:
        """Tokens of each sequence that may be masked."""
        return self.length - int(self.prompt * self.length)

    @property
    def training(self) -> Training:
        """What is trained."""
        rank = DEFAULT_LORA_RANK if self.lora_rank is None else self.lora_rank
        return Training(self.outer, rank, self.gradient_checkpointing)


def load_config(model: str) -> Any:
    """The Hugging Face config of a published name or a folder.

    Args:
        model: see `PlanOptions`.

    Raises:
        ValueError: neither, or a config that cannot be read.
    """
    names = {name.lower(): name for name in PUBLISHED}
    if model.lower() in names:
        return PUBLISHED[names[model.lower()]]()
    if not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"model must be one of {', '.join(PUBLISHED)}, or a folder with a config.json, "
            f"got {model!r}"
        )
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except OSError as error:
        raise ValueError(f"model {model} has a config.json that cannot be read: {error}") from error
