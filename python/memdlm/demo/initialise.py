"""Weights to start the demo's base from, with which copying is learned in minutes on a CPU.

A small model stays on a plateau for millions of tokens before induction heads form (Olsson et al.,
arXiv 2209.11895): more than a CPU trains on in an hour. Initial weights with the structure of a
trained model shorten that, as in mimetic initialisation (Trockman and Kolter, arXiv 2305.09828).
Here they are a rough pair of such heads. Every weight is trained afterwards.
"""

import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

# What each head of the first layer looks at, relative to its own position.
OFFSETS = (-2, -3, -1, 1)
# How many of these heads have a slot of the residual stream to write to.
SLOTS = 2
EMBEDDING_STD = 0.06
POSITION_SCALE = 7.0
SLOT_SCALE = 2.0
MATCH_SCALE = 0.75
# Pairs of channels that rotary embedding turns too fast to compare tokens far apart.
FAST_PAIRS = 12


def _write_neighbours(attention: LlamaAttention, frequency: torch.Tensor) -> None:
    """Head h attends to OFFSETS[h], by its biases; the first two write that token to a slot."""
    # A constant key and a query turned by the offset: their product peaks at that distance.
    key = torch.cat([torch.ones_like(frequency), torch.zeros_like(frequency)])
    query = [torch.cat([torch.cos(o * frequency), torch.sin(o * frequency)]) for o in OFFSETS]
    attention.k_proj.bias.copy_(POSITION_SCALE * key.repeat(len(OFFSETS)))
    attention.q_proj.bias.copy_(POSITION_SCALE * torch.cat(query))
    torch.nn.init.orthogonal_(attention.v_proj.weight)
    written = SLOTS * 2 * len(frequency)
    attention.o_proj.weight.zero_()
    attention.o_proj.weight[-written:, :written] = SLOT_SCALE * EMBEDDING_STD * torch.eye(written)


def _copy_where_neighbours_match(attention: LlamaAttention, head_dim: int) -> None:
    """Head h attends to tokens whose slot h is like its own, and copies their embedding."""
    slow = (torch.arange(head_dim // 2) >= FAST_PAIRS).float().repeat(2)
    slow *= (head_dim / slow.sum()).sqrt()
    read = SLOTS * head_dim
    attention.q_proj.weight.zero_()
    attention.q_proj.weight[:read, -read:] = MATCH_SCALE * torch.diag(slow.repeat(SLOTS))
    attention.k_proj.weight.copy_(attention.q_proj.weight)
    basis = torch.nn.init.orthogonal_(torch.empty(read, read))
    attention.v_proj.weight.zero_()
    attention.v_proj.weight[:, :read] = basis.repeat(2, 1)
    attention.o_proj.weight.copy_(attention.v_proj.weight.T)


@torch.no_grad()
def initialise_for_copying(model: LlamaForCausalLM) -> None:
    """Set the embedding and the attention of a new model so that it begins to copy.

    The first half of the residual stream carries a token's embedding, the second half those of two
    neighbours, collected by layer 0. Layer 1 finds places with the same neighbour and copies the
    token there. Later layers start as the identity.

    Args:
        model: with `attention_bias`, tied embeddings, two layers or more, and four heads.

    Raises:
        ValueError: the model has another shape.
    """
    config = model.config
    heads, count = config.num_attention_heads, config.num_hidden_layers
    if not config.attention_bias or count < 2 or heads != len(OFFSETS):
        raise ValueError(
            f"model must have attention_bias, at least 2 layers and {len(OFFSETS)} heads, got "
            f"attention_bias={config.attention_bias}, {count} layers and {heads} heads"
        )
    half, head_dim = config.hidden_size // 2, config.hidden_size // heads
    embedding = model.model.embed_tokens.weight
    embedding.zero_()
    embedding[:, :half].normal_(0, EMBEDDING_STD)
    first, second, *others = model.model.layers
    _write_neighbours(first.self_attn, model.model.rotary_emb.inv_freq)
    _copy_where_neighbours_match(second.self_attn, head_dim)
    for layer in others:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
