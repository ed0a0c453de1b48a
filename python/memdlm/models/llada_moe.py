"""LLaDA-MoE: softmax routing over many small experts."""

from dataclasses import field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming

from memdlm.models.checkpoint import stack_experts
from memdlm.models.config import DecoderConfig
from memdlm.models.decoder import DenseFFN, Router, SparseFFN
from memdlm.models.masked_lm import MaskedLM


class LLaDAMoEConfig(DecoderConfig):
    """Config of LLaDA-MoE; the defaults are LLaDA-MoE-7B-A1B's.

    The model type is the dense LLaDA's: published configs differ in `architectures`.
    """

    model_type = "llada"
    known_architectures = ("LLaDAMoEModelLM", "LLaDAMoEModel")
    attribute_map: ClassVar = {
        "intermediate_size": "dense_intermediate_size",
        "moe_intermediate_size": "expert_intermediate_size",
    }
    computed: ClassVar = {
        "clip_qkv": (None,),
        "hidden_act": ("silu",),
        "moe_router_score_function": (None, "softmax"),
        # The published code never normalises; a config that says so is meant for other code.
        "norm_topk_prob": (None, False),
        "output_router_logits": (False,),
        "routed_scaling_factor": (1, None),
    }

    vocab_size: int = 157184
    hidden_size: int = 2048
    dense_intermediate_size: int = 8192
    expert_intermediate_size: int = 1024
    shared_expert_intermediate_size: int | None = None
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    partial_rotary_factor: float = 1.0
    attention_bias: bool = False
    attention_dropout: float = 0.0
    qk_layernorm: bool | None = True
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_layer_freq: list[int] = field(default_factory=lambda: [1] * 16)
    moe_router_enable_expert_bias: bool | None = False
    tie_word_embeddings: bool = False
    use_cache: bool = False
    mask_token_id: int | None = 156895
    pad_token_id: int | None = 156892
    eos_token_id: int | None = 156892

    @property
    def head_norm(self) -> bool:
        return bool(self.qk_layernorm)

    @property
    def query_key_value_bias(self) -> bool:
        return self.attention_bias

    @property
    def attention_output_bias(self) -> bool:
        return self.attention_bias

    def check(self) -> None:
        super().check()
        if len(self.moe_layer_freq) != self.num_hidden_layers:
            self.refuse(
                "moe_layer_freq",
                f"a list with an entry for each of the {self.num_hidden_layers} layers",
                self.moe_layer_freq,
            )
        if not 0 < self.num_experts_per_tok <= self.num_experts:
            self.refuse(
                "num_experts_per_tok",
                f"in [1, num_experts = {self.num_experts}]",
                self.num_experts_per_tok,
            )


class SoftmaxRouter(Router):
    """The k largest of a softmax over all experts, which do not sum to one."""

    def __init__(self, config: LLaDAMoEConfig) -> None:
        super().__init__(config, has_expert_bias=bool(config.moe_router_enable_expert_bias))
        self.top_k = config.num_experts_per_tok

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(rows, self.weight)
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores = logits.softmax(dim=-1, dtype=wide)
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        weights, index = scores.topk(self.top_k, dim=-1)
        return logits, weights.to(rows.dtype), index


class LLaDAMoEModelLM(MaskedLM):
    """LLaDA-MoE with its head."""

    config_class = LLaDAMoEConfig

    def make_ffn(self, layer: int) -> nn.Module:
        config: Any = self.config
        if config.moe_layer_freq[layer] == 0:
            return DenseFFN(config.hidden_size, config.dense_intermediate_size)
        shared_width = config.shared_expert_intermediate_size or 0
        return SparseFFN(config, SoftmaxRouter(config), shared_width)


def conversions() -> list[WeightRenaming | WeightConverter]:
    """Published names to those of the modules."""
    return [
        WeightRenaming(r"\.mlp\.expert_bias", ".mlp.gate.expert_bias"),
        WeightRenaming(r"\.shared_expert\.", ".mlp.shared_experts."),
        *stack_experts(),
    ]
