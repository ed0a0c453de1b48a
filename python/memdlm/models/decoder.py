"""The decoder of every family: attention that sees both sides, and a dense or a sparse FFN.

Modules have the names that Llama gave them, whatever a family's checkpoints call them, so that
adapters and the split of the decoder need to know one set of names.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from memdlm.models.config import DecoderConfig
from memdlm.models.rotary import RotaryEmbedding, rotate


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values, never causal."""

    is_causal = False

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_width
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        hidden, bias = config.hidden_size, config.query_key_value_bias
        query = config.num_attention_heads * self.head_dim
        key = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, query, bias=bias)
        self.k_proj = nn.Linear(hidden, key, bias=bias)
        self.v_proj = nn.Linear(hidden, key, bias=bias)
        self.o_proj = nn.Linear(query, hidden, bias=config.attention_output_bias)
        eps = config.rms_norm_eps
        self.q_norm = LlamaRMSNorm(self.head_dim, eps) if config.head_norm else None
        self.k_norm = LlamaRMSNorm(self.head_dim, eps) if config.head_norm else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        is_causal: bool = False,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend through the attention implementation of the config.

        Args:
            hidden_states: [B, L, D].
            position_embeddings: cos and sin, each [1 or B, L, rotary_width].
            attention_mask: what that implementation takes, or None.
            is_causal: must be false.
            past_key_values: as transformers' attentions call a cache: its `update` is handed the
                keys and values, each [B, H_kv, L, head_dim], and returns those attended to.
            kwargs: for the implementation.

        Returns:
            [B, L, D], and the attention weights where the implementation gives them.

        Raises:
            ValueError: `is_causal`.
        """
        if is_causal:
            raise ValueError("is_causal must be False: every token sees both sides, got True")
        cos, sin = (part[:, None] for part in position_embeddings)
        key = rotate(self._heads(self.k_proj, hidden_states, self.k_norm), cos, sin)
        value = self._heads(self.v_proj, hidden_states, None)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attend(
            self,
            rotate(self._heads(self.q_proj, hidden_states, self.q_norm), cos, sin),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=False,
            **kwargs,
        )
        return self.o_proj(attended.flatten(2)), weights

    def _heads(self, projection: nn.Module, hidden: Tensor, norm: nn.Module | None) -> Tensor:
        """[B, L, D] to [B, H, L, head_dim]."""
        heads = projection(hidden).unflatten(-1, (-1, self.head_dim))
        return (heads if norm is None else norm(heads)).transpose(1, 2)


class DenseFFN(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Router(nn.Module):
    """Chooses experts; each family has its own `forward`.

    Args:
        config: gives the number of experts.
        has_expert_bias: whether a bias is added to the scores that decide who is chosen.
    """

    expert_bias: Any

    def __init__(self, config: Any, has_expert_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if has_expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route rows.

        Args:
            rows: [N, D].

        Returns:
            Logits [N, E]; weights [N, k] of the chosen experts; their indices [N, k] int64.
        """
        raise NotImplementedError


class SparseFFN(nn.Module):
    """The chosen experts of each token, weighted, and the experts that all tokens share.

    The experts' weights are stacked, [E, 2 * I, D] and [E, D, I], and run by the experts
    implementation of the config: one grouped product, or a loop.
    """

    def __init__(self, config: Any, router: Router, shared_width: int) -> None:
        super().__init__()
        self.gate = router
        self.experts = Qwen3MoeExperts(config)
        self.shared_experts = DenseFFN(config.hidden_size, shared_width) if shared_width else None

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.flatten(0, -2)
        _, weights, index = self.gate(rows)
        output = self.experts(rows, index, weights).view_as(hidden)
        return output if self.shared_experts is None else output + self.shared_experts(hidden)


class DecoderLayer(GradientCheckpointingLayer):
    """h + attention(norm(h)), then h + ffn(norm(h))."""

    def __init__(self, config: DecoderConfig, ffn: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ffn

    def forward(self, hidden: Tensor, **attention: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden), **attention)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Decoder(nn.Module):
    """From tokens to the normed hidden state.

    Args:
        config: see `DecoderConfig`.
        make_ffn: the FFN of the layer with this index.
    """

    def __init__(self, config: DecoderConfig, make_ffn: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.config = config
        # No padding row: the padding token often also ends a text, and that embedding is trained.
        self.embed_tokens = nn.Embedding(config.vocabulary_rows, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, make_ffn(index)) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Run every layer; the arguments are those of `MaskedLM.forward`.

        Returns:
            [B, L, D], after the last norm.

        Raises:
            ValueError: both or none of the inputs, a mask that the attention cannot take.
        """
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"one of input_ids and inputs_embeds must be given, got {got}")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self.rotary_emb(hidden, position_ids)
        mask = self._mask(attention_mask, hidden)
        for layer in self.layers:
            hidden = layer(
                hidden, position_embeddings=rotary, attention_mask=mask, is_causal=is_causal
            )
        return self.norm(hidden)

    def _mask(self, attention_mask: Any, hidden: Tensor) -> Any:
        """What the attention implementation takes; None, its fastest path, where all is seen."""
        if attention_mask is None:
            return None
        implementation = self.config._attn_implementation
        if attention_mask.ndim == 4 and implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"attention_mask must be [B, L] for attention implementation {implementation!r}, "
                f"got shape {tuple(attention_mask.shape)}"
            )
        if attention_mask.ndim == 4 and attention_mask.dtype == torch.bool:
            additive = torch.zeros(attention_mask.shape, dtype=hidden.dtype, device=hidden.device)
            return additive.masked_fill(~attention_mask, torch.finfo(hidden.dtype).min)
        return create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=attention_mask
        )
