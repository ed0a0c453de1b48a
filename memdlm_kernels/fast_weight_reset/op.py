"""fast_weight_reset_: public function, checks, registration, backend order. It has no autograd."""

import torch
from torch import Tensor

from memdlm_kernels._backends import CPU, CUDA, REFERENCE, choose
from memdlm_kernels._library import op
from memdlm_kernels._segments import check_cast, check_segments, check_written
from memdlm_kernels.fast_weight_reset import compiled, reference

_LARGEST_ROW = 4 * 2**32  # elements: four for each value of one 32-bit counter word


def fast_weight_reset_(
    param: Tensor,
    segments: Tensor,
    bounds: Tensor,
    seed: Tensor,
    *,
    cast: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Draw every fast weight afresh, uniform within its own bound, in place.

    Replaces `param[s, p].uniform_(-bounds[p], bounds[p], generator=...)` for each segment p of each
    row s: one pass of writes, no loop over tensors, no wait for the device. The numbers depend on
    the seed, the column and the bound alone: the same on every backend and device, and in whichever
    row of whichever batch a sequence stands. With `cast` also `cast.copy_(param)`, in the same
    pass.

    Args:
        param: [S, T], floating-point, T at most 2**34. Written in place, outside autograd.
        segments: [P + 1] int64, ascending from 0 to T: fast weight p is columns
            segments[p]:segments[p + 1], and may be empty. Values are checked on the CPU only.
        bounds: [P] float32 or float64, finite, at least 0: 1 / sqrt(in) for A, 0 for B, which
            writes zeros. Values are checked on the CPU only.
        seed: [S] int64, any value, one for each row.
        cast: [S, T], floating-point of another dtype than param, or None; receives param rounded.
        backend: "cpu", "cuda" or "reference"; None takes the first that fits.

    Returns:
        None. param[s, j] is (2u - 1) * bounds[p] in float32 (in float64 for a float64 param), cast
        to param's dtype, with u = (word >> 8) / 2**24 and word the (j % 4)-th of Philox4x32-10 with
        key seed[s] and counter (j // 4, 0, 0, 0).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or the backend cannot
            run.

    Source: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    _check(param, segments, bounds, seed, cast)
    backend = choose("fast_weight_reset_", _ORDER, backend, param.device)
    with torch.no_grad():
        if backend == "reference":
            param.copy_(reference.fast_weight_reset(param, segments, bounds, seed))
            if cast is not None:
                cast.copy_(param)
        else:
            _reset(param, segments, bounds, seed, cast, backend)


def _check(
    param: Tensor, segments: Tensor, bounds: Tensor, seed: Tensor, cast: Tensor | None
) -> None:
    check_written("param", param)
    if param.shape[1] > _LARGEST_ROW:
        raise ValueError(f"param must have at most {_LARGEST_ROW} columns, got {param.shape[1]}")
    check_segments(segments, param)
    if cast is not None:
        check_cast(cast, param)
    count = segments.shape[0] - 1
    if bounds.shape != (count,) or bounds.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"bounds must be float32 or float64 [P] = [{count}], "
            f"got {bounds.dtype} {list(bounds.shape)}"
        )
    if seed.shape != param.shape[:1] or seed.dtype != torch.int64:
        raise ValueError(
            f"seed must be int64 [S] = [{param.shape[0]}], got {seed.dtype} {list(seed.shape)}"
        )
    for name, tensor in (("bounds", bounds), ("seed", seed)):
        if tensor.device != param.device:
            raise ValueError(
                f"{name} must be on param's device {param.device}, got {tensor.device}"
            )
    if bounds.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not ((bounds >= 0) & bounds.isfinite()).all():
        raise ValueError(f"bounds must be finite and at least 0, got {bounds.tolist()}")


_ORDER = (CPU, CUDA, REFERENCE)


@op("fast_weight_reset_", mutates=("param", "cast"))
def _reset(
    param: Tensor,
    segments: Tensor,
    bounds: Tensor,
    seed: Tensor,
    cast: Tensor | None,
    backend: str,
) -> None:
    # `backend` has been chosen by the device, as the compiled op will.
    compiled.fast_weight_reset_(param, segments, bounds, seed, cast)


@_reset.register_fake
def _(
    param: Tensor,
    segments: Tensor,
    bounds: Tensor,
    seed: Tensor,
    cast: Tensor | None,
    backend: str,
) -> None:
    return None
