"""From examples to a batch: noise, masked states, row indices and counts, all made on the host.

The device then never has to count or search: every shape is known before the step begins.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.loss import inner_weight, outer_normalizer, outer_weight
from memdlm.schedule import SCHEDULES
from memdlm.trajectory import anchor_mask, loss_mask, trajectory

# A model's input never has a label here; a position that has one may be masked.
IGNORE_INDEX = -100

# With `inner_graph` the rows of all states are padded to this, or to a power of two or one and a
# half times it, whichever fits the largest: few shapes, so few graphs. Less than a third of the
# largest state's rows is then padding, above this size
# (docs/decisions/gpu_engine_options.md counts graphs and padding on streams of batches).
GRAPH_ROWS = 256

_NOISE_STREAM, _MEMORY_STREAM = 0, 1


class State(TypedDict):
    """One noisy version of a batch, with the rows whose loss is taken.

    Keys: `input_ids` [B, L] int64 with masks; `rows` [B, W] int64, positions whose logits the loss
    reads, of each sequence, padded with 0 to a common W of at least 1; `valid` [M] int64, flat
    indices into `rows` of those that are real; `target` [M] int64; `weight` [M] float64; `sample`
    [M] int64, the sequence of each row; `is_anchor` bool. Where M is padded too, the surplus rows
    have target -100, weight 0 and the rest 0.
    """

    input_ids: Tensor
    rows: Tensor
    valid: Tensor
    target: Tensor
    weight: Tensor
    sample: Tensor
    is_anchor: bool


def noise(
    seed: int, epoch: int, example: int, length: int, time_epsilon: float
) -> tuple[float, np.ndarray, int]:
    """The random numbers of one example in one epoch; they depend on nothing else.

    Args:
        seed, epoch, example: what the draw is a function of.
        length: L, tokens of the example without padding.
        time_epsilon: the smallest time.

    Returns:
        t in [time_epsilon, 1); the priorities u [L] float64 in [0, 1); a 63-bit seed for the fast
        weights, from a stream of its own, so that a run without memory sees the same t and u.
    """
    generator = np.random.default_rng([seed, epoch, example, _NOISE_STREAM])
    time = time_epsilon + (1 - time_epsilon) * generator.random()
    priority = generator.random(length)
    memory = np.random.default_rng([seed, epoch, example, _MEMORY_STREAM])
    return time, priority, int(memory.integers(2**63))


def make_state(
    clean_ids: Tensor,
    masked: Tensor,
    in_loss: Tensor,
    row_weight: Tensor,
    mask_token_id: int,
    *,
    right_shift_logits: bool = False,
    width: int | None = None,
    row_count: int | None = None,
    is_anchor: bool = False,
) -> State:
    """Mask tokens, and list the rows whose loss is taken.

    Args:
        clean_ids: [B, L] int64.
        masked: [B, L] bool, the tokens that become `mask_token_id`.
        in_loss: [B, L] bool, the tokens whose loss is taken, among the masked.
        row_weight: [B] float64, weight of each row's tokens.
        mask_token_id: the mask token.
        right_shift_logits: a token's logits are those of the position before it (Dream); the first
            token, which has none before, takes its own.
        width: W, at least the largest count of a row; None for just that.
        row_count: M, at least the number of loss rows; None for just that.
        is_anchor: whether this is the anchor state.

    Returns:
        A `State`.
    """
    counts = in_loss.sum(1)
    if width is None:
        width = max(1, int(counts.max()))
    sample, position = in_loss.nonzero(as_tuple=True)
    # The place of each loss row among those of its own sequence.
    first = counts.cumsum(0) - counts
    place = torch.arange(len(sample)) - first[sample]
    rows = torch.zeros(len(clean_ids), width, dtype=torch.int64)
    rows[sample, place] = (position - 1).clamp_min(0) if right_shift_logits else position
    surplus = 0 if row_count is None else row_count - len(sample)
    return State(
        input_ids=clean_ids.masked_fill(masked, mask_token_id),
        rows=rows,
        valid=F.pad(sample * width + place, (0, surplus)),
        target=F.pad(clean_ids[in_loss], (0, surplus), value=IGNORE_INDEX),
        weight=F.pad(row_weight[sample], (0, surplus)),
        sample=F.pad(sample, (0, surplus)),
        is_anchor=is_anchor,
    )


def changed_rows(
    maskable: Tensor, *, right_shift_logits: bool = False, block_size: int | None = None
) -> Tensor:
    """The positions that `prefix_reuse` computes anew for every state of a trajectory.

    Args:
        maskable: [B, L] bool.
        right_shift_logits: as for `make_state`: the rows of the loss are one position before.
        block_size: of block diffusion, whose tokens see their whole block.

    Returns:
        [B, C] int64: the maskable tokens, the rows of their loss, and the others of their blocks.
        Shorter rows are filled up with their last position, or 0 where there is none.
    """
    changed = maskable
    if right_shift_logits:
        changed = maskable | F.pad(maskable[:, 1:], (0, 1))
    if block_size is not None:
        block = torch.arange(maskable.shape[1]) // block_size
        per_block = torch.zeros_like(maskable, dtype=torch.int64).index_add(
            1, block, maskable.long()
        )
        changed = per_block[:, block] > 0
    count = changed.sum(1, keepdim=True)
    places = torch.arange(max(1, int(count.max())))
    first = (~changed).int().argsort(dim=1, stable=True)  # [B, L], those that change before others
    return first.gather(1, places.minimum((count - 1).clamp_min(0)))


def _graph_rows(count: int) -> int:
    return _round_up(max(1, count), max(GRAPH_ROWS, 1 << max(0, count.bit_length() - 2)))


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def make_trajectory(
    clean_ids: Tensor,
    maskable: Tensor,
    priority: Tensor,
    anchor: Tensor,
    time: Tensor,
    scale: Tensor,
    mask_token_id: int,
    diffusion: DiffusionConfig,
    memory: MemoryConfig,
    *,
    right_shift_logits: bool = False,
) -> list[State]:
    """The K states that one pass of the inner loop visits.

    Args:
        clean_ids: [B, L] int64.
        maskable: [B, L] bool.
        priority: [B, L] float64, the draw that made `anchor`.
        anchor: [B, L] bool, masked set of the anchor.
        time: [B] float64; read by "anchor_only" alone, the others weigh by a state's own share.
        scale: [B] float64, the examples' data weights.
        mask_token_id: the mask token.
        diffusion: schedule, weights and norm.
        memory: strategy, K, targets, scope.
        right_shift_logits: as for `make_state`.

    Returns:
        K states; those that are not the anchor share one width, so they run in one batch. With
        `inner_graph` all K share one width and one M, see `GRAPH_ROWS`.
    """
    schedule = SCHEDULES[diffusion.schedule]
    masks = trajectory(
        memory.strategy, memory.inner_steps, memory.pre_anchor_scale, priority, maskable, anchor
    )
    steps = range(len(masks))
    losses = [loss_mask(memory.strategy, memory.inner_targets, masks, anchor, k) for k in steps]
    last = len(masks) - 1
    is_anchor = [
        memory.strategy == "anchor_only" or (memory.strategy == "anchor_consistent" and k == last)
        for k in steps
    ]
    most = [max(1, int(mask.sum(1).max())) for mask in losses]
    noisier = [width for width, at in zip(most, is_anchor, strict=True) if not at]
    if memory.inner_graph:
        widths: list[int | None] = [_graph_rows(max(most))] * len(most)
        row_count = _graph_rows(max(int(mask.sum()) for mask in losses))
    else:
        widths = [None if at else max(noisier) for at in is_anchor]
        row_count = None
    states = []
    for k in steps:
        share = masks[k].sum(1) / maskable.sum(1).clamp_min(1).double()
        at = time if memory.strategy == "anchor_only" else schedule.time_at(share)
        weight = schedule.weight(at) if diffusion.loss_weight == "schedule" else torch.ones_like(at)
        target_count = losses[k].sum(1)
        states.append(
            make_state(
                clean_ids,
                masks[k],
                losses[k],
                inner_weight(diffusion.loss_norm, memory.scope, weight * scale, target_count),
                mask_token_id,
                right_shift_logits=right_shift_logits,
                width=widths[k],
                row_count=row_count,
                is_anchor=is_anchor[k],
            )
        )
    return states


@dataclass
class MaskCollator:
    """Makes batches for `MDLMObjective` and, with a `memory` config, for `MemDLMObjective`.

    Attributes:
        mask_token_id: the mask token, below vocab_size.
        pad_token_id: fills sequences up to the longest; padding is never seen nor masked.
        vocab_size: V.
        diffusion: noise and outer loss.
        memory: the inner loop, None for plain MDLM.
        seed: the run's seed; with an example's `epoch` and `example` it decides every draw.
        pad_to_multiple_of: round L up to a multiple of this.
        max_padding: pad to this length always, None for the longest of the batch.
        anchor_ratio: mask tokens with this probability instead of one from a drawn time; in (0, 1].
            For a memory that is written from prompts: 0.2, with `loss_weight` "uniform".
        right_shift_logits: the model's: the logits of a position are those of the next token.

    Raises:
        ValueError: an id outside the vocabulary, a ratio outside (0, 1].
    """

    mask_token_id: int
    pad_token_id: int
    vocab_size: int
    diffusion: DiffusionConfig
    memory: MemoryConfig | None = None
    seed: int = 0
    pad_to_multiple_of: int = 1
    max_padding: int | None = None
    anchor_ratio: float | None = None
    right_shift_logits: bool = False

    def __post_init__(self) -> None:
        for name in ("mask_token_id", "pad_token_id"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < self.vocab_size:
                raise ValueError(
                    f"{name} must be a token id in [0, vocab_size = {self.vocab_size}), got {value}"
                )
        if self.anchor_ratio is not None and not 0 < self.anchor_ratio <= 1:
            raise ValueError(f"anchor_ratio must be in (0, 1], got {self.anchor_ratio}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of must be at least 1, got {self.pad_to_multiple_of}"
            )

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            features: examples with `input_ids` and `labels` (equal lengths; a label is -100, or the
                token itself where it may be masked), `example` and `epoch` (whole numbers), and
                optionally `weight` (a number, at least 0, that multiplies the example's loss).

        Returns:
            `input_ids` and `labels` [B, L] int64; `attention_mask` [B, L] bool, absent where
            nothing is padded; `time` [B] float64; `maskable_count` and `memory_seed` [B] int64;
            `normalizer`, the batch's own, a number; `right_shift_logits`, the collator's; `anchor`,
            a `State` whose weights lack the normaliser; with memory also `trajectory`, K `State`s;
            with `prefix_reuse` also `changed`, see `changed_rows`.

        Raises:
            ValueError: labels that disagree with the ids, lengths that differ, an id outside the
                vocabulary, a bad weight.
        """
        ids, labels, visible = self._pad(features)
        batch_size, length = ids.shape
        time = torch.empty(batch_size, dtype=torch.float64)
        priority = torch.ones(batch_size, length, dtype=torch.float64)
        memory_seed = torch.empty(batch_size, dtype=torch.int64)
        for b, feature in enumerate(features):
            own_length = len(feature["input_ids"])
            time[b], own_priority, memory_seed[b] = noise(
                self.seed,
                int(feature["epoch"]),
                int(feature["example"]),
                own_length,
                self.diffusion.time_epsilon,
            )
            priority[b, :own_length] = torch.from_numpy(own_priority)
        scale = torch.tensor([data_weight(f) for f in features], dtype=torch.float64)

        schedule = SCHEDULES[self.diffusion.schedule]
        if self.anchor_ratio is not None:
            time = schedule.time_at(torch.full_like(time, self.anchor_ratio))
        maskable = labels != IGNORE_INDEX
        maskable_count = maskable.sum(1)
        anchor = anchor_mask(priority, maskable, schedule.mask_probability(time))
        weighted = self.diffusion.loss_weight == "schedule"
        row_weight = (schedule.weight(time) if weighted else torch.ones_like(time)) * scale
        weight = outer_weight(self.diffusion.loss_norm, row_weight, maskable_count)
        batch: dict[str, Any] = {
            "input_ids": ids,
            "labels": labels,
            "time": time,
            "maskable_count": maskable_count,
            "normalizer": outer_normalizer(self.diffusion.loss_norm, maskable_count),
            "memory_seed": memory_seed,
            "right_shift_logits": self.right_shift_logits,
        }
        if not bool(visible.all()):
            batch["attention_mask"] = visible
        width = None
        if self.memory is not None:
            batch["trajectory"] = make_trajectory(
                ids,
                maskable,
                priority,
                anchor,
                time,
                scale,
                self.mask_token_id,
                self.diffusion,
                self.memory,
                right_shift_logits=self.right_shift_logits,
            )
            # One prefix serves the outer pass and the anchor's inner step: one width.
            own = [state for state in batch["trajectory"] if state["is_anchor"]]
            width = own[0]["rows"].shape[1] if own else None
            if self.memory.prefix_reuse == "prompt_kv":
                batch["changed"] = changed_rows(
                    maskable,
                    right_shift_logits=self.right_shift_logits,
                    block_size=self.diffusion.block_size,
                )
        batch["anchor"] = make_state(
            ids,
            anchor,
            anchor,
            weight,
            self.mask_token_id,
            right_shift_logits=self.right_shift_logits,
            width=width,
            is_anchor=True,
        )
        return batch

    def _pad(self, features: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
        lengths = [len(feature["input_ids"]) for feature in features]
        longest = max(lengths)
        if self.max_padding is not None:
            if longest > self.max_padding:
                raise ValueError(
                    f"input_ids must have at most max_padding = {self.max_padding} tokens, "
                    f"got {longest}"
                )
            longest = self.max_padding
        longest = _round_up(longest, self.pad_to_multiple_of)
        ids = torch.full((len(features), longest), self.pad_token_id, dtype=torch.int64)
        labels = torch.full_like(ids, IGNORE_INDEX)
        visible = torch.zeros_like(ids, dtype=torch.bool)
        for b, (feature, length) in enumerate(zip(features, lengths, strict=True)):
            own_ids = torch.as_tensor(feature["input_ids"], dtype=torch.int64)
            own_labels = torch.as_tensor(feature["labels"], dtype=torch.int64)
            check_example(own_ids, own_labels, feature["example"], self.vocab_size)
            ids[b, :length] = own_ids
            labels[b, :length] = own_labels
            visible[b, :length] = True
        return ids, labels, visible


def check_example(ids: Tensor, labels: Tensor, example: int, vocab_size: int) -> None:
    """Check that an example can be masked.

    Args:
        ids: [L] int64.
        labels: [L] int64, each -100 or the token itself.
        example: its number, for the message.
        vocab_size: V.

    Raises:
        ValueError: lengths that differ, an id outside the vocabulary, labels that disagree.
    """
    if ids.shape != labels.shape:
        raise ValueError(
            f"labels must have the length of input_ids, got {len(labels)} and {len(ids)} "
            f"in example {example}"
        )
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(
            f"input_ids must be in [0, vocab_size = {vocab_size}), got {int(ids.min())} to "
            f"{int(ids.max())} in example {example}"
        )
    wrong = (labels != IGNORE_INDEX) & (labels != ids)
    if bool(wrong.any()):
        where = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must be {IGNORE_INDEX} or equal input_ids, got label {int(labels[where])} for "
            f"token {int(ids[where])} at position {where} of example {example}"
        )


def data_weight(feature: Mapping[str, Any]) -> float:
    """The number that multiplies an example's loss: its `weight`, or 1.

    Args:
        feature: with `example`, its number, for the message.

    Raises:
        ValueError: not a finite number of at least 0.
    """
    weight = feature.get("weight", 1.0)
    if not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
        raise ValueError(
            f"weight must be a finite number, at least 0, got {weight!r} in example "
            f"{feature['example']}"
        )
    return float(weight)
