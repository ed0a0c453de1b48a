"""The split of a decoder: the prefix below the fast weights, the suffix with them, the head.

A decoder of n layers is 2n halves: half 2i is the attention of layer i, half 2i + 1 its FFN. The
prefix is the halves before the first adapted one. The last layer computes only the rows whose loss
is taken: its keys and values need every row, but nothing else does.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_bidirectional_mask

# Pre-norm decoders: h + attention(norm(h)), then h + ffn(norm(h)), no multipliers in between.
FAMILIES = ("llama", "qwen2", "qwen3")

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Context:
    """What every layer needs beside the hidden state.

    Attributes:
        rotary: cos and sin, each [1, L, head_dim].
        mask: what the model's attention implementation takes for padding, None where there is none.
        visible: [B, 1, 1, L] bool, the same for `scaled_dot_product_attention`, or None.
        rows: [B, W] int64, positions of the rows that the last layer computes.
    """

    rotary: tuple[Tensor, Tensor]
    mask: Any
    visible: Tensor | None
    rows: Tensor


class Backbone:
    """A Hugging Face decoder, bidirectional, that runs in two parts.

    Replaces `model(input_ids, attention_mask).logits[masked]` without the [B, L, V] logits and
    without the last layer's unread rows. The model itself is not changed.

    Args:
        model: a causal LM of one of `FAMILIES`, or a PEFT model of one.
        boundary: the first half of the suffix, in [0, 2n]; None for 2n, no suffix at all.

    Raises:
        ValueError: a model of another family, one with sliding-window attention, or a head that is
            not one linear layer.
    """

    def __init__(self, model: nn.Module, boundary: int | None = None) -> None:
        base: Any = model
        if hasattr(base, "get_base_model"):  # a PEFT model
            base = base.get_base_model()
        config = base.config
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"model must be one of {', '.join(FAMILIES)}, got model_type {config.model_type!r}"
            )
        layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
        if layer_types != {"full_attention"}:
            raise ValueError(
                f"model must use full attention in every layer, got layer_types {layer_types}"
            )
        self.config = config
        self.decoder = base.get_decoder()
        self.layers: Any = self.decoder.layers
        self.half_count = 2 * len(self.layers)
        self.boundary = self.half_count if boundary is None else boundary
        if not 0 <= self.boundary <= self.half_count:
            raise ValueError(f"boundary must be in [0, {self.half_count}], got {boundary}")
        self._head = base.get_output_embeddings()
        self.head()

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] or None of the output layer.

        Raises:
            ValueError: the head is not one linear layer (say, it carries an outer LoRA).
        """
        head = self._head
        if hasattr(head, "modules_to_save"):  # PEFT trains a full copy of the head
            head = head.modules_to_save[head.active_adapters[0]]
        if type(head) is not nn.Linear:
            raise ValueError(
                "the output layer must be a plain nn.Linear so that logits can be fused into the "
                f"loss, got {type(head).__name__}: leave it out of the LoRA target modules"
            )
        return head.weight, head.bias

    def context(self, input_ids: Tensor, attention_mask: Tensor | None, rows: Tensor) -> Context:
        """Prepare rotary embeddings and masks for a batch.

        Args:
            input_ids: [B, L] int64.
            attention_mask: [B, L] bool, False for padding, or None where nothing is padded.
            rows: [B, W] int64, the rows that the last layer computes.

        Returns:
            A `Context` for `prefix` and `suffix`.
        """
        batch_size, length = input_ids.shape
        weight = self.layers[0].input_layernorm.weight
        like = weight.new_empty(()).expand(batch_size, length, self.config.hidden_size)
        positions = torch.arange(length, device=input_ids.device)[None]
        rotary = self.decoder.rotary_emb(like, positions)
        if attention_mask is None:
            return Context(rotary, None, None, rows)
        visible = attention_mask[:, None, None, :]
        if self.config._attn_implementation == "sdpa":
            return Context(rotary, visible, visible, rows)
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=like,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=False,  # asking whether it is all True waits for the GPU
        )
        return Context(rotary, mask, visible, rows)

    def prefix(self, input_ids: Tensor, context: Context) -> Tensor:
        """Embed, and run the halves before the boundary.

        Args:
            input_ids: [B, L] int64, noisy tokens.
            context: of the same batch.

        Returns:
            Hidden state at the boundary: [B, L, D], or [B, W, D] where it lies behind the last
            layer's attention, which keeps the rows of `context` only.
        """
        hidden = self.decoder.embed_tokens(input_ids)
        recompute = self._gradient_checkpointing()
        return self._run(hidden, 0, self.boundary, context, contextlib.nullcontext(), recompute)

    def suffix(
        self,
        hidden: Tensor,
        valid: Tensor,
        context: Context,
        memory: contextlib.AbstractContextManager[Any],
        *,
        recompute: bool = False,
    ) -> Tensor:
        """Run the halves from the boundary on, and the final norm, on the rows that count.

        Args:
            hidden: what `prefix` returned.
            valid: [M] int64, flat indices into [B, W] of the real rows.
            context: of the same batch.
            memory: entered around every layer, also when it is recomputed in backward; under it the
                adapted layers add their fast weights.
            recompute: recompute each layer in backward instead of storing its activations; the
                model's own gradient checkpointing asks for it too.

        Returns:
            [M, D], input of the head.
        """
        recompute = recompute or self._gradient_checkpointing()
        hidden = self._run(
            hidden, self.boundary, self.half_count, context, memory, recompute
        )  # [B, W, D]
        return self.decoder.norm(hidden.flatten(0, 1)[valid])

    def _gradient_checkpointing(self) -> bool:
        return self.decoder.training and getattr(self.decoder, "gradient_checkpointing", False)

    def _run(
        self,
        hidden: Tensor,
        first: int,
        last: int,
        context: Context,
        memory: contextlib.AbstractContextManager[Any],
        recompute: bool,
    ) -> Tensor:
        """Halves [first, last), layer by layer."""
        for index in range(first // 2, (last + 1) // 2):
            halves = range(max(first, 2 * index), min(last, 2 * index + 2))
            layer = partial(self._layer, index=index, halves=halves, context=context, memory=memory)
            if recompute and torch.is_grad_enabled():
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        return hidden

    def _layer(
        self,
        hidden: Tensor,
        index: int,
        halves: range,
        context: Context,
        memory: contextlib.AbstractContextManager[Any],
    ) -> Tensor:
        layer = self.layers[index]
        with memory:
            if 2 * index in halves:
                if index == len(self.layers) - 1:
                    hidden = _attend_rows(layer, hidden, context)
                else:
                    hidden = _attend(layer, hidden, context)
            if 2 * index + 1 in halves:
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden


def _attend(layer: Any, hidden: Tensor, context: Context) -> Tensor:
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden),
        position_embeddings=context.rotary,
        attention_mask=context.mask,
        is_causal=False,
    )
    return hidden + attended


