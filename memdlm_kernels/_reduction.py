"""From per-row NLL to a loss, and the checks on it: the same for every cross-entropy here."""

import torch
from torch import Tensor

_REDUCTIONS = ("none", "sum", "mean")


def check_reduction(
    target: Tensor, token_weight: Tensor | None, reduction: str, normalizer: float | Tensor | None
) -> None:
    if token_weight is not None:
        if not token_weight.is_floating_point():
            raise ValueError(f"token_weight must be floating-point, got {token_weight.dtype}")
        if token_weight.shape != target.shape:
            raise ValueError(
                f"token_weight must be {list(target.shape)} like target, "
                f"got {list(token_weight.shape)}"
            )
        if token_weight.device != target.device:
            raise ValueError(
                f"token_weight must be on target's device {target.device}, "
                f"got {token_weight.device}"
            )
    if reduction not in _REDUCTIONS:
        names = ", ".join(repr(name) for name in _REDUCTIONS)
        raise ValueError(f"reduction must be one of {names}, got {reduction!r}")
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f"normalizer must be None unless reduction='mean', got {normalizer!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must have one element, got {list(normalizer.shape)}")
    elif not normalizer > 0:
        raise ValueError(f"normalizer must be positive, got {normalizer}")


def check_targets(target: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Raise unless every target is a token or ignored. Reads values: waits for a device."""
    if target.numel() == 0:
        return
    lowest, highest = torch.aminmax(target)
    if lowest.item() >= 0 and highest.item() < vocabulary:  # one pass where no row is ignored
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= vocabulary))
    if bad.any():
        raise ValueError(
            f"target must be in [0, {vocabulary}) or ignore_index {ignore_index}, "
            f"got {target[bad][0].item()}"
        )


def reduce_nll(
    nll: Tensor,
    target: Tensor,
    token_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    normalizer: float | Tensor | None,
) -> Tensor:
    """Weight and reduce nll in its own dtype; no row left gives 0, connected to the graph."""
    if token_weight is not None:
        nll = nll * token_weight.to(nll.dtype)
    if reduction == "none":
        return nll
    total = nll.sum()
    if reduction == "sum":
        return total
    if normalizer is None:
        normalizer = (target != ignore_index).sum().clamp(min=1)
    elif isinstance(normalizer, Tensor):
        normalizer = normalizer.reshape(())
    return total / normalizer


def is_eager_cpu(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
