"""The inner loop: K steps of SGD that write the fast weights along a trajectory of noisy states."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.profiler import record_function

from memdlm.backbone import Activations, Backbone, Context
from memdlm.config import MemoryConfig
from memdlm.data.collator import State
from memdlm.fast_weights import FastWeights
from memdlm.inner_loss import has_teacher, token_losses
from memdlm.recorded_keys import RecordedKeys
from memdlm.trajectory import following

# "auto" stores a step's activations as long as they fill at most this share of the free memory.
_STORED_SHARE = 0.25

# Of each backbone: what "auto" decided, by the bytes of a step's activations, the device, and
# whether the model trains.
_decided: WeakKeyDictionary[Backbone, dict[tuple[int, torch.device, bool], bool]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True)
class InnerTrace:
    """What the inner steps saw, on the device; nothing here waits for it.

    Attributes:
        loss: [steps, S] float32 (float64 for a float64 model), each step's loss before its update.
        norm: [steps, S, P], gradient norms before clipping.
        skipped: [steps, S] bool, updates left out because a loss or gradient was not finite.
        captured: with `inner_graph`, whether these shapes were new, so that a graph was captured;
            None without.
    """

    loss: Tensor
    norm: Tensor
    skipped: Tensor
    captured: bool | None = None


@dataclass(frozen=True)
class Reuse:
    """What the noisier states' prefix may take from the anchor's pass (`prefix_reuse`).

    Attributes:
        changed: [B, C] int64, positions that are computed for every state.
        anchor: the anchor's activations at the boundary.
        recorded: keys and values of its pass.
    """

    changed: Tensor
    anchor: Activations
    recorded: RecordedKeys


@dataclass(frozen=True)
class Boundary:
    """Where an inner step starts.

    Attributes:
        activations: what `Backbone.prefix` made of a state's tokens; an inner step reads them
            without their graph.
        context: the `Context` they were made with.
    """

    activations: Activations
    context: Context


def pre_anchor_boundaries(
    backbone: Backbone,
    states: list[State],
    clean_ids: Tensor,
    attention_mask: Tensor | None,
    reuse: Reuse | None = None,
) -> list[Boundary]:
    """Run the prefix of several states as one batch, without a graph.

    Args:
        backbone: the split model.
        states: states of equal shape [B, L] and width W; may be empty.
        clean_ids: [B, L] int64, the tokens without noise.
        attention_mask: [B, L] bool or None.
        reuse: compute changed positions alone, and take the others from the anchor's pass.

    Returns:
        One boundary per state.
    """
    if not states:
        return []
    ids = torch.cat([state["input_ids"] for state in states])
    rows = torch.cat([state["rows"] for state in states])
    mask = None if attention_mask is None else attention_mask.repeat(len(states), 1)
    with torch.no_grad(), record_function("memdlm.noisier_prefix"):
        together = backbone.context(ids, mask, rows)
        if reuse is None:
            clean = clean_ids.repeat(len(states), 1)
            activations = backbone.prefix(ids, together, clean)
        else:
            activations = backbone.prefix_of_changes(
                ids, together, reuse.changed, reuse.anchor, reuse.recorded
            )
    first = states[0]
    context = backbone.context(first["input_ids"], attention_mask, first["rows"])
    return [
        Boundary(own, dataclasses.replace(context, rows=state["rows"]))
        for own, state in zip(activations.chunk(len(states)), states, strict=True)
    ]


def teacher_boundaries(
    backbone: Backbone,
    states: list[State],
    anchor_ids: Tensor,
    clean_ids: Tensor,
    attention_mask: Tensor | None,
    config: MemoryConfig,
) -> list[Boundary | None]:
    """Run the prefix of what follows each state, at the state's own loss rows, without a graph.

    Args:
        backbone: the split model.
        states: K states, in the order of the trajectory.
        anchor_ids: [B, L] int64, the tokens of the anchor.
        clean_ids: [B, L] int64, the tokens without noise: what follows where no state does.
        attention_mask: [B, L] bool or None.
        config: `inner_loss` and `strategy`.

    Returns:
        For each state where its teacher starts; None where the inner loss has no teacher.
    """
    if not has_teacher(config):
        return [None] * len(states)
    teachers: list[Boundary | None] = []
    for step, state in enumerate(states):
        after = following(config.strategy, step, len(states))
        ids = clean_ids
        if after is not None:
            ids = anchor_ids if after == "anchor" else states[after]["input_ids"]
        ahead: State = {**state, "input_ids": ids}
        teachers += pre_anchor_boundaries(backbone, [ahead], clean_ids, attention_mask)
    return teachers


def adapt(
    backbone: Backbone,
    fast_weights: FastWeights,
    states: list[State],
    boundaries: list[Boundary],
    teachers: list[Boundary | None],
    config: MemoryConfig,
) -> InnerTrace:
    """Write the fast weights: `inner_epochs` passes of K SGD steps, first order.

    Each step runs the suffix on one state's boundary, takes the loss of its masked rows and updates
    the fast weights in place; no graph outlives its step. Call `fast_weights.reset` before.

    Args:
        backbone: the split model; its suffix reads the fast weights.
        fast_weights: the store that is written.
        states: K states, in the order they are visited.
        boundaries: K boundaries, one for each state.
        teachers: K, from `teacher_boundaries`.
        config: the inner loop's options.

    Returns:
        The trace of inner_epochs * K steps.
    """
    weight, bias = backbone.head()
    head = weight.detach(), None if bias is None else bias.detach()
    recompute = recomputes(config.inner_checkpoint, backbone, boundaries)
    memory = fast_weights.reading(trainable=True)
    losses, norms, skips = [], [], []
    leaves = fast_weights.leaves
    visits = list(zip(states, boundaries, teachers, strict=True)) * config.inner_epochs
    with backbone.constant_suffix():
        for state, boundary, teacher in visits:
            start = Boundary(boundary.activations.detach(), boundary.context)
            with torch.enable_grad():
                per_set = step_loss(
                    backbone,
                    state,
                    start,
                    teacher,
                    memory,
                    head,
                    len(fast_weights.param),
                    config,
                    recompute=recompute or None,
                )
                # The sets do not touch each other, so one backward of the sum serves them all.
                with record_function("memdlm.inner_backward"):
                    gradients = torch.autograd.grad(per_set.sum(), leaves, allow_unused=True)
            loss = per_set.detach()
            with record_function("memdlm.update"):
                norm, skipped = fast_weights.step(gradients, loss)
            losses.append(loss)
            norms.append(norm)
            skips.append(skipped)
    return InnerTrace(torch.stack(losses), torch.stack(norms), torch.stack(skips))


def step_loss(
    backbone: Backbone,
    state: State,
    start: Boundary,
    teacher: Boundary | None,
    memory: contextlib.AbstractContextManager[None],
    head: tuple[Tensor, Tensor | None],
    sets: int,
    config: MemoryConfig,
    *,
    recompute: bool | None,
) -> Tensor:
    """The loss of one inner step, with its graph.

    Args:
        backbone: the split model.
        state: rows, targets and weights.
        start: the state's boundary.
        teacher: the boundary of what follows the state, or None.
        memory: the context under which the suffix reads the fast weights.
        head: weight [V, D] and bias [V] or None.
        sets: S.
        config: the inner loss.
        recompute: as for `Backbone.suffix`.

    Returns:
        [S], of each set of fast weights.
    """
    with record_function("memdlm.inner_suffix"):
        ahead = None
        if teacher is not None:
            with torch.no_grad():
                ahead = backbone.suffix(
                    teacher.activations, state["valid"], teacher.context, memory
                )  # [M, D]
        rows = backbone.suffix(
            start.activations, state["valid"], start.context, memory, recompute=recompute
        )  # [M, D]
    with record_function("memdlm.inner_loss"):
        losses = token_losses(config, rows, ahead, *head, state["target"])
        weighted = losses * state["weight"].to(losses.dtype)  # [M]
        return _sum_per_set(weighted, state["sample"], sets)


def _sum_per_set(values: Tensor, sample: Tensor, sets: int) -> Tensor:
    """Sum [M] into [S]: everything where S is 1, else by sequence."""
    if sets == 1:
        return values.sum()[None]
    return values.new_zeros(sets).index_add(0, sample, values)


def recomputes(choice: str, backbone: Backbone, boundaries: list[Boundary]) -> bool:
    """Whether the inner steps recompute their layers instead of storing the activations.

    "auto" is decided the first time that a backbone sees a shape, in training or in evaluation, and
    stays: asking for the free memory at every step costs time on a GPU, and its answer then moves
    with whatever else the process or another one holds just then. Where memory was short that once,
    the shape's layers are recomputed to the end.

    Args:
        choice: `MemoryConfig.inner_checkpoint`.
        backbone: the split model.
        boundaries: those of the steps.

    Returns:
        True to recompute.
    """
    if choice != "auto":
        return choice == "layer"
    hidden = max((boundary.activations.hidden for boundary in boundaries), key=Tensor.numel)
    layers = (backbone.half_count - backbone.boundary + 1) // 2
    values = hidden.shape[:2].numel() * layers * backbone.activation_width
    stored = values * hidden.element_size()
    training = bool(backbone.decoder.training)
    decided = _decided.setdefault(backbone, {})
    key = stored, hidden.device, training
    if key not in decided:
        to_come = _still_to_come(backbone) if training else 0
        decided[key] = stored > _STORED_SHARE * (free_bytes(hidden.device) - to_come)
    return decided[key]


def _still_to_come(backbone: Backbone) -> int:
    """Bytes that training takes after its first step began: gradients and two moments."""
    trained = (p for p in backbone.decoder.parameters() if p.requires_grad)
    return sum(3 * parameter.nbytes for parameter in trained)


def free_bytes(device: torch.device) -> int:
    """The memory that new tensors can have.

    Args:
        device: a CPU or a GPU.

    Returns:
        On a GPU what the driver has left, and what PyTorch's allocator holds without using it; on a
        CPU also what the system keeps files in and would give up (Linux; elsewhere without that).
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    available = re.search(r"^MemAvailable: +(\d+) kB$", _meminfo(), re.MULTILINE)
    if available is not None:
        return int(available[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _meminfo() -> str:
    path = Path("/proc/meminfo")
    return path.read_text(encoding="utf-8") if path.is_file() else ""


@contextlib.contextmanager
def untouched_generators(device: torch.device) -> Iterator[None]:
    """Restore the default generators afterwards, so that dropout in here shifts no draw outside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield
