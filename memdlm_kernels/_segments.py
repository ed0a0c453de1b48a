"""The segment table of a flat buffer of fast weights: which columns are which tensor."""

import torch
from torch import Tensor


def check_flat(name: str, flat: Tensor) -> None:
    """Raise ValueError unless `flat` can hold S sets of T fast weights."""
    if flat.dim() != 2 or not flat.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point tensor [S, T], got {flat.dtype} {list(flat.shape)}"
        )


def check_written(name: str, flat: Tensor) -> None:
    """Raise ValueError unless `flat` can hold S sets of T fast weights and be written in place."""
    check_flat(name, flat)
    if any(
        size > 1 and stride == 0 for size, stride in zip(flat.shape, flat.stride(), strict=True)
    ):
        raise ValueError(
            f"{name} is written in place and must not be expanded, got strides {flat.stride()}"
        )


def check_cast(cast: Tensor, param: Tensor) -> None:
    """Raise ValueError unless `cast` can receive `param` rounded to another dtype."""
    check_written("cast", cast)
    if cast.shape != param.shape or cast.dtype == param.dtype:
        raise ValueError(
            f"cast must be {list(param.shape)}, like param, of another dtype than {param.dtype}, "
            f"got {cast.dtype} {list(cast.shape)}"
        )
    if cast.device != param.device:
        raise ValueError(f"cast must be on param's device {param.device}, got {cast.device}")


def check_segments(segments: Tensor, flat: Tensor) -> None:
    """Raise ValueError unless `segments` [P + 1] cuts the columns of `flat` [S, T] into P segments.

    The values are looked at where that is free: on the CPU, and not while compiling.
    """
    if segments.dim() != 1 or segments.dtype != torch.int64 or segments.numel() == 0:
        raise ValueError(
            f"segments must be an int64 tensor [P + 1], got {segments.dtype} {list(segments.shape)}"
        )
    if segments.device != flat.device:
        raise ValueError(f"segments must be on {flat.device}, got {segments.device}")
    if segments.device.type != "cpu" or torch.compiler.is_compiling():
        return
    columns = flat.shape[1]
    first, last = segments[0].item(), segments[-1].item()
    if first != 0 or last != columns:
        raise ValueError(
            f"segments must start at 0 and end at T = {columns}, got {first} and {last}"
        )
    if (segments[1:] < segments[:-1]).any():
        raise ValueError(f"segments must ascend, got {segments.tolist()}")
