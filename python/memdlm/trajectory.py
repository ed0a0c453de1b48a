"""Which tokens are masked in each state of the simulated denoising trajectory.

One priority u per token decides everything: "the n tokens with the smallest u among the maskable"
is the masked set of every state, so the sets nest and the same u gives the same states again.
"""

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

# The noisiest and the cleanest share of the "progressive" strategy.
_PROGRESSIVE_SHARES = (Fraction(8, 10), Fraction(2, 10))


def anchor_mask(priority: Tensor, maskable: Tensor, probability: Tensor) -> Tensor:
    """Masked set of the anchor state x_t: maskable tokens whose priority is below the probability.

    Args:
        priority: [B, L] float, u ~ U(0, 1), one draw per token.
        maskable: [B, L] bool, the tokens that may be masked.
        probability: [B] float in (0, 1], p_b = 1 - alpha(t_b).

    Returns:
        [B, L] bool.

    Raises:
        ValueError: a probability outside (0, 1].
    """
    if not bool(((probability > 0) & (probability <= 1)).all()):
        raise ValueError(f"probability must be in (0, 1], got {probability.tolist()}")
    return maskable & (priority < probability[:, None])


def smallest(priority: Tensor, maskable: Tensor, count: Tensor) -> Tensor:
    """The `count[b]` maskable tokens of row b with the smallest priority, as a [B, L] bool mask."""
    order = priority.masked_fill(~maskable, float("inf")).argsort(dim=1, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return maskable & (rank < count[:, None])


def state_counts(
    strategy: str, inner_steps: int, scale: float, anchor: int, maskable: int
) -> list[int]:
    """How many tokens of one row each of the K states masks.

    Args:
        strategy: a `MemoryConfig.strategy`.
        inner_steps: K, at least 1.
        scale: `MemoryConfig.pre_anchor_scale`.
        anchor: masked tokens of the row's anchor state.
        maskable: maskable tokens of the row.

    Returns:
        K counts, never rising.
    """
    noisiest = max(anchor, min(maskable, int(Fraction(str(scale)) * anchor)))
    if strategy == "anchor_only":
        return [anchor] * inner_steps
    if strategy == "pre_anchor_only":
        return [noisiest] * inner_steps
    if strategy == "progressive":
        first, last = _PROGRESSIVE_SHARES
        if inner_steps == 1:
            return [int(last * maskable)]
        drop = (first - last) / (inner_steps - 1)
        return [int((first - drop * step) * maskable) for step in range(inner_steps)]
    counts = [noisiest] if inner_steps > 1 else [anchor]
    for reveals_left in range(inner_steps - 1, 0, -1):
        to_reveal = -(-(counts[-1] - anchor) // reveals_left)  # ceil
        counts.append(counts[-1] - to_reveal)
    return counts


def trajectory(
    strategy: str,
    inner_steps: int,
    scale: float,
    priority: Tensor,
    maskable: Tensor,
    anchor: Tensor,
) -> list[Tensor]:
    """Masked sets of the K states, noisiest first.

    Args:
        strategy, inner_steps, scale: see `MemoryConfig`.
        priority: [B, L] float, the draw that made `anchor`.
        maskable: [B, L] bool.
        anchor: [B, L] bool, from `anchor_mask` with the same priority.

    Returns:
        K masks [B, L] bool; each contains the next. With "anchor_consistent" the last is `anchor`.
    """
    rows = zip(anchor.sum(1).tolist(), maskable.sum(1).tolist(), strict=True)
    counts = [state_counts(strategy, inner_steps, scale, a, m) for a, m in rows]  # [B][K]
    per_state = torch.tensor(counts, dtype=torch.int64).T  # [K, B]
    return [smallest(priority, maskable, count) for count in per_state]


def following(strategy: str, step: int, count: int) -> int | Literal["anchor"] | None:
    """The state that a trajectory goes to from state `step`.

    Args:
        strategy: `MemoryConfig.strategy`.
        step: which state, from 0.
        count: K.

    Returns:
        Its number; "anchor" behind the states of "pre_anchor_only"; None where there is none:
        behind those of "anchor_only" and the last of the others.
    """
    if strategy == "pre_anchor_only":
        return "anchor"
    return None if strategy == "anchor_only" or step == count - 1 else step + 1


def loss_mask(
    strategy: str, targets: str, states: list[Tensor], anchor: Tensor, step: int
) -> Tensor:
    """Tokens whose loss inner step `step` (from 0) takes.

    Args:
        strategy, targets: `MemoryConfig.strategy` and `MemoryConfig.inner_targets`.
        states: the K masks from `trajectory`.
        anchor: [B, L] bool.
        step: which state.

    Returns:
        [B, L] bool: all masked tokens of the state, or those that the next state reveals, all where
        there is no next one.
    """
    after = following(strategy, step, len(states))
    if targets == "all_masked" or after is None:
        return states[step]
    return states[step] & ~(anchor if after == "anchor" else states[after])
