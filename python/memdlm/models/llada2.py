"""LLaDA2.0 and LLaDA2.1: sigmoid routing in groups, a shared expert, partial rotary embedding."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.core_model_loading import WeightConverter, WeightRenaming

from memdlm.models.checkpoint import SplitQueryKeyValue, stack_experts
from memdlm.models.config import DecoderConfig
from memdlm.models.decoder import DenseFFN, Router, SparseFFN
from memdlm.models.masked_lm import MaskedLM


class LLaDA2MoeConfig(DecoderConfig):
    """Config of LLaDA2.x; the defaults are LLaDA2.0-mini's."""

    model_type = "llada2_moe"
    known_architectures = ("LLaDA2MoeModelLM",)
    computed: ClassVar = {
        "embedding_dropout": (0.0,),
        "hidden_act": ("silu",),
        "moe_router_enable_expert_bias": (True,),
        "norm_head": (False,),
        "norm_softmax": (False,),
        "norm_topk_prob": (True,),
        "output_dropout": (0.0,),
        "output_router_logits": (False,),
        "router_dtype": ("fp32",),
        "score_function": ("sigmoid",),
        "use_rmsnorm": (True,),
        "use_sliding_window": (False,),
        "using_split_qkv_in_self_attention": (False,),
    }

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 20
    first_k_dense_replace: int = 1
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    head_dim: int | None = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 16384
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 600000.0
    partial_rotary_factor: float = 0.5
    rotary_dim: int | None = None
    use_qkv_bias: bool = False
    use_bias: bool = False
    use_qk_norm: bool = True
    attention_dropout: float = 0.0
    num_experts: int = 256
    num_experts_per_tok: int = 8
    num_shared_experts: int | None = 1
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    tie_word_embeddings: bool = False
    use_cache: bool = False
    mask_token_id: int | None = 156895
    pad_token_id: int | None = 156892

    @property
    def head_norm(self) -> bool:
        return self.use_qk_norm

    @property
    def query_key_value_bias(self) -> bool:
        return self.use_qkv_bias

    @property
    def attention_output_bias(self) -> bool:
        return self.use_bias

    def check(self) -> None:
        super().check()
        if self.rotary_dim not in (None, self.rotary_width):
            self.refuse(
                "rotary_dim",
                f"partial_rotary_factor of a head, {self.rotary_width}",
                self.rotary_dim,
            )
        group_size, rest = divmod(self.num_experts, max(self.n_group, 1))
        if self.n_group < 1 or rest or group_size < 2:
            self.refuse(
                "n_group",
                f"such that {self.num_experts} experts form groups of 2 or more",
                self.n_group,
            )
        if not 0 < self.topk_group <= self.n_group:
            self.refuse("topk_group", f"in [1, n_group = {self.n_group}]", self.topk_group)
        reachable = self.topk_group * group_size
        if not 0 < self.num_experts_per_tok <= reachable:
            self.refuse(
                "num_experts_per_tok",
                f"in [1, {reachable}], the experts of topk_group groups",
                self.num_experts_per_tok,
            )


class GroupedSigmoidRouter(Router):
    """Sigmoid scores; k experts of the best groups, chosen with a bias and weighted without it."""

    def __init__(self, config: LLaDA2MoeConfig) -> None:
        super().__init__(config, has_expert_bias=True)
        self.top_k = config.num_experts_per_tok
        self.groups = config.n_group
        self.top_groups = config.topk_group
        self.scaling = config.routed_scaling_factor

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(rows.dtype, torch.float32)
        logits = F.linear(rows.to(wide), self.weight.to(wide))
        scores = logits.sigmoid()
        biased = (scores + self.expert_bias).unflatten(-1, (self.groups, -1))  # [N, G, E / G]
        # A group is as good as its two best experts.
        group_scores = biased.topk(2, dim=-1).values.sum(-1)
        best = group_scores.topk(self.top_groups, dim=-1).indices
        outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, best, False)
        eligible = biased.masked_fill(outside[..., None], float("-inf")).flatten(1)
        index = eligible.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, index)
        if self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return logits, weights * self.scaling, index


class LLaDA2MoeModelLM(MaskedLM):
    """LLaDA2.x with its head."""

    config_class = LLaDA2MoeConfig

    def make_ffn(self, layer: int) -> nn.Module:
        config: Any = self.config
        if layer < config.first_k_dense_replace:
            return DenseFFN(config.hidden_size, config.intermediate_size)
        shared_width = config.moe_intermediate_size * (config.num_shared_experts or 0)
        return SparseFFN(config, GroupedSigmoidRouter(config), shared_width)


def conversions() -> list[WeightRenaming | WeightConverter]:
    """Published names to those of the modules."""
    return [
        WeightRenaming(r"model\.word_embeddings\.", "model.embed_tokens."),
        WeightRenaming(r"\.attention\.dense\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
        WeightRenaming(r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
        WeightConverter(
            "attention.query_key_value",
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            operations=[SplitQueryKeyValue()],
        ),
        *stack_experts(),
    ]
