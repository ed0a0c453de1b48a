"""What may be a batch of prompts or canvases, and their seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor


def checked_token_lists(name: str, sequences: Any, vocabulary: int) -> list[list[int]]:
    """Sequences as lists of token ids.

    Args:
        name: of the argument, for what an error says.
        sequences: B lists, tuples or tensors of token ids, of any lengths, or a tensor [B, L].
        vocabulary: token ids are below this.

    Returns:
        B lists of int.

    Raises:
        ValueError: something else, no sequence, an empty one, or an unknown token.
    """
    rows = _listed(sequences)
    if rows is None:
        raise ValueError(f"{name} must be lists of token ids, got {sequences!r}")
    if not rows:
        raise ValueError(f"{name} must hold at least one list of token ids, got none")
    checked = []
    for number, row in enumerate(rows):
        tokens = _listed(row)
        if tokens is None:
            raise ValueError(f"{name} must be lists of token ids, got {row!r} in number {number}")
        if not tokens:
            raise ValueError(f"{name} must not be empty, got no token in number {number}")
        for token in tokens:
            if not _is_whole(token):
                raise ValueError(
                    f"{name} must hold whole numbers, got {token!r} in number {number}"
                )
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"{name} must hold token ids in [0, {vocabulary}), got {token} in number "
                    f"{number}"
                )
        checked.append([int(token) for token in tokens])
    return checked


def checked_seeds(name: str, seeds: Sequence[int], count: int) -> list[int]:
    """Seeds, one for each sequence.

    Args:
        name: of the sequences, for what an error says.
        seeds: each in [0, 2^63).
        count: how many sequences there are.

    Returns:
        The seeds.

    Raises:
        ValueError: another number of them, or one out of range.
    """
    if len(seeds) != count:
        raise ValueError(f"seeds must be one for each of {count} {name}, got {len(seeds)}")
    for seed in seeds:
        if not _is_whole(seed) or not 0 <= seed < 2**63:
            raise ValueError(f"seeds must be whole numbers in [0, 2^63), got {seed!r}")
    return [int(seed) for seed in seeds]


def _listed(values: Any) -> list[Any] | None:
    """As a list; None for what is no list, tuple or array."""
    if isinstance(values, Tensor | np.ndarray):
        return list(values.tolist()) if values.ndim else None
    return list(values) if isinstance(values, list | tuple | range) else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
