"""The matrix products of one training step, counted from shapes.

Two operations for each multiplication and addition, as `torch.utils.flop_counter` counts. Norms,
activations, rotary embeddings, softmax and the optimiser are left out: they are no products, and
on long rows a percent or two of the time of those.
"""

import dataclasses
from dataclasses import dataclass
from enum import Enum

from memdlm.backbone import adapted_layers
from memdlm.cost.counts import BatchCounts, StateCounts
from memdlm.cost.shape import FFN, DecoderShape

NOISIER_PREFIX = "noisier prefixes"
ANCHOR_PREFIX = "anchor prefix"
INNER_SUFFIX = "inner suffix"
INNER_BACKWARD = "inner backward"
OUTER_FORWARD = "outer forward"
HEAD = "head and loss"
OUTER_BACKWARD = "outer backward"
PARTS = (
    NOISIER_PREFIX,
    ANCHOR_PREFIX,
    INNER_SUFFIX,
    INNER_BACKWARD,
    OUTER_FORWARD,
    HEAD,
    OUTER_BACKWARD,
)


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        outer: "full" trains every weight, "lora" a LoRA on attention and FFN (experts too),
            "lora_attention" one on the attention alone.
        lora_rank: of that LoRA.
        gradient_checkpointing: recompute each layer in backward.
        rank: of the fast weights, on the FFN projections.
        layer_fraction: the last share of the layers that has fast weights.
    """

    outer: str
    lora_rank: int = 32
    gradient_checkpointing: bool = False
    rank: int = 32
    layer_fraction: float = 0.1


class _Fast(Enum):
    """How a projection reads fast weights."""

    NONE = "it has none"
    BLANK = "trained, and B is zero: no product in forward, and no gradient but B's"
    TRAINED = "by an inner step"
    CONSTANT = "by the outer pass"


@dataclass(frozen=True)
class _Cost:
    """Of some layers.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass.
        recomputed: what checkpointing computes again.
    """

    forward: float = 0
    backward: float = 0
    recomputed: float = 0

    def __add__(self, other: "_Cost") -> "_Cost":
        return _Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.recomputed + other.recomputed,
        )


@dataclass(frozen=True)
class _Pass:
    """One run through some layers.

    Attributes:
        tokens: positions of each sequence that are computed.
        queries: of those, the rows that the last layer computes.
        keys: positions of each sequence that a query sees.
        sequences: B, or more where several states run together.
        fast: how the adapted layers read their fast weights.
        graph: whether there is a backward pass.
        weights: whether that makes gradients of the base weights.
        input_grad: whether the first half's input has a gradient.
        looped: whether experts are layers of their own, as published models have them: gate and up
            are then two, each with an outer LoRA.
    """

    tokens: float
    queries: float
    keys: float
    sequences: int
    fast: _Fast = _Fast.NONE
    graph: bool = True
    weights: bool = False
    input_grad: bool = True
    looped: bool = False


def all_rows_flops(
    shape: DecoderShape, counts: BatchCounts, training: Training
) -> dict[str, float]:
    """Plain MDLM as trainers run it: every row through every layer and the head, experts in a loop.

    Args:
        shape: the decoder.
        counts: B and L are read.
        training: what is trained.

    Returns:
        FLOPs of each of `PARTS` that there is.
    """
    every = StateCounts(counts.batch_size * counts.length, counts.length)
    parts = _plain(shape, counts, every, training, looped=True)
    head = 2 * every.rows * shape.vocabulary * shape.hidden
    return parts | {HEAD: head * (3 if training.outer == "full" else 2)}


def mdlm_flops(shape: DecoderShape, counts: BatchCounts, training: Training) -> dict[str, float]:
    """Plain MDLM on masked rows, as `MDLMObjective` runs it.

    Args:
        shape: the decoder.
        counts: of the batch; the anchor is read.
        training: what is trained.

    Returns:
        FLOPs of each of `PARTS` that there is.
    """
    head = _head(shape, counts.anchor, training.outer == "full")
    return _plain(shape, counts, counts.anchor, training) | {HEAD: head}


def memdlm_flops(shape: DecoderShape, counts: BatchCounts, training: Training) -> dict[str, float]:
    """MemDLM, as `MemDLMObjective` runs it with fast weights on FFN projections.

    Args:
        shape: the decoder.
        counts: of the batch.
        training: what is trained.

    Returns:
        FLOPs of each of `PARTS`.
    """
    boundary = 2 * adapted_layers(len(shape.layers), training.layer_fraction).start + 1
    model = _Model(shape, training, boundary)
    full = training.outer == "full"
    parts = dict.fromkeys(PARTS, 0.0)

    prefix = model.prefix(_first_pass(counts, counts.anchor, training))
    parts[ANCHOR_PREFIX] = prefix.forward
    if counts.noisier:
        tokens = counts.length if counts.changed is None else counts.changed
        sequences = counts.batch_size * len(counts.noisier)
        together = _Pass(tokens, counts.noisier[0].width, counts.length, sequences, graph=False)
        parts[NOISIER_PREFIX] = model.prefix(together).forward
    for number, state in enumerate((*counts.noisier, *[counts.anchor] * counts.anchor_visits)):
        fast = _Fast.TRAINED if number else _Fast.BLANK
        inner = model.suffix(_pass(counts, state, fast=fast, input_grad=False))
        parts[INNER_SUFFIX] += inner.forward
        parts[INNER_BACKWARD] += inner.backward + model.again(inner)
        parts[HEAD] += _head(shape, state, trained=False)
    suffix = model.suffix(_pass(counts, counts.anchor, fast=_Fast.CONSTANT, weights=full))
    parts[OUTER_FORWARD] = suffix.forward
    parts[HEAD] += _head(shape, counts.anchor, trained=full)
    outer = prefix + suffix
    parts[OUTER_BACKWARD] = outer.backward + model.again(outer)
    return parts


def _plain(
    shape: DecoderShape,
    counts: BatchCounts,
    state: StateCounts,
    training: Training,
    *,
    looped: bool = False,
) -> dict[str, float]:
    model = _Model(shape, training, boundary=2 * len(shape.layers))
    run = dataclasses.replace(_first_pass(counts, state, training), looped=looped)
    cost = model.prefix(run)
    return {OUTER_FORWARD: cost.forward, OUTER_BACKWARD: cost.backward + model.again(cost)}


def _first_pass(counts: BatchCounts, state: StateCounts, training: Training) -> _Pass:
    """From the embedding on. transformers' checkpointing asks for its gradient, trained or not."""
    full = training.outer == "full"
    asked = full or training.gradient_checkpointing
    return _pass(counts, state, weights=full, input_grad=asked)


