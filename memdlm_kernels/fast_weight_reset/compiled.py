"""fast_weight_reset_ in C++ (csrc/cpu) or CUDA (csrc/cuda): one op, the tensors' device chooses."""

import torch
from torch import Tensor


def fast_weight_reset_(
    param: Tensor, segments: Tensor, bounds: Tensor, seed: Tensor, cast: Tensor | None
) -> None:
    work, work_cast = _adjacent(param), None if cast is None else _adjacent(cast)
    torch.ops.memdlm_C.fast_weight_reset_(
        work, segments.contiguous(), bounds.contiguous(), seed.contiguous(), work_cast
    )
    if work is not param:
        param.copy_(work)
    if cast is not None and work_cast is not None and work_cast is not cast:
        cast.copy_(work_cast)


def _adjacent(flat: Tensor) -> Tensor:
    """`flat`, or space for it with adjacent columns, which the kernels want; rows lie anywhere."""
    return flat if flat.stride(1) == 1 else flat.new_empty(flat.shape)
