"""Plain forward passes of the backbones, one linear layer for each expert: truth, and a baseline.

Written from the published descriptions, for any dtype, without code of the package or of Hugging
Face's models. Bidirectional. Every family has the same module names, so that hooks find them.
"""

import math
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import nn


@dataclass
class Family:
    """What a config says, in one vocabulary."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_heads: int
    head_dim: int
    epsilon: float
    theta: float
    tied: bool
    dense_width: int
    rotary_dim: int
    rotary_in_float32: bool = False
    query_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    logit_bias: bool = False
    # What one norm of the queries spans: "head", "projection", or None.
    query_norm: str | None = None
    sparse: list[bool] = field(default_factory=list)
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    shared_width: int = 0
    expert_bias: bool = False
    route: str = "softmax"
    normalise: bool = False
    scaling: float = 1.0
    groups: int = 1
    top_groups: int = 1


def family_of(config):
    """Read a config of any family under the names that it was published with."""
    architecture = config.architectures[0]
    if architecture == "LLaDAModelLM":
        head_dim = config.d_model // config.n_heads
        return Family(
            vocabulary=config.embedding_size or config.vocab_size,
            hidden=config.d_model,
            layers=config.n_layers,
            heads=config.n_heads,
            key_heads=config.n_kv_heads or config.n_heads,
            head_dim=head_dim,
            epsilon=config.rms_norm_eps,
            theta=config.rope_theta,
            tied=config.weight_tying,
            dense_width=config.mlp_hidden_size or config.mlp_ratio * config.d_model,
            rotary_dim=head_dim,
            rotary_in_float32=config.rope_full_precision,
            query_bias=config.include_bias or config.include_qkv_bias,
            output_bias=config.include_bias,
            ffn_bias=config.include_bias,
            logit_bias=config.include_bias and not config.weight_tying,
            sparse=[False] * config.n_layers,
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    common = {
        "vocabulary": config.vocab_size,
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key_heads": config.num_key_value_heads,
        "head_dim": head_dim,
        "epsilon": config.rms_norm_eps,
        "tied": config.tie_word_embeddings,
    }
    if architecture == "DreamModel":
        return Family(
            **common,
            theta=config.rope_theta,
            dense_width=config.intermediate_size,
            rotary_dim=head_dim,
            query_bias=True,
            sparse=[False] * config.num_hidden_layers,
        )
    common |= {"experts": config.num_experts, "top_k": config.num_experts_per_tok}
    if architecture == "LLaDAMoEModelLM":
        return Family(
            **common,
            theta=config.rope_theta,
            dense_width=config.dense_intermediate_size,
            rotary_dim=int(head_dim * config.partial_rotary_factor),
            query_bias=config.attention_bias,
            output_bias=config.attention_bias,
            query_norm="head" if config.qk_layernorm else None,
            sparse=[bool(entry) for entry in config.moe_layer_freq],
            expert_width=config.expert_intermediate_size,
            shared_width=config.shared_expert_intermediate_size or 0,
            expert_bias=bool(config.moe_router_enable_expert_bias),
        )
    if architecture == "LLaDA2MoeModelLM":
        return Family(
            **common,
            theta=config.rope_theta,
            dense_width=config.intermediate_size,
            rotary_dim=int(head_dim * config.partial_rotary_factor),
            query_bias=config.use_qkv_bias,
            output_bias=config.use_bias,
            query_norm="head" if config.use_qk_norm else None,
            sparse=[i >= config.first_k_dense_replace for i in range(config.num_hidden_layers)],
            expert_width=config.moe_intermediate_size,
            shared_width=config.moe_intermediate_size * (config.num_shared_experts or 0),
            expert_bias=True,
            route="sigmoid",
            normalise=config.num_experts_per_tok > 1,
            scaling=config.routed_scaling_factor,
            groups=config.n_group,
            top_groups=config.topk_group,
        )
    assert architecture == "OlmoeForCausalLM", architecture
    return Family(
        **common,
        theta=config.rope_parameters["rope_theta"],
        dense_width=0,
        rotary_dim=head_dim,
        query_bias=config.attention_bias,
        output_bias=config.attention_bias,
        query_norm="projection",
        sparse=[True] * config.num_hidden_layers,
        expert_width=config.intermediate_size,
        normalise=config.norm_topk_prob,
    )


def wide(dtype):
    """The dtype of what is not left to half precision."""
    return torch.promote_types(dtype, torch.float32)


class Norm(nn.Module):
    """x / rms(x), then times a weight."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        y = x.to(wide(x.dtype))
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + self.epsilon)
        return self.weight * y.to(x.dtype)


