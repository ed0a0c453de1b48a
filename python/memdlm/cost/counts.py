"""How many rows the parts of a step see: of a batch that is there, or to be expected of one."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StateCounts:
    """Rows of one noisy state whose loss is taken.

    Attributes:
        rows: M, of the whole batch.
        width: W, of the sequence that has the most; all are padded to it.
    """

    rows: float
    width: float


@dataclass(frozen=True)
class BatchCounts:
    """What decides the cost of a step on one batch.

    Attributes:
        batch_size: B.
        length: L.
        anchor: the anchor state.
        noisier: the states of the trajectory before it, in the order they are visited.
        anchor_visits: how many inner steps visit the anchor, after those.
        changed: C, positions of each sequence that the noisier states compute under
            `prefix_reuse`; None for all.
    """

    batch_size: int
    length: int
    anchor: StateCounts
    noisier: tuple[StateCounts, ...] = ()
    anchor_visits: int = 0
    changed: int | None = None

    @classmethod
    def of(cls, batch: dict[str, Any]) -> "BatchCounts":
        """Count a batch.

        Args:
            batch: from `MaskCollator`; every state that is the anchor comes after those that are
                not.
        """
        batch_size, length = batch["input_ids"].shape
        states = batch.get("trajectory", [])
        noisier = tuple(_count(state) for state in states if not state["is_anchor"])
        return cls(
            batch_size,
            length,
            _count(batch["anchor"]),
            noisier,
            len(states) - len(noisier),
            batch["changed"].shape[1] if "changed" in batch else None,
        )


def _count(state: Any) -> StateCounts:
    return StateCounts(len(state["valid"]), state["rows"].shape[1])


def expected_counts(
    batch_size: int,
    length: int,
    maskable: int,
    inner_steps: int,
    *,
    strategy: str = "anchor_consistent",
    scale: float = 1.5,
    changed: int | None = None,
) -> BatchCounts:
    """The mean over batches, with the linear schedule: the masked share r is uniform in (0, 1).

    Products are linear in every count, so the cost at the mean is the mean of the cost.

    Args:
        batch_size: B.
        length: L.
        maskable: tokens of each sequence that may be masked.
        inner_steps: K; 0 for plain MDLM.
        strategy: "anchor_consistent" or "anchor_only".
        scale: the noisiest state masks a share of min(1, scale * r).
        changed: see `BatchCounts`.

    Returns:
        Means, so not whole numbers.
    """
    rows = batch_size * maskable
    anchor = StateCounts(rows / 2, maskable * _mean_of_largest(batch_size, 1.0))
    if strategy == "anchor_only" or inner_steps < 2:
        return BatchCounts(batch_size, length, anchor, (), inner_steps)
    noisiest = _mean_of_largest(1, scale)
    # All noisier states are padded to the width of the noisiest.
    width = maskable * _mean_of_largest(batch_size, scale)
    reveal = (noisiest - 0.5) / (inner_steps - 1)
    noisier = tuple(
        StateCounts(rows * (noisiest - step * reveal), width) for step in range(inner_steps - 1)
    )
    return BatchCounts(batch_size, length, anchor, noisier, 1, changed)


def _mean_of_largest(count: int, scale: float) -> float:
    """E[min(1, scale * max of `count` draws)], each uniform in (0, 1)."""
    # The largest has density n r^(n - 1); the minimum is reached at r = 1 / scale.
    reached = 1 / scale
    below: float = scale * count / (count + 1) * reached ** (count + 1)
    return below + 1 - reached**count
