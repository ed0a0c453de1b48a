"""How alike two gradients are, group by group, and how they scatter over batches."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Gradient = Mapping[str, Tensor]
Groups = Mapping[str, Sequence[str]]


def cosine(one: Gradient, other: Gradient, names: Sequence[str]) -> float | None:
    """Cosine of two gradients, taken as one vector of all named parameters, in float64.

    Args:
        one: parameter name to gradient.
        other: likewise.
        names: the parameters that count.

    Returns:
        In [-1, 1]; None where one of them is zero.
    """
    norms = _norm(one, names) * _norm(other, names)
    if norms == 0:
        return None
    dots = [(one[name].double() * other[name].double()).sum() for name in names]
    return max(-1.0, min(1.0, torch.stack(dots).sum().item() / norms))


def likeness(own: Gradient, truth: Gradient, groups: Groups) -> dict[str, list[float | None]]:
    """Compare an approximate gradient with the true one.

    Args:
        own: parameter name to gradient.
        truth: likewise.
        groups: group to names.

    Returns:
        Group to cosine, ||own|| / ||truth|| and ||own - truth|| / ||truth||; None where a norm to
        divide by is zero.
    """
    found: dict[str, list[float | None]] = {}
    for group, names in groups.items():
        length = _norm(truth, names)
        gaps = {name: own[name].double() - truth[name].double() for name in names}
        ratios = [_norm(part, names) / length if length else None for part in (own, gaps)]
        found[group] = [cosine(own, truth, names), *ratios]
    return found


class Scatter:
    """The mean of the gradients of several batches, and how far they lie around it."""

    def __init__(self) -> None:
        self._sum: dict[str, Tensor] = {}
        self._squares: dict[str, float] = {}
        self._count = 0

    def add(self, gradient: Gradient) -> None:
        """Count one batch's gradient in, parameter name to tensor."""
        self._count += 1
        for name, value in gradient.items():
            wide = value.double()
            self._sum[name] = self._sum[name] + wide if name in self._sum else wide
            own = wide.square().sum().item()
            self._squares[name] = self._squares.get(name, 0.0) + own

    def mean(self) -> dict[str, Tensor]:
        """Parameter name to mean gradient, float64."""
        return {name: total / self._count for name, total in self._sum.items()}

    def noise(self, groups: Groups) -> dict[str, float | None]:
        """Standard deviation of one batch's gradient around the mean, over the mean's norm.

        Args:
            groups: group to names.

        Returns:
            Group to sqrt(sum ||g - mean||^2 / (n - 1)) / ||mean||; None where the mean is zero.
        """
        mean, found = self.mean(), dict[str, float | None]()
        for group, names in groups.items():
            length = _norm(mean, names)
            squares = sum(self._squares[name] for name in names)
            variance = max(0.0, squares - self._count * length**2) / (self._count - 1)
            found[group] = math.sqrt(variance) / length if length else None
        return found


def _norm(gradient: Mapping[str, Any], names: Sequence[str]) -> float:
    squares = [gradient[name].double().square().sum() for name in names]
    return math.sqrt(torch.stack(squares).sum().item())
