"""A decoder's widths, read from its config: all that its matrix products depend on."""

from dataclasses import dataclass
from typing import Any

from memdlm.backbone import FAMILIES


@dataclass(frozen=True)
class FFN:
    """The FFN of one layer.

    Attributes:
        width: I of the dense FFN, or of the shared experts together; 0 where there is none.
        experts: E, 0 in a dense layer.
        chosen: k, experts of each token.
        expert_width: I of one expert.
    """

    width: int
    experts: int = 0
    chosen: int = 0
    expert_width: int = 0


@dataclass(frozen=True)
class DecoderShape:
    """A decoder with its head.

    Attributes:
        hidden: D.
        vocabulary: V, the rows of the head.
        heads: of the queries.
        key_heads: of the keys and of the values.
        head_width: of one head.
        layers: the FFN of each layer.
        right_shift_logits: whether the logits of a position are those of the next token.
        gate_up_lora_ranks: how many times its rank an outer LoRA has on stacked gate and up
            projections: PEFT gives each its own in models of transformers.
    """

    hidden: int
    vocabulary: int
    heads: int
    key_heads: int
    head_width: int
    layers: tuple[FFN, ...]
    right_shift_logits: bool
    gate_up_lora_ranks: int

    @classmethod
    def of(cls, config: Any) -> "DecoderShape":
        """Read a Hugging Face config.

        Args:
            config: of one of the families that `Backbone` takes.

        Raises:
            ValueError: another family.
        """
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"model must be one of {', '.join(FAMILIES)}, got model_type {config.model_type!r}"
            )
        heads = config.num_attention_heads
        return cls(
            hidden=config.hidden_size,
            vocabulary=getattr(config, "vocabulary_rows", config.vocab_size),
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            layers=tuple(_ffn(config, layer) for layer in range(config.num_hidden_layers)),
            right_shift_logits=bool(getattr(config, "right_shift_logits", False)),
            gate_up_lora_ranks=2 if config.model_type == "olmoe" else 1,
        )


def _ffn(config: Any, layer: int) -> FFN:
    if not _is_sparse(config, layer):
        return FFN(config.intermediate_size)
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)  # OLMoE has no other
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    shared += width * (getattr(config, "num_shared_experts", None) or 0)
    return FFN(shared, config.num_experts, config.num_experts_per_tok, width)


def _is_sparse(config: Any, layer: int) -> bool:
    if not getattr(config, "num_experts", None):
        return False
    if hasattr(config, "moe_layer_freq"):
        return bool(config.moe_layer_freq[layer])
    return layer >= getattr(config, "first_k_dense_replace", 0)
