"""The split of a decoder: the prefix below the fast weights, the suffix with them, the head.

A decoder of n layers is 2n halves: half 2i is the attention of layer i, half 2i + 1 its FFN. The
prefix is the halves before the first adapted one; where that is an FFN, its norm and its router are
prefix too. The last layer computes only the rows whose loss is taken: its keys and values need
every row, but nothing else does.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import create_bidirectional_mask

from memdlm import experts
from memdlm.block_mask import Blocks, CausalBlocks
from memdlm.gated_ffn import run_gated_ffn
from memdlm.models.rotary import rotate
from memdlm.outer_lora import fused_outer_lora, prepare_outer_lora
from memdlm.recorded_keys import LayerKeys, RecordedKeys
from memdlm.sdpa import in_order, sdpa_backend

# Pre-norm decoders: h + attention(norm(h)), then h + ffn(norm(h)), no multipliers in between.
FAMILIES = ("llama", "qwen2", "qwen3", "olmoe", "llada", "llada2_moe", "Dream")

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

# Of each decoder with experts: the function that ran them before, and the backbones that need ours.
_before: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
_users: WeakKeyDictionary[nn.Module, WeakSet[Any]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Context:
    """What every layer needs beside the hidden state.

    L is the number of positions that run: the tokens, or with block diffusion twice as many.

    Attributes:
        rotary: cos and sin, each [1, L, rotary_dim].
        mask: what the model's attention implementation takes, None where every token is visible.
        visible: [B, L] bool, False for padding, or None where nothing is padded.
        rows: [B, W] int64, positions of the rows that the last layer computes.
        blocks: with block diffusion, who sees whom.
    """

    rotary: tuple[Tensor, Tensor]
    mask: Any
    visible: Tensor | None
    rows: Tensor
    blocks: CausalBlocks | None = None


@dataclass(frozen=True)
class Activations:
    """What the halves before the boundary hand to those behind it.

    Attributes:
        hidden: [B, L, D], or [B, W, D] behind the last layer's attention.
        ffn: where the boundary lies before an FFN, its normed input, of hidden's shape; and, where
            that FFN has experts, the router's weights and indices, each [B L, k].
    """

    hidden: Tensor
    ffn: tuple[Tensor, ...] = ()

    def detach(self) -> "Activations":
        """The same, without a graph."""
        return Activations(self.hidden.detach(), tuple(part.detach() for part in self.ffn))

    def chunk(self, count: int) -> list["Activations"]:
        """Cut a batch of `count` states into one for each."""
        ffn = zip(*(part.chunk(count) for part in self.ffn), strict=True)
        own = list(ffn) if self.ffn else [()] * count
        return [Activations(h, f) for h, f in zip(self.hidden.chunk(count), own, strict=True)]


class Backbone:
    """A decoder that runs in two parts, with bidirectional attention.

    Replaces `model(input_ids, attention_mask).logits[masked]` without the [B, L, V] logits and
    without the last layer's unread rows. Called the ordinary way, the model computes what it did,
    its stacked experts by another function (other in the last digits) until `release`.

    With a block size b it is block diffusion instead (BD3-LM, LLaDA2.x): the noisy tokens and the
    clean ones run side by side, and a noisy token sees its own block of b noisy tokens and the
    clean tokens of the blocks before.

    Args:
        model: a causal LM of one of `FAMILIES`, or a PEFT model of one.
        boundary: the first half of the suffix, in [0, 2n]; None for 2n, no suffix at all.
        block_size: tokens of a block, at least 1; None where every token sees every other.

    Attributes:
        right_shift_logits: whether the logits of a position are those of the next token.
        activation_width: roughly how many values per row the widest layer of the suffix stores for
            backward.

    Raises:
        ValueError: a model of another family, one with sliding-window attention, a head that is
            not one linear layer, or blocks that the model cannot be trained in.
    """

    right_shift_logits: bool

    def __init__(
        self, model: nn.Module, boundary: int | None = None, block_size: int | None = None
    ) -> None:
        base: Any = model
        if hasattr(base, "get_base_model"):  # a PEFT model
            prepare_outer_lora(base)
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
        check_blocks(config, block_size)
        self.config = config
        self.block_size = block_size
        self.right_shift_logits = bool(getattr(config, "right_shift_logits", False))
        self.decoder = base.get_decoder()
        self.layers: Any = self.decoder.layers
        self.half_count = 2 * len(self.layers)
        self.boundary = self.half_count if boundary is None else boundary
        if not 0 <= self.boundary <= self.half_count:
            raise ValueError(f"boundary must be in [0, {self.half_count}], got {boundary}")
        self._head = base.get_output_embeddings()
        self.head()
        for layer in self.layers:
            if _is_sparse(layer.mlp):
                self._run_experts_here(experts.stacked_experts(layer.mlp.experts).config)
        self.activation_width = self._activation_width()

    def _run_experts_here(self, config: Any) -> None:
        if config._experts_implementation != experts.IMPLEMENTATION:
            _before[self.decoder] = config._experts_implementation
            config._experts_implementation = experts.IMPLEMENTATION
        _users.setdefault(self.decoder, WeakSet()).add(self)

    def release(self) -> None:
        """Let experts run as before the first backbone of the model; the last one to go does it.

        It runs none of a model of experts afterwards.
        """
        others = _users.get(self.decoder, WeakSet())
        others.discard(self)
        if self.decoder not in _before or others:
            return
        before = _before.pop(self.decoder)
        for layer in self.layers:
            if _is_sparse(layer.mlp):
                own = experts.stacked_experts(layer.mlp.experts)
                own.config._experts_implementation = before

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] or None of the output layer.

        Raises:
            ValueError: the head is not one linear layer (say, it carries an outer LoRA).
        """
        head = self._head
        if hasattr(head, "modules_to_save"):  # PEFT trains a full copy of the head
            copies, own = head.modules_to_save, head.active_adapters[0]
            head = head.original_module if head.disable_adapters else copies[own]
        if type(head) is not nn.Linear:
            raise ValueError(
                "the output layer must be a plain nn.Linear so that logits can be fused into the "
                f"loss, got {type(head).__name__}: leave it out of the LoRA target modules"
            )
        return head.weight, head.bias

    def context(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        rows: Tensor,
        *,
        canvas_block: int | None = None,
    ) -> Context:
        """Prepare rotary embeddings and masks for a batch.

        Args:
            input_ids: [B, L] int64.
            attention_mask: [B, L] bool, False for padding, or None where nothing is padded.
            rows: [B, W] int64, the rows that the last layer computes.
            canvas_block: at inference by block diffusion: a token sees its own block of so many
                and those before, all on one canvas; for a backbone without a block size.

        Returns:
            A `Context` for `prefix` and `suffix`.

        Raises:
            ValueError: a block size that does not divide L, or an attention implementation that
                takes no mask of blocks.
        """
        batch_size, length = input_ids.shape
        weight = self.layers[0].input_layernorm.weight
        positions = torch.arange(length, device=input_ids.device)[None]
        if self.block_size is not None:
            positions = torch.cat((positions, positions), dim=1)
            if attention_mask is not None:
                attention_mask = torch.cat((attention_mask, attention_mask), dim=1)
        like = weight.new_empty(()).expand(batch_size, positions.shape[1], self.config.hidden_size)
        rotary = self.decoder.rotary_emb(like, positions)
        implementation = self.config._attn_implementation
        blocks = self._blocks(length, canvas_block)
        if blocks is not None:
            mask = blocks.mask(implementation, attention_mask, like)
            return Context(rotary, mask, attention_mask, rows, blocks)
        if attention_mask is None:
            return Context(rotary, None, None, rows)
        if implementation == "sdpa":
            return Context(rotary, attention_mask[:, None, None, :], attention_mask, rows)
        mask = create_bidirectional_mask(
            config=self.config,
            inputs_embeds=like,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=False,  # asking whether it is all True waits for the GPU
        )
        return Context(rotary, mask, attention_mask, rows)

    def _blocks(self, length: int, canvas_block: int | None) -> CausalBlocks | None:
        if self.block_size is not None:
            assert canvas_block is None
            return Blocks(length, self.block_size)
        return None if canvas_block is None else CausalBlocks(length, canvas_block)

    def prefix(
        self,
        input_ids: Tensor,
        context: Context,
        clean_ids: Tensor | None = None,
        recorded: RecordedKeys | None = None,
    ) -> Activations:
        """Embed, and run what lies before the boundary.

        Args:
            input_ids: [B, L] int64, noisy tokens.
            context: of the same batch.
            clean_ids: [B, L] int64, the tokens without noise; read by block diffusion alone, which
                needs them.
            recorded: takes the keys and values of the layers that run, for `prefix_of_changes`.

        Returns:
            The activations at the boundary.
        """
        if self.block_size is not None:
            assert clean_ids is not None
            input_ids = torch.cat((input_ids, clean_ids), dim=1)
        start = Activations(self.decoder.embed_tokens(input_ids))
        recompute = self._gradient_checkpointing()
        memory = contextlib.nullcontext()
        hidden = self._run(start, 0, self.boundary, context, memory, recompute, recorded)
        return self._at_boundary(hidden)

    def _at_boundary(self, hidden: Tensor) -> Activations:
        if self.boundary % 2 == 0:
            return Activations(hidden)
        return Activations(hidden, _ffn_input(self.layers[self.boundary // 2], hidden))

    def prefix_of_changes(
        self,
        input_ids: Tensor,
        context: Context,
        changed: Tensor,
        anchor: Activations,
        recorded: RecordedKeys,
    ) -> Activations:
        """The prefix of states that differ from the anchor in some tokens, computed there alone.

        Everywhere else the anchor's keys, values and activations stand in. That is exact where the
        other tokens do not see those that change (block diffusion), and an approximation where they
        do.

        Args:
            input_ids: [n B, L] int64, noisy tokens of n states.
            context: of these; its `rows` are theirs.
            changed: [B, C] int64, positions that are computed, among them `rows`; one may stand
                there twice.
            anchor: what `prefix` made of the anchor state.
            recorded: what that pass recorded.

        Returns:
            The activations at the boundary, as `prefix` gives them for n B sequences.
        """
        count = len(input_ids) // len(changed)
        changed = changed.repeat(count, 1)
        here = dataclasses.replace(context, rows=changed)
        seen = _visible_to_rows(here)
        hidden = self.decoder.embed_tokens(input_ids.gather(1, changed))  # [n B, C, D]
        with self.attention_order(), fused_outer_lora():
            for index in range((self.boundary + 1) // 2):
                layer, last = self.layers[index], index == len(self.layers) - 1
                keys = recorded[index]
                hidden = _attend_recorded(
                    layer, hidden, here, seen, keys, context.rows if last else None
                )
                if 2 * index + 1 < self.boundary:
                    hidden = hidden + _ffn(layer.mlp, *_ffn_input(layer, hidden))
            own = self._at_boundary(hidden)
        if self.boundary >= self.half_count - 1:  # behind the last attention: loss rows alone
            return own
        return _put(anchor, own, changed)

    def suffix(
        self,
        start: Activations,
        valid: Tensor,
        context: Context,
        memory: contextlib.AbstractContextManager[Any],
        *,
        recompute: bool | None = None,
    ) -> Tensor:
        """Run what lies behind the boundary, and the final norm, on the rows that count.

        Args:
            start: what `prefix` returned.
            valid: [M] int64, flat indices into [B, W] of the real rows.
            context: of the same batch.
            memory: entered around every layer, also when it is recomputed in backward; under it the
                adapted layers add their fast weights.
            recompute: whether to recompute each layer in backward instead of storing its
                activations; None asks the model's own gradient checkpointing.

        Returns:
            [M, D], input of the head.
        """
        if recompute is None:
            recompute = self._gradient_checkpointing()
        hidden = self._run(
            start, self.boundary, self.half_count, context, memory, recompute
        )  # [B, W, D]
        return self.decoder.norm(hidden.flatten(0, 1)[valid])

    @contextlib.contextmanager
    def constant_suffix(self) -> Iterator[None]:
        """In here the suffix's own parameters need no gradient: only what a memory reads may.

        Otherwise ops with a backward of their own would make gradients that nobody takes, and
        layers would keep what those need.
        """
        modules = [*self.layers[self.boundary // 2 :], self.decoder.norm]
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def _activation_width(self) -> int:
        config = self.config
        widest = 0
        for layer in self.layers[self.boundary // 2 :]:
            mlp = layer.mlp
            widths = [m.out_features for m in mlp.modules() if isinstance(m, nn.Linear)]
            if _is_sparse(mlp):
                stacked = experts.stacked_experts(mlp.experts)
                # Each row runs through k experts: its copy, and what the FFN of each makes of it.
                per_expert = stacked.intermediate_dim + config.hidden_size
                widths.append(config.num_experts_per_tok * per_expert)
            widest = max(widest, *widths)
        # About 8 vectors of the hidden size around the norms and the attention, 4 around SwiGLU.
        return 8 * config.hidden_size + 4 * widest

    def _gradient_checkpointing(self) -> bool:
        return self.decoder.training and getattr(self.decoder, "gradient_checkpointing", False)

    def _run(
        self,
        start: Activations,
        first: int,
        last: int,
        context: Context,
        memory: contextlib.AbstractContextManager[Any],
        recompute: bool,
        recorded: RecordedKeys | None = None,
    ) -> Tensor:
        """Halves [first, last), layer by layer: [B, L, D], or [B, W, D] with the last attention."""
        at = start
        with self.attention_order():
            for index in range(first // 2, (last + 1) // 2):
                halves = range(max(first, 2 * index), min(last, 2 * index + 2))
                layer = partial(
                    self._layer,
                    index=index,
                    halves=halves,
                    context=context,
                    memory=memory,
                    recorder=None if recorded is None else recorded.at(index),
                )
                if recompute and torch.is_grad_enabled():
                    # Backward runs it again, outside of the order here.
                    run = partial(self._in_order, layer)
                    hidden = checkpoint(run, at.hidden, *at.ffn, use_reentrant=False)
                else:
                    hidden = layer(at.hidden, *at.ffn)
                at = Activations(hidden)
        return at.hidden

    def attention_order(self) -> contextlib.AbstractContextManager[Any]:
        """In here attention tries the backends in the model's order, see `set_sdpa_backend`."""
        return in_order(sdpa_backend(self.decoder))

    def _in_order(self, layer: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        with self.attention_order():
            return layer(*inputs)

    def _layer(
        self,
        hidden: Tensor,
        *ffn: Tensor,
        index: int,
        halves: range,
        context: Context,
        memory: contextlib.AbstractContextManager[Any],
        recorder: LayerKeys | None,
    ) -> Tensor:
        layer = self.layers[index]
        with memory, fused_outer_lora():
            if 2 * index in halves:
                attend = _attend_rows if index == len(self.layers) - 1 else _attend
                hidden = attend(layer, hidden, context, recorder)
            if 2 * index + 1 in halves:
                hidden = hidden + _ffn(layer.mlp, *(ffn or _ffn_input(layer, hidden)))
        return hidden


def check_blocks(config: Any, block_size: int | None) -> None:
    """Whether a model can be trained by block diffusion.

    Args:
        config: the model's.
        block_size: tokens of a block, or None.

    Raises:
        ValueError: the logits of a position are those of the next token: the first token of a block
            would be predicted by the block before, which sees nothing of it.
    """
    if block_size is not None and getattr(config, "right_shift_logits", False):
        raise ValueError(
            "block_size must be None for a model with right-shifted logits "
            f"({config.model_type}), got {block_size}"
        )


def _is_sparse(mlp: Any) -> bool:
    return hasattr(mlp, "experts")


def _ffn_input(layer: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """The normed input of an FFN; with experts also the router's weights and indices."""
    normed = layer.post_attention_layernorm(hidden)
    if not _is_sparse(layer.mlp):
        return (normed,)
    _, weight, index = layer.mlp.gate(normed.flatten(0, 1))
    return normed, weight, index


def _ffn(mlp: Any, normed: Tensor, *routing: Tensor) -> Tensor:
    if not routing:
        return run_gated_ffn(mlp, normed)
    out = experts.run_experts(mlp.experts, normed.flatten(0, 1), *routing).view_as(normed)
    shared = getattr(mlp, "shared_experts", None)
    return out if shared is None else out + run_gated_ffn(shared, normed)


def _attend(layer: Any, hidden: Tensor, context: Context, recorder: Any) -> Tensor:
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(hidden),
        position_embeddings=context.rotary,
        attention_mask=context.mask,
        is_causal=False,
        **({} if recorder is None else {"past_key_values": recorder}),
    )
    return hidden + attended


def _attend_rows(layer: Any, hidden: Tensor, context: Context, recorder: Any) -> Tensor:
    """Attention whose queries are the rows of the context: [B, L, D] to [B, W, D]."""
    attention, rows = layer.self_attn, context.rows
    normed = layer.input_layernorm(hidden)
    key, value = _keys_values(attention, normed, context, None)
    if recorder is not None:
        recorder.update(key, value)
    seen = _visible_to_rows(context)
    return _take(hidden, rows) + _attended(
        attention, _take(normed, rows), context, seen, key, value
    )


def _attend_recorded(
    layer: Any,
    hidden: Tensor,
    context: Context,
    seen: Tensor | None,
    recorded: tuple[Tensor, Tensor],
    last_rows: Tensor | None,
) -> Tensor:
    """Attention of the context's rows, whose keys and values take the place of recorded ones.

    [B, C, D] to the same, or to [B, W, D] where the queries are the `last_rows` alone.
    """
    attention, rows = layer.self_attn, context.rows
    normed = layer.input_layernorm(hidden)
    own = _keys_values(attention, normed, context, rows)
    copies = len(hidden) // len(recorded[0])
    at = rows[:, None, :, None]
    key, value = (
        part.repeat(copies, 1, 1, 1).scatter_(2, at.expand_as(new), new.to(part.dtype))
        for part, new in zip(recorded, own, strict=True)
    )
    if last_rows is not None:
        # Where in [0, C) each row of the context lies; a row that pads may lie anywhere.
        places = rows.new_zeros(len(rows), key.shape[2])
        places.scatter_(1, rows, torch.arange(rows.shape[1], device=rows.device).expand_as(rows))
        chosen = places.gather(1, last_rows)
        hidden, normed = _take(hidden, chosen), _take(normed, chosen)
        context = dataclasses.replace(context, rows=last_rows)
        seen = _visible_to_rows(context)
    return hidden + _attended(attention, normed, context, seen, key, value)


def _keys_values(
    attention: Any, normed: Tensor, context: Context, rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of tokens [B, C, D] at the positions `rows`, or everywhere: [B, H_kv, C, head_dim] each."""
    key = _heads(attention, "k", normed)
    return _rotated(key, context, rows), _heads(attention, "v", normed)


def _rotated(heads: Tensor, context: Context, rows: Tensor | None) -> Tensor:
    cos, sin = (part if rows is None else part[0][rows] for part in context.rotary)
    return rotate(heads, cos[:, None], sin[:, None])


def _attended(
    attention: Any,
    normed: Tensor,
    context: Context,
    mask: Tensor | None,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """What the rows of the context [B, W, D] take from keys and values [B, H_kv, L, head_dim]."""
    query = _rotated(_heads(attention, "q", normed), context, context.rows)  # [B, H, W, head_dim]
    grouped = query.shape[1] != key.shape[1]
    if grouped and mask is not None:
        # With both, CUDA falls back to an attention that makes all scores.
        copies = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=attention.attention_dropout if attention.training else 0.0,
        scale=attention.scaling,
        enable_gqa=grouped and mask is None,
    )
    merged = attended.transpose(1, 2).flatten(2)  # [B, W, H * head_dim]
    return attention.o_proj(merged)


def _visible_to_rows(context: Context) -> Tensor | None:
    """[B, 1, 1 or W, L] bool or None."""
    if context.blocks is not None:
        return context.blocks.seen_by(context.rows, context.visible)
    return None if context.visible is None else context.visible[:, None, None, :]


def _heads(attention: Any, name: str, hidden: Tensor) -> Tensor:
    """Project and split into heads, [B, L, D] to [B, H, L, head_dim], with norms and clip."""
    projected = getattr(attention, f"{name}_proj")(hidden)
    norm: Any = getattr(attention, f"{name}_norm", None)
    per_head = norm is not None and norm.weight.numel() == attention.head_dim
    if norm is not None and not per_head:  # OLMoE norms all heads as one
        projected = norm(projected)
    clip = getattr(attention.config, "clip_qkv", None)
    if clip is not None:
        projected = projected.clamp(-clip, clip)
    heads = projected.unflatten(-1, (-1, attention.head_dim))
    return (norm(heads) if per_head else heads).transpose(1, 2)


def _take(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden[b, rows[b]]: [B, L, D] to [B, W, D]."""
    return hidden.gather(1, rows[..., None].expand(-1, -1, hidden.shape[-1]))


def _put(anchor: Activations, own: Activations, rows: Tensor) -> Activations:
    """Copies of the anchor's activations, one for each of n states, with their own at `rows`."""
    batch_size, length = anchor.hidden.shape[:2]
    copies = len(rows) // batch_size

    def put(old: Tensor, new: Tensor) -> Tensor:
        whole = old.detach().view(batch_size, length, -1).repeat(copies, 1, 1)
        at = rows[..., None].expand(-1, -1, whole.shape[-1])
        whole.scatter_(1, at, new.reshape(*rows.shape, -1).to(whole.dtype))
        return whole.view(copies * old.shape[0], *old.shape[1:])

    ffn = tuple(put(old, new) for old, new in zip(anchor.ffn, own.ffn, strict=True))
    return Activations(put(anchor.hidden, own.hidden), ffn)


def adapted_layers(layer_count: int, layer_fraction: float) -> range:
    """The last share of the layers: floor(n * (1 - layer_fraction)) to n - 1."""
    # The small term keeps 10 * (1 - 0.1) from falling below 9.
    return range(int(layer_count * (1 - layer_fraction) + 1e-9), layer_count)


def find_targets(
    model: nn.Module, target: str, layer_fraction: float
) -> tuple[dict[str, nn.Module], int]:
    """The layers that get fast weights, and the first half that holds one.

    Args:
        model: as for `Backbone`.
        target: "ffn" or "ffn+attention".
        layer_fraction: share of the layers, counted from the last.

    Returns:
        Qualified name (within the layers, say "3.mlp.up_proj" or "3.mlp.experts") to linear layer
        or stacked experts, in the order of the forward pass; inside a PEFT layer it is the base
        layer. And the boundary for `Backbone`.

    Raises:
        ValueError: a layer lacks one of the target's modules, under the name looked for; says what
            was looked for and what there is.
    """
    layers = Backbone(model).layers
    chosen = adapted_layers(len(layers), layer_fraction)
    attention = ATTENTION_PROJECTIONS if target == "ffn+attention" else ()
    found: dict[str, nn.Module] = {}
    for index in chosen:
        layer = layers[index]
        wanted = [f"self_attn.{name}" for name in attention]
        wanted += [f"mlp.{name}" for name in _ffn_modules(layer.mlp)]
        for name in wanted:
            module = _adaptable(layer, name)
            if module is None:
                kinds = sorted({own for own, _ in layer.named_modules() if own})
                raise ValueError(
                    f"no layer for target {target!r} in layer {index}: looked for "
                    f"{', '.join(wanted)}, not found {name}; the layer has {', '.join(kinds)}"
                )
            found[f"{index}.{name}"] = module
    boundary = 2 * chosen.start + (0 if attention else 1)
    return found, boundary


def _ffn_modules(mlp: Any) -> list[str]:
    if not _is_sparse(mlp):
        return list(FFN_PROJECTIONS)
    shared = getattr(mlp, "shared_experts", None) is not None
    return ["experts"] + [f"shared_experts.{name}" for name in FFN_PROJECTIONS if shared]


def _adaptable(layer: nn.Module, name: str) -> nn.Module | None:
    """The linear layer or the stacked experts of that name, without PEFT's wrappers."""
    module: Any = layer
    for part in name.split("."):
        module = getattr(module, part, None)
    if module is None:
        return None
    stacked = experts.stacked_experts(module)
    if stacked is not None:
        return stacked
    module = getattr(module, "base_layer", module)
    return module if isinstance(module, nn.Linear) else None
