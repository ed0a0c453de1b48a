"""Noise schedules: how many tokens stay visible at time t, and what a token's loss then weighs."""

import math

from torch import Tensor

# Keeps the weight finite at t = 0; part of the published definition.
_EPSILON = 1e-6


class LinearSchedule:
    """alpha(t) = 1 - t: at time t each token is masked with probability t."""

    def mask_probability(self, time: Tensor) -> Tensor:
        """1 - alpha(t), elementwise, for `time` in [0, 1]."""
        return time

    def time_at(self, mask_share: Tensor) -> Tensor:
        """The time at which 1 - alpha(t) = `mask_share`, in [0, 1], elementwise."""
        return mask_share

    def weight(self, time: Tensor) -> Tensor:
        """w(t) = -alpha'(t) / (1 - alpha(t) + 1e-6), elementwise."""
        return 1.0 / (time + _EPSILON)


class CosineSchedule:
    """alpha(t) = 1 - cos(pi/2 (1 - t))."""

    def mask_probability(self, time: Tensor) -> Tensor:
        """1 - alpha(t), elementwise, for `time` in [0, 1]."""
        return (math.pi / 2 * (1 - time)).cos()

    def time_at(self, mask_share: Tensor) -> Tensor:
        """The time at which 1 - alpha(t) = `mask_share`, in [0, 1], elementwise."""
        return 1 - mask_share.arccos() * (2 / math.pi)

    def weight(self, time: Tensor) -> Tensor:
        """w(t) = -alpha'(t) / (1 - alpha(t) + 1e-6), elementwise."""
        slope = math.pi / 2 * (math.pi / 2 * (1 - time)).sin()
        return slope / (self.mask_probability(time) + _EPSILON)


SCHEDULES: dict[str, LinearSchedule | CosineSchedule] = {
    "linear": LinearSchedule(),
    "cosine": CosineSchedule(),
}