def _pass(
    counts: BatchCounts,
    state: StateCounts,
    *,
    fast: _Fast = _Fast.NONE,
    weights: bool = False,
    input_grad: bool = True,
) -> _Pass:
    """Every position of a state."""
    length = counts.length
    return _Pass(length, state.width, length, counts.batch_size, fast, True, weights, input_grad)


def _head(shape: DecoderShape, state: StateCounts, trained: bool) -> float:
    """Logits and the hidden state's gradient; a trained head's logits are made twice."""
    products = 4 if trained else 2
    return 2 * state.rows * shape.vocabulary * shape.hidden * products


@dataclass(frozen=True)
class _Model:
    shape: DecoderShape
    training: Training
    boundary: int

    def prefix(self, run: _Pass) -> _Cost:
        """Halves before the boundary, and the router that the boundary lies behind."""
        cost = sum((self._half(half, run) for half in range(self.boundary)), _Cost())
        if self.boundary % 2:
            # Outside of the checkpointed layer, so never computed again.
            router = self._router(self.boundary // 2, run, in_grad=True)
            cost += _Cost(router.forward, router.backward)
        return cost

    def suffix(self, run: _Pass) -> _Cost:
        """The other halves."""
        halves = range(self.boundary, 2 * len(self.shape.layers))
        return sum((self._half(half, run) for half in halves), _Cost())

    def again(self, cost: _Cost) -> float:
        return cost.recomputed if self.training.gradient_checkpointing else 0

    def _half(self, half: int, run: _Pass) -> _Cost:
        first = half in (0, self.boundary)
        in_grad = run.graph and (run.input_grad or not first)
        return (self._ffn if half % 2 else self._attention)(half, run, in_grad)

    def _rows(self, half: int, run: _Pass) -> float:
        last = half // 2 == len(self.shape.layers) - 1
        return run.sequences * (run.queries if last else run.tokens)

    def _attention(self, half: int, run: _Pass, in_grad: bool) -> _Cost:
        shape = self.shape
        rows, tokens = self._rows(half, run), run.sequences * run.tokens
        query, key = (n * shape.head_width for n in (shape.heads, shape.key_heads))
        cost = self._linear(run, rows, shape.hidden, query, False, in_grad)
        for _ in ("keys", "values"):
            cost += self._linear(run, tokens, shape.hidden, key, False, in_grad)
        scores = 2 * 2 * rows * run.keys * query
        # In backward the scores again, and four gradients.
        cost += _Cost(scores, scores * 5 / 2, scores)
        ends_here = half + 1 == self.boundary
        return cost + self._linear(run, rows, query, shape.hidden, False, True, last=ends_here)

    def _ffn(self, half: int, run: _Pass, in_grad: bool) -> _Cost:
        ffn, rows = self.shape.layers[half // 2], self._rows(half, run)
        cost = _Cost()
        if ffn.experts:
            if half != self.boundary:
                cost += self._router(half // 2, run, in_grad)
            cost += self._experts(ffn, run, rows, in_grad)
        if ffn.width:
            cost += self._gated(run, rows, ffn.width, in_grad)
        return cost

    def _router(self, layer: int, run: _Pass, in_grad: bool) -> _Cost:
        rows, experts = self._rows(2 * layer + 1, run), self.shape.layers[layer].experts
        product = 2 * rows * self.shape.hidden * experts
        return _Cost(product, product * (in_grad + run.weights), product)

    def _experts(self, ffn: FFN, run: _Pass, rows: float, in_grad: bool) -> _Cost:
        rows = rows * ffn.chosen
        hidden, width = self.shape.hidden, ffn.expert_width
        if run.looped:
            return self._gated(run, rows, width, in_grad, last=False)
        stacked = self._linear(run, rows, hidden, 2 * width, True, in_grad, experts=2)
        cost = stacked + self._linear(run, rows, width, hidden, True, True, experts=1)
        # The weighted sum over the k experts; in backward the gradient of the router's weights, if
        # its input or the router itself has one.
        weighted = 2 * rows * hidden
        return cost + _Cost(weighted, weighted * (in_grad or run.weights), weighted)

    def _gated(
        self, run: _Pass, rows: float, width: int, in_grad: bool, *, last: bool = True
    ) -> _Cost:
        hidden = self.shape.hidden
        cost = _Cost()
        for _ in ("gate", "up"):
            cost += self._linear(run, rows, hidden, width, True, in_grad)
        return cost + self._linear(run, rows, width, hidden, True, True, last=last)

    def _linear(
        self,
        run: _Pass,
        rows: float,
        inputs: int,
        outputs: int,
        is_ffn: bool,
        in_grad: bool,
        *,
        experts: int = 0,
        last: bool = False,
    ) -> _Cost:
        """A linear layer, or those of stacked experts, with its outer LoRA and its fast weights.

        A recomputation ends where nothing more is kept for backward: where the product is the last
        of its layer and nothing low-rank follows, it is left out.

        Args:
            run: the pass.
            rows: that run through it.
            inputs, outputs: its size, of all its projections.
            is_ffn: whether it belongs to an FFN: only there are fast weights.
            in_grad: whether its input has a gradient.
            experts: of stacked experts the projections, 2 for gate and up; else 0.
            last: whether it ends its layer.
        """
        fast = run.fast if is_ffn else _Fast.NONE
        adapted = self.training.outer in (("lora",) if is_ffn else ("lora", "lora_attention"))
        product = 2 * rows * inputs * outputs
        recomputed = product if adapted or fast is not _Fast.NONE or not last else 0
        cost = _Cost(product, product * (in_grad + run.weights), recomputed)
        if adapted:
            rank = self.training.lora_rank
            if experts == 2:
                rank *= self.shape.gate_up_lora_ranks
            # To an inner step the outer LoRA is a constant.
            inner = run.fast in (_Fast.BLANK, _Fast.TRAINED)
            own = _Fast.CONSTANT if inner else _Fast.TRAINED
            cost += _low_rank(rows, rank * inputs, rank * outputs, in_grad, own)
        # Of each projection of a stack there is an A of its own, and B has its own rows.
        A, B = (self.training.rank * size for size in (max(experts, 1) * inputs, outputs))
        return cost + _low_rank(rows, A, B, in_grad, fast)


def _low_rank(rows: float, A: int, B: int, in_grad: bool, fast: _Fast) -> _Cost:
    """Two products that add a low-rank update, for A and B of so many elements."""
    through_A, through_B = 2 * rows * A, 2 * rows * B
    both = through_A + through_B
    if fast is _Fast.NONE:
        return _Cost()
    if fast is _Fast.BLANK:
        return _Cost(0, both, 0)
    if fast is _Fast.CONSTANT:
        return _Cost(both, both * in_grad, both)
    return _Cost(both, 2 * through_B + (1 + in_grad) * through_A, both)
