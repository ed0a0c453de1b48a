"""fast_weight_sgd in plain PyTorch: the oracle. Never optimised; never waits for the device."""

import torch
from torch import Tensor


def fast_weight_sgd(
    param: Tensor,
    grad: Tensor,
    segments: Tensor,
    lr: float,
    max_norm: float,
    clip: str,
    loss: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(new param, norm, skipped); the new param is differentiable, as often as needed."""
    norm_dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    rows, columns = param.shape

    column = torch.arange(columns, device=param.device)
    segment = torch.searchsorted(segments[1:].contiguous(), column, right=True)  # [T]
    segment = segment.expand(rows, columns)
    # In double no square of a float32 overflows or underflows, and a clip factor too small for
    # float32 is none too small.
    wide = grad.double()

    norm = _squares(wide.detach(), segment, segments.numel() - 1).sqrt().to(norm_dtype)  # [S, P]
    skipped = ~norm.isfinite().all(1)  # [S]
    if loss is not None:
        skipped = skipped | ~loss.detach().isfinite()

    # A skipped row's derivative is zero, which zero times NaN is not.
    wide = torch.where(skipped[:, None], torch.zeros_like(wide), wide)
    square = _squares(wide, segment, segments.numel() - 1)  # [S, P]
    if clip == "tensor":
        clip_norm = _sqrt(square).gather(1, segment)  # [S, T]
    else:
        clip_norm = _sqrt(square.sum(1, keepdim=True))  # [S, 1]
    clipping = (clip_norm > max_norm) if clip != "none" else torch.zeros_like(clip_norm).bool()
    # Ones where nothing is clipped: neither a norm of zero nor an infinite bound gives a NaN.
    ratio = max_norm / torch.where(clipping, clip_norm, torch.ones_like(clip_norm))
    factor = lr * torch.where(clipping, ratio, torch.ones_like(ratio))
    updated = param.double() - factor * wide
    return torch.where(skipped[:, None], param, updated.to(param.dtype)), norm, skipped


def _squares(wide: Tensor, segment: Tensor, count: int) -> Tensor:
    """Sum of the squares of each segment: [S, P] of [S, T]."""
    square = torch.zeros(len(wide), count, dtype=wide.dtype, device=wide.device)
    return square.scatter_add(1, segment, wide.square())


def _sqrt(square: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero, not infinite (the first dA is exactly zero)."""
    positive = square > 0
    root = square.where(positive, torch.ones_like(square)).sqrt()
    return torch.where(positive, root, torch.zeros_like(root))
