"""The exact gradient through the inner loop, at the activation memory of one step.

An inner step is phi_k = phi_{k-1} - lr clip(grad l_k), where l_k is a function of phi_{k-1}, of the
outer parameters and of the state's activations at the boundary. With u the gradient of the outer
loss with respect to phi_k, and g that of l_k with respect to phi_{k-1}, the step hands on

    s = -lr (d clip / d g)^T u        what u asks of g
    u + d<s, g> / d phi_{k-1}         the gradient for phi_{k-1}
    d<s, g> / d theta, d<s, g> / d h  for the outer parameters and for the boundary

and so needs second derivatives of l_k, but no other step's activations. Forward keeps the fast
weights before each step, and runs on the fast ops. Backward goes through the steps from the last to
the first: it makes one step's graph anew, on what can be differentiated twice (the ops' references,
attention written out), takes the products above, and lets the graph go.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function

from memdlm.backbone import Activations, Backbone, Context
from memdlm.config import MemoryConfig
from memdlm.data.collator import State
from memdlm.fast_weights import FastWeights
from memdlm.inner_loop import Boundary, InnerTrace, adapt, step_loss
from memdlm_kernels import fast_weight_sgd, reference_ops

_TWICE_DIFFERENTIABLE = ("eager", "sdpa")


def check_exact(backbone: Backbone, meta_gradient: str) -> None:
    """Whether the inner steps of a model can be differentiated.

    Args:
        backbone: the split model.
        meta_gradient: `MemoryConfig.meta_gradient`, for the error text.

    Raises:
        ValueError: an attention whose backward has no derivative, or one with dropout, whose draw
            would be another when it is recomputed.
    """
    implementation = backbone.config._attn_implementation
    if implementation not in _TWICE_DIFFERENTIABLE:
        raise ValueError(
            f"meta_gradient must be 'first_order' with attn_implementation {implementation!r}, "
            f"which cannot be differentiated twice, got {meta_gradient!r}"
        )
    if getattr(backbone.config, "attention_dropout", 0.0):
        raise ValueError(
            "meta_gradient must be 'first_order' with attention_dropout above 0, got "
            f"{meta_gradient!r}"
        )


def unroll(
    backbone: Backbone,
    fast_weights: FastWeights,
    states: list[State],
    boundaries: list[Boundary | None],
    teachers: list[Boundary | None],
    clean_ids: Tensor,
    attention_mask: Tensor | None,
    config: MemoryConfig,
) -> tuple[Tensor, InnerTrace]:
    """Write the fast weights as `adapt` does, and stay connected to what they were written with.

    The recomputed step stores its activations, whatever `inner_checkpoint` and the model's own
    gradient checkpointing say; the layers below the boundary follow the latter.

    Args:
        backbone: the split model; see `check_exact`.
        fast_weights: the store that is written; `reset` comes before.
        states: K states, in the order they are visited.
        boundaries: K; the anchor's has its graph, which the gradient goes into. None for a state
            whose layers below the boundary are run here, and again in backward, to differentiate
            them; another state's boundary is a constant.
        teachers: K, from `teacher_boundaries`; constants.
        clean_ids: [B, L] int64, the tokens without noise.
        attention_mask: [B, L] bool or None.
        config: the inner loop's options.

    Returns:
        [S, T] the written fast weights, in the dtype of `FastWeights.param`, differentiable with
        respect to the model's parameters and the anchor's activations; and the trace.
    """
    unrolled = _Unrolled(backbone, fast_weights, clean_ids, attention_mask, config)
    trace, snapshots, kept = unrolled.write(states, boundaries, teachers)
    anchors = [
        boundary
        for state, boundary in zip(states, boundaries, strict=True)
        if boundary is not None and state["is_anchor"]
    ]
    anchor = _floating(anchors[0].activations) if anchors else []
    written: Tensor = _Adjoint.apply(
        unrolled, snapshots, kept, len(anchor), *anchor, *_trained_parameters(backbone)
    )
    return written, trace


@dataclass(frozen=True)
class _Saved:
    """A boundary whose activations stand in a list of tensors, which autograd saves and lets go.

    Attributes:
        context: the boundary's.
        first, count: which of the tensors are its activations.
    """

    context: Context
    first: int
    count: int

    def boundary(self, kept: Sequence[Tensor]) -> Boundary:
        """It, with the tensors of the list."""
        hidden, *ffn = kept[self.first : self.first + self.count]
        return Boundary(Activations(hidden, tuple(ffn)), self.context)


@dataclass(frozen=True)
class _Visit:
    """What backward needs to make an inner step again, beside the fast weights before it.

    Attributes:
        state: rows, targets and weights.
        start: where it starts; None where the layers below run anew.
        teacher: where its teacher starts, or None.
        skipped: [S] bool, sets whose update was left out.
        random: states of the default generators before it, the CPU's and the device's.
    """

    state: State
    start: _Saved | None
    teacher: _Saved | None
    skipped: Tensor
    random: tuple[Tensor, Tensor | None]


class _Unrolled:
    """The steps of one batch, in the order they were taken."""

    def __init__(
        self,
        backbone: Backbone,
        fast_weights: FastWeights,
        clean_ids: Tensor,
        attention_mask: Tensor | None,
        config: MemoryConfig,
    ) -> None:
        self._backbone = backbone
        self._fast_weights = fast_weights
        self._clean_ids = clean_ids
        self._attention_mask = attention_mask
        self._config = config
        self._segments = fast_weights.segments
        self._device = clean_ids.device
        kind = self._device.type
        self._autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._visits: list[_Visit] = []

    def write(
        self,
        states: list[State],
        boundaries: list[Boundary | None],
        teachers: list[Boundary | None],
    ) -> tuple[InnerTrace, list[Tensor], list[Tensor]]:
        """Take the steps one by one.

        Returns:
            The trace; the fast weights before and after each step; the activations that are kept.
        """
        once = dataclasses.replace(self._config, inner_epochs=1)
        visits = list(zip(states, boundaries, teachers, strict=True)) * self._config.inner_epochs
        snapshots, traces = [self._fast_weights.param.clone()], []
        kept: list[Tensor] = []
        places = {id(part): _save(part, kept) for part in (*boundaries, *teachers)}
        for state, boundary, teacher in visits:
            random = _random_states(self._device)
            start = boundary
            if start is None:
                with torch.no_grad(), record_function("memdlm.noisier_prefix"):
                    start = self._start(state)
            trace = adapt(self._backbone, self._fast_weights, [state], [start], [teacher], once)
            snapshots.append(self._fast_weights.param.clone())
            traces.append(trace)
            places_of_step = places[id(boundary)], places[id(teacher)]
            self._visits.append(_Visit(state, *places_of_step, trace.skipped[0], random))
        loss, norm, skipped = (
            torch.cat([getattr(trace, name) for trace in traces])
            for name in ("loss", "norm", "skipped")
        )
        return InnerTrace(loss, norm, skipped), snapshots, kept

    def _start(self, state: State) -> Boundary:
        """Run a state's layers below the boundary."""
        ids = state["input_ids"]
        context = self._backbone.context(ids, self._attention_mask, state["rows"])
        return Boundary(self._backbone.prefix(ids, context, self._clean_ids), context)

    def adjoint(
        self,
        grad: Tensor,
        snapshots: Sequence[Tensor],
        kept: Sequence[Tensor],
        anchor: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """From the gradient of the written fast weights to those of all that they depend on.

        Args:
            grad: [S, T], of the fast weights after the last step.
            snapshots: the fast weights before each step.
            kept: what `write` returned.
            anchor: the floating-point tensors of the anchor's activations.
            parameters: the outer parameters.

        Returns:
            Gradients of `anchor`, then of `parameters`; None where there is none.
        """
        totals: list[Tensor | None] = [None] * (len(anchor) + len(parameters))
        for visit, before in zip(reversed(self._visits), reversed(snapshots), strict=True):
            with torch.enable_grad(), _replayed(visit.random, self._device), self._as_forward():
                grad, below, own = self._adjoint_of_step(
                    visit, before, kept, grad, anchor, parameters
                )
            found = [*(below or [None] * len(anchor)), *own]
            totals = [_sum(total, value) for total, value in zip(totals, found, strict=True)]
            del below, own, found  # or they would stand beside the next step's graph
        return totals

    def _adjoint_of_step(
        self,
        visit: _Visit,
        before: Tensor,
        kept: Sequence[Tensor],
        grad: Tensor,
        anchor: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor | None] | None, list[Tensor | None]]:
        """Gradients of the fast weights before the step, of the anchor (or None), of parameters."""
        if visit.start is None:
            start = self._start(visit.state)
            reached = _floating(start.activations)
        else:
            start = visit.start.boundary(kept)
            reached = list(anchor) if visit.state["is_anchor"] else []
        phi = before.detach().requires_grad_()
        leaves = [part.detach().requires_grad_(part.requires_grad) for part in reached]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        teacher = None if visit.teacher is None else visit.teacher.boundary(kept)
        # A compiled attention has no second derivative: it runs as it was written.
        with torch.compiler.set_stance("force_eager"):
            updated = self._step(visit, phi, start, teacher, leaves)
        first, *others = torch.autograd.grad(
            updated, [phi, *wanted, *parameters], grad, allow_unused=True
        )
        del updated  # the graph of the step: that of the layers below comes next
        rest = iter(others[: len(wanted)])
        below = [next(rest) if leaf.requires_grad else None for leaf in leaves]
        own: list[Tensor | None] = list(others[len(wanted) :])
        if visit.start is not None:
            return first, below if reached else None, own
        ends = [
            (part, value) for part, value in zip(reached, below, strict=True) if value is not None
        ]
        if ends:
            outputs, values = zip(*ends, strict=True)
            through = torch.autograd.grad(outputs, parameters, values, allow_unused=True)
            own = [_sum(one, other) for one, other in zip(own, through, strict=True)]
        return first, None, own

    def _step(
        self,
        visit: _Visit,
        phi: Tensor,
        start: Boundary,
        teacher: Boundary | None,
        leaves: Sequence[Tensor],
    ) -> Tensor:
        """The inner step as a function of the fast weights before it, twice differentiable.

        A set that was skipped reads constants everywhere, so that nothing that was not finite comes
        back as 0 * NaN, and stays as it is.
        """
        config, keep = self._config, ~visit.skipped  # [S]
        state = visit.state
        per_token = keep.expand(len(state["sample"])) if len(keep) == 1 else keep[state["sample"]]
        state = {**state, "weight": state["weight"].where(per_token, 0)}
        own = _replaced(start.activations, leaves) if leaves else start.activations.detach()
        start = Boundary(_kept(own, keep), start.context)
        if teacher is not None:
            teacher = Boundary(_kept(teacher.activations, keep), teacher.context)
        read = self._fast_weights.read_dtype
        values = phi.where(keep[:, None], 0).to(read)
        with reference_ops(), sdpa_kernel(SDPBackend.MATH):
            loss = step_loss(
                self._backbone,
                state,
                start,
                teacher,
                self._fast_weights.reading_of(values),
                self._backbone.head(),
                len(keep),
                config,
                recompute=False,
            )
            (gradient,) = torch.autograd.grad(loss.sum(), values, create_graph=True)
        updated, _, _ = fast_weight_sgd(
            phi,
            gradient,
            self._segments,
            config.inner_lr,
            config.inner_max_norm,
            clip=config.inner_clip,
        )
        return updated

    def _as_forward(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast as it was: backward is outside of it."""
        kind = self._device.type
        return torch.autocast(
            kind, self._autocast, enabled=self._autocast is not None, cache_enabled=False
        )


class _Adjoint(torch.autograd.Function):
    """The written fast weights, whose backward goes back through the steps that wrote them."""

    @staticmethod
    def forward(
        ctx: Any,
        unrolled: _Unrolled,
        snapshots: list[Tensor],
        kept: list[Tensor],
        anchors: int,
        *inputs: Tensor,
    ) -> Tensor:
        *before, written = snapshots
        ctx.unrolled, ctx.ends = unrolled, (anchors, len(inputs), len(inputs) + len(before))
        # Parameters too: torch then refuses a backward after they were changed.
        ctx.save_for_backward(*inputs, *before, *kept)
        return written

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        anchors, inputs, snapshots = ctx.ends
        saved = ctx.saved_tensors
        found = ctx.unrolled.adjoint(
            grad,
            saved[inputs:snapshots],
            saved[snapshots:],
            saved[:anchors],
            saved[anchors:inputs],
        )
        return None, None, None, None, *found


def _save(boundary: Boundary | None, kept: list[Tensor]) -> _Saved | None:
    """Put a boundary's activations into a list, without their graph."""
    if boundary is None:
        return None
    own = boundary.activations.detach()
    first = len(kept)
    kept += [own.hidden, *own.ffn]
    return _Saved(boundary.context, first, len(kept) - first)


def _trained_parameters(backbone: Backbone) -> list[Tensor]:
    """All that the outer loop trains, each once."""
    head = (part for part in backbone.head() if part is not None)
    found = {id(p): p for p in (*backbone.decoder.parameters(), *head) if p.requires_grad}
    return list(found.values())


def _floating(activations: Activations) -> list[Tensor]:
    """What a gradient can go into."""
    parts = (activations.hidden, *activations.ffn)
    return [part for part in parts if part.is_floating_point()]


def _replaced(activations: Activations, parts: Sequence[Tensor]) -> Activations:
    """The same with other floating-point tensors."""
    rest = iter(parts)
    hidden = next(rest)
    ffn = tuple(next(rest) if part.is_floating_point() else part for part in activations.ffn)
    return Activations(hidden, ffn)


def _kept(activations: Activations, keep: Tensor) -> Activations:
    """Ones for the sequences of sets [S] that are not kept: no cosine is undefined there."""

    def kept(part: Tensor) -> Tensor:
        if not part.is_floating_point():
            return part
        sets = keep.repeat_interleave(len(part) // len(keep))
        return part.where(sets.view(-1, *(1,) * (part.dim() - 1)), 1)

    return Activations(kept(activations.hidden), tuple(kept(part) for part in activations.ffn))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _random_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), own


@contextlib.contextmanager
def _replayed(states: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """The default generators as they were: dropout draws again what it drew."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)
        yield
