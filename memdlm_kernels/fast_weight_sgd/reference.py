"""fast_weight_sgd_ in plain PyTorch: the oracle. Never optimised; never waits for the device."""

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
    """The update as a function: (new param, norm, skipped); differentiable, as often as needed."""
    norm_dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    rows, columns = param.shape

    column = torch.arange(columns, device=param.device)
    segment = torch.searchsorted(segments[1:].contiguous(), column, right=True)  # [T]
    segment = segment.expand(rows, columns)
    # A square in double neither overflows nor underflows, whatever the float32 gradient.
    square = torch.zeros(rows, segments.numel() - 1, dtype=torch.float64, device=param.device)
    square = square.scatter_add(1, segment, grad.double().square())  # [S, P]
    norm = _sqrt(square)  # [S, P]

    per_tensor = clip == "tensor"  # [S, T], else [S, 1]
    clip_norm = norm.gather(1, segment) if per_tensor else _sqrt(square.sum(1, keepdim=True))
    # No gradient at all leaves the factor at lr, and gives no NaN.
    ratio = max_norm / clip_norm.where(clip_norm > 0, torch.ones_like(clip_norm))
    clipping = (clip_norm > max_norm) if clip != "none" else torch.zeros_like(clip_norm).bool()
    factor = lr * torch.where(clipping, ratio, torch.ones_like(ratio))

    norm = norm.to(norm_dtype)
    skipped = ~norm.isfinite().all(1)  # [S]
    if loss is not None:
        skipped = skipped | ~loss.isfinite()
    # In double too: clipping a huge gradient takes a factor too small for float32.
    updated = param.double() - factor * grad.double()
    return torch.where(skipped[:, None], param, updated.to(param.dtype)), norm, skipped


def _sqrt(square: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero, not infinite (the first dA is exactly zero)."""
    positive = square > 0
    root = square.where(positive, torch.ones_like(square)).sqrt()
    # `square` rather than zero keeps a NaN a NaN.
    return torch.where(positive, root, square)