def _attend_rows(layer: Any, hidden: Tensor, context: Context) -> Tensor:
    """Attention whose queries are the rows of the context: [B, L, D] to [B, W, D]."""
    attention = layer.self_attn
    rows = context.rows
    normed = layer.input_layernorm(hidden)
    query = _heads(attention, "q", _take(normed, rows))  # [B, H, W, head_dim]
    key = _heads(attention, "k", normed)  # [B, H_kv, L, head_dim]
    value = _heads(attention, "v", normed)
    cos, sin = context.rotary  # [1, L, head_dim]
    attended = F.scaled_dot_product_attention(
        _rotate(query, cos[0][rows][:, None], sin[0][rows][:, None]),
        _rotate(key, cos[:, None], sin[:, None]),
        value,
        attn_mask=context.visible,
        dropout_p=attention.attention_dropout if attention.training else 0.0,
        scale=attention.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    merged = attended.transpose(1, 2).flatten(2)  # [B, W, H * head_dim]
    return _take(hidden, rows) + attention.o_proj(merged)


def _heads(attention: Any, name: str, hidden: Tensor) -> Tensor:
    """Project and split into heads, [B, L, D] to [B, H, L, head_dim]; Qwen3 also norms them."""
    projected = getattr(attention, f"{name}_proj")(hidden)
    heads = projected.unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{name}_norm", None)
    return (heads if norm is None else norm(heads)).transpose(1, 2)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, the two halves of a head rotated against each other."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def _take(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden[b, rows[b]]: [B, L, D] to [B, W, D]."""
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))


def adapted_layers(layer_count: int, layer_fraction: float) -> range:
    """The last share of the layers: floor(n * (1 - layer_fraction)) to n - 1."""
    # The small term keeps 10 * (1 - 0.1) from falling below 9.
    return range(int(layer_count * (1 - layer_fraction) + 1e-9), layer_count)


def find_targets(
    model: nn.Module, target: str, layer_fraction: float
) -> tuple[dict[str, nn.Linear], int]:
    """The linear layers that get fast weights, and the first half that holds one.

    Args:
        model: as for `Backbone`.
        target: "ffn" or "ffn+attention".
        layer_fraction: share of the layers, counted from the last.

    Returns:
        Qualified name (within the layers, say "3.mlp.up_proj") to module, in the order of the
        forward pass; inside a PEFT layer it is the base layer. And the boundary for `Backbone`.

    Raises:
        ValueError: a layer lacks one of the target's modules, under the name looked for; says what
            was looked for and what there is.
    """
    backbone = Backbone(model)
    layers = backbone.layers
    chosen = adapted_layers(len(layers), layer_fraction)
    attention = ATTENTION_PROJECTIONS if target == "ffn+attention" else ()
    wanted = [("self_attn", name) for name in attention] + [("mlp", n) for n in FFN_PROJECTIONS]
    found = dict(_projections(layers, chosen, wanted))
    names = [f"{index}.{parent}.{name}" for index in chosen for parent, name in wanted]
    missing = [name for name in names if name not in found]
    if missing or not found:
        kinds = sorted({name for name, _ in layers[-1].named_modules() if name})
        raise ValueError(
            f"no linear layer for target {target!r} in layers {list(chosen)}: looked for "
            f"{', '.join(f'{parent}.{name}' for parent, name in wanted)}, not found "
            f"{', '.join(missing)}; a layer has {', '.join(kinds)}"
        )
    boundary = 2 * chosen.start + (0 if attention else 1)
    return found, boundary


def _projections(
    layers: nn.ModuleList, chosen: range, wanted: list[tuple[str, str]]
) -> Iterator[tuple[str, nn.Linear]]:
    for index in chosen:
        for parent, name in wanted:
            module = getattr(getattr(layers[index], parent, None), name, None)
            module = getattr(module, "base_layer", module)
            if isinstance(module, nn.Linear):
                yield f"{index}.{parent}.{name}", module
