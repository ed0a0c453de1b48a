"""fast_weight_reset_ on the CPU: one pass of writes (csrc/cpu)."""

import torch
from torch import Tensor


def fast_weight_reset_(param: Tensor, segments: Tensor, bounds: Tensor, seed: Tensor) -> None:
    torch.ops.memdlm_C.fast_weight_reset_(param, segments, bounds, seed)
