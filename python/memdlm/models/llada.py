"""LLaDA: the dense decoder of LLaDA-8B."""

from typing import Any, ClassVar

from torch import nn
from transformers.core_model_loading import WeightRenaming

from memdlm.models.config import DecoderConfig
from memdlm.models.llada_moe import LLaDAMoEConfig
from memdlm.models.masked_lm import MaskedLM


class LLaDAConfig(DecoderConfig):
    """Config of LLaDA; the defaults are LLaDA-8B's.

    LLaDA-MoE carries the same model type: a dict of its config becomes a `LLaDAMoEConfig`.
    """

    model_type = "llada"
    known_architectures = ("LLaDAModelLM",)
    attribute_map: ClassVar = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "hidden_act": "activation_type",
        "tie_word_embeddings": "weight_tying",
        "initializer_range": "init_std",
    }
    computed: ClassVar = {
        "activation_type": ("silu",),
        "alibi": (False,),
        "attention_layer_norm": (False,),
        "block_group_size": (1,),
        "block_type": ("llama",),
        "embedding_dropout": (0.0,),
        "input_emb_norm": (False,),
        "layer_norm_type": ("rms",),
        "layer_norm_with_affine": (True,),
        "multi_query_attention": (None,),
        "residual_dropout": (0.0,),
        "rope": (True,),
        "scale_logits": (False,),
    }

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = 32
    mlp_ratio: int = 4
    mlp_hidden_size: int | None = 12288
    activation_type: str = "silu"
    vocab_size: int = 126464
    embedding_size: int | None = 126464
    max_sequence_length: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_full_precision: bool = True
    attention_dropout: float = 0.0
    include_bias: bool = False
    include_qkv_bias: bool = False
    bias_for_layer_norm: bool | None = False
    weight_tying: bool = False
    init_std: float = 0.02
    use_cache: bool = False
    mask_token_id: int | None = 126336
    pad_token_id: int | None = 126081
    eos_token_id: int | None = 126081

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A config of the family that `architectures` names.

        Raises:
            ValueError: it names none that is known.
        """
        names = config_dict.get("architectures") or []
        if set(names) & set(LLaDAMoEConfig.known_architectures):
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        if not set(names) & set(cls.known_architectures):
            known = cls.known_architectures + LLaDAMoEConfig.known_architectures
            raise ValueError(
                f"architectures of a config of type {cls.model_type!r} must be one of "
                f"{', '.join(known)}, got {names}"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def vocabulary_rows(self) -> int:
        return self.embedding_size or self.vocab_size

    @property
    def rotary_in_float32(self) -> bool:
        return self.rope_full_precision

    @property
    def query_key_value_bias(self) -> bool:
        return self.include_bias or self.include_qkv_bias

    @property
    def attention_output_bias(self) -> bool:
        return self.include_bias

    @property
    def ffn_bias(self) -> bool:
        return self.include_bias

    @property
    def logit_bias(self) -> bool:
        return self.include_bias and not self.weight_tying

    def check(self) -> None:
        super().check()
        if self.bias_for_layer_norm or (self.bias_for_layer_norm is None and self.include_bias):
            self.refuse(
                "bias_for_layer_norm", "False, for norms without bias", self.bias_for_layer_norm
            )
        if self.vocabulary_rows < self.vocab_size:
            self.refuse(
                "embedding_size", f"at least vocab_size {self.vocab_size}", self.embedding_size
            )


class LLaDAModelLM(MaskedLM):
    """LLaDA with its head."""

    config_class = LLaDAConfig

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in Hugging Face, which knows nothing of `embedding_size`."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = embedding.num_embeddings
        return embedding


_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def conversions() -> list[WeightRenaming]:
    """Published names to those of the modules."""
    return [
        WeightRenaming(r"model\.transformer\.wte\.", "model.embed_tokens."),
        WeightRenaming(r"model\.transformer\.ln_f\.", "model.norm."),
        WeightRenaming(r"model\.transformer\.ff_out\.", "lm_head."),
        *(
            WeightRenaming(
                rf"model\.transformer\.blocks\.(\d+)\.{published}\.", rf"model.layers.\1.{ours}."
            )
            for published, ours in _BLOCK.items()
        ),
    ]
