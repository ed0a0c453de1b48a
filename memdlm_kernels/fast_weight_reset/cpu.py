"""fast_weight_reset_ on the CPU: one pass of writes (csrc/cpu)."""

import torch
from torch import Tensor


def fast_weight_reset_(param: Tensor, segments: Tensor, bounds: Tensor, seed: Tensor) -> None:
    # The kernel wants adjacent columns; rows may lie anywhere.
    work = param if param.stride(1) == 1 else torch.empty(param.shape, dtype=param.dtype)
    torch.ops.memdlm_C.fast_weight_reset_(
        work, segments.contiguous(), bounds.double().contiguous(), seed.contiguous()
    )
    if work is not param:
        param.copy_(work)