def turn(heads, family, position=None):
    """Rotate element j of a head against j + rotary_dim / 2, by position * theta^(-2j / dim).

    Positions count from 0 where none are given.
    """
    half = family.rotary_dim // 2
    dtype = wide(heads.dtype)
    if position is None:
        position = torch.arange(heads.shape[-2], device=heads.device)
    frequency = torch.tensor(
        [family.theta ** (-2 * j / family.rotary_dim) for j in range(half)],
        device=heads.device,
        dtype=dtype,
    )
    angle = torch.outer(position.to(dtype), frequency)  # [L, half]
    compute = dtype if family.rotary_in_float32 else heads.dtype
    cos, sin = angle.cos().to(compute), angle.sin().to(compute)
    x, y, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    turned = torch.cat((x * cos - y * sin, y * cos + x * sin), dim=-1)
    return torch.cat((turned.to(heads.dtype), rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, family):
        super().__init__()
        self.family = family
        query, key = family.heads * family.head_dim, family.key_heads * family.head_dim
        self.q_proj = nn.Linear(family.hidden, query, bias=family.query_bias)
        self.k_proj = nn.Linear(family.hidden, key, bias=family.query_bias)
        self.v_proj = nn.Linear(family.hidden, key, bias=family.query_bias)
        self.o_proj = nn.Linear(query, family.hidden, bias=family.output_bias)
        if family.query_norm:
            spans_head = family.query_norm == "head"
            self.q_norm = Norm(family.head_dim if spans_head else query, family.epsilon)
            self.k_norm = Norm(family.head_dim if spans_head else key, family.epsilon)

    def split(self, projected, norm=None):
        """[B, L, D] to [B, H, L, head_dim], normed before or after the split."""
        if norm is not None and self.family.query_norm == "projection":
            projected = norm(projected)
        heads = projected.reshape(*projected.shape[:2], -1, self.family.head_dim)
        if norm is not None and self.family.query_norm == "head":
            heads = norm(heads)
        return heads.transpose(1, 2)

    def forward(self, x, attention_mask, position=None):
        norms = (self.q_norm, self.k_norm) if self.family.query_norm else (None, None)
        query = turn(self.split(self.q_proj(x), norms[0]), self.family, position)
        key = turn(self.split(self.k_proj(x), norms[1]), self.family, position)
        value = self.split(self.v_proj(x))
        group = self.family.heads // self.family.key_heads
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.family.head_dim)  # [B, H, L, L]
        if attention_mask is not None:
            scores = scores + attention_mask
        share = scores.softmax(-1, dtype=wide(scores.dtype)).to(value.dtype)
        return self.o_proj((share @ value).transpose(1, 2).reshape(*x.shape[:2], -1))


class FFN(nn.Module):
    def __init__(self, hidden, width, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x):
        gate = self.gate_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


def largest(scores, count):
    """Indices [N, count] of the largest scores of each row, one after another."""
    left = scores.clone()
    chosen = []
    for _ in range(count):
        chosen.append(left.argmax(-1))
        left.scatter_(1, chosen[-1][:, None], -math.inf)
    return torch.stack(chosen, dim=1)


class Router(nn.Module):
    def __init__(self, family):
        super().__init__()
        self.family = family
        self.weight = nn.Parameter(torch.zeros(family.experts, family.hidden))
        bias = torch.zeros(family.experts) if family.expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, rows):
        """Weights and indices of the chosen experts, each [N, k]."""
        route = self.softmax if self.family.route == "softmax" else self.sigmoid
        return route(rows)

    def softmax(self, rows):
        logits = rows @ self.weight.T
        scores = logits.to(wide(logits.dtype)).softmax(-1)
        if self.expert_bias is not None:
            scores = scores + self.expert_bias
        index = largest(scores.detach(), self.family.top_k)
        weights = scores.gather(1, index)
        if self.family.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(rows.dtype), index

    def sigmoid(self, rows):
        family, dtype = self.family, wide(rows.dtype)
        scores = torch.sigmoid(rows.to(dtype) @ self.weight.to(dtype).T)
        biased = (scores + self.expert_bias).detach()
        size = family.experts // family.groups
        groups = biased.split(size, dim=1)
        worth = torch.stack([group.topk(2).values.sum(-1) for group in groups], dim=1)
        best = largest(worth, family.top_groups)
        for number, group in enumerate(groups):
            group[(best != number).all(-1)] = -math.inf
        index = largest(biased, family.top_k)
        weights = scores.gather(1, index)
        if family.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * family.scaling, index


