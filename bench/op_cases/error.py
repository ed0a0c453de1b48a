"""How far results are from the truth."""

from collections.abc import Sequence

import torch
from torch import Tensor


def largest_error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest error of the results, each relative to the norm of its truth.

    Args:
        results: outputs and gradients, any floating-point dtype.
        truth: the same in float64.

    Returns:
        Norm of the difference over the norm of the truth (over 1 where that is 0); infinity where
        counts or shapes differ, NaN where a result has one.
    """
    if [tensor.shape for tensor in results] != [tensor.shape for tensor in truth]:
        return float("inf")
    errors = []
    for actual, expected in zip(results, truth, strict=True):
        size = expected.norm()
        errors.append((actual.double() - expected).norm() / torch.where(size > 0, size, 1.0))
    # Not Python's max(), which may pass over a NaN.
    return torch.stack(errors).max().item()