class SparseFFN(nn.Module):
    def __init__(self, family):
        super().__init__()
        self.gate = Router(family)
        self.experts = nn.ModuleList(
            FFN(family.hidden, family.expert_width) for _ in range(family.experts)
        )
        if family.shared_width:
            self.shared_experts = FFN(family.hidden, family.shared_width)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weights, index = self.gate(rows)
        output = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(index == number)
            result = expert(rows[row]) * weights[row, place, None]
            output.index_add_(0, row, result.to(rows.dtype))
        output = output.reshape(x.shape)
        return output + self.shared_experts(x) if hasattr(self, "shared_experts") else output


class Layer(nn.Module):
    def __init__(self, family, sparse):
        super().__init__()
        self.input_layernorm = Norm(family.hidden, family.epsilon)
        self.self_attn = Attention(family)
        self.post_attention_layernorm = Norm(family.hidden, family.epsilon)
        dense = FFN(family.hidden, family.dense_width, family.ffn_bias) if not sparse else None
        self.mlp = dense or SparseFFN(family)

    def forward(self, x, attention_mask, position=None):
        x = x + self.self_attn(self.input_layernorm(x), attention_mask, position)
        return x + self.mlp(self.post_attention_layernorm(x))


class Plain(nn.Module):
    """A masked language model.

    Args:
        config: of the model under test, with its published `architectures`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        family = family_of(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(family.vocabulary, family.hidden)
        self.model.layers = nn.ModuleList(Layer(family, sparse) for sparse in family.sparse)
        self.model.norm = Norm(family.hidden, family.epsilon)
        self.lm_head = nn.Linear(family.hidden, family.vocabulary, bias=family.logit_bias)
        if family.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self):
        return self.model.embed_tokens.weight.dtype

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        is_causal=False,
        use_cache=False,
    ):
        """Logits [B, L, V]; `attention_mask` is None or additive, [B, 1, L, L].

        Positions [1, L] count from 0 where none are given.
        """
        assert not is_causal
        x = self.model.embed_tokens(input_ids)
        position = None if position_ids is None else position_ids[0]
        for layer in self.model.layers:
            x = layer(x, attention_mask, position)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))


# Published name to ours, in the order in which they are tried.
_NAMES = {
    "LLaDAModelLM": [
        (r"^model\.transformer\.wte\.", "model.embed_tokens."),
        (r"^model\.transformer\.ln_f\.", "model.norm."),
        (r"^model\.transformer\.ff_out\.", "lm_head."),
        (r"^model\.transformer\.blocks\.", "model.layers."),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ff_norm\.", ".post_attention_layernorm."),
        (r"\.([qkv])_proj\.", r".self_attn.\1_proj."),
        (r"\.attn_out\.", ".self_attn.o_proj."),
        (r"\.ff_proj\.", ".mlp.gate_proj."),
        (r"\.up_proj\.", ".mlp.up_proj."),
        (r"\.ff_out\.", ".mlp.down_proj."),
    ],
    "LLaDAMoEModelLM": [
        (r"\.mlp\.expert_bias$", ".mlp.gate.expert_bias"),
        (r"\.shared_expert\.", ".mlp.shared_experts."),
    ],
    "LLaDA2MoeModelLM": [
        (r"^model\.word_embeddings\.", "model.embed_tokens."),
        (r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
        (r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
        (r"\.attention\.dense\.", ".self_attn.o_proj."),
    ],
}


def load_published(plain, state_dict):
    """Fill a plain model from the tensors of a published checkpoint, by their names.

    The dtypes of the plain model stay. Every tensor must have its place and every place a tensor.
    """
    family = family_of(plain.config)
    named = {}
    for name, tensor in state_dict.items():
        for pattern, ours in _NAMES.get(plain.config.architectures[0], ()):
            name = re.sub(pattern, ours, name)
        if ".attention.query_key_value." in name:
            key = family.key_heads * family.head_dim
            parts = tensor.split((family.heads * family.head_dim, key, key))
            for letter, part in zip("qkv", parts, strict=True):
                place = f".self_attn.{letter}_proj."
                named[name.replace(".attention.query_key_value.", place)] = part
        else:
            named[name] = tensor
    if family.tied:
        named.setdefault("lm_head.weight", named["model.embed_tokens.weight"])
    plain.load_state_dict(named)
    return plain
