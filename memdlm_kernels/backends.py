"""Which backends each op has, and why one is refused here: `memdlm env` prints it."""

from collections.abc import Mapping
from typing import Any

import torch

from memdlm_kernels.combine_rows import op as combine_rows
from memdlm_kernels.fast_weight_reset import op as fast_weight_reset
from memdlm_kernels.fast_weight_sgd import op as fast_weight_sgd
from memdlm_kernels.grouped_linear import op as grouped_linear
from memdlm_kernels.grouped_lora_linear import op as grouped_lora_linear
from memdlm_kernels.lora_linear import op as lora_linear
from memdlm_kernels.lora_swiglu import op as lora_swiglu
from memdlm_kernels.masked_cross_entropy import op as masked_cross_entropy
from memdlm_kernels.masked_linear_cross_entropy import op as masked_linear_cross_entropy
from memdlm_kernels.masked_linear_kl import op as masked_linear_kl

_DTYPE = torch.bfloat16
_HIDDEN, _INNER, _RANK, _EXPERTS = 2048, 1024, 32, 64

# What the backends look at beside the device: a layer of LLaDA-MoE in bfloat16.
_OPS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "combine_rows": (combine_rows, (_DTYPE,)),
    "fast_weight_reset_": (fast_weight_reset, ()),
    "fast_weight_sgd": (fast_weight_sgd, ()),
    "fast_weight_sgd_": (fast_weight_sgd, ()),
    "grouped_linear": (grouped_linear, (_DTYPE, _HIDDEN, 2 * _INNER, _EXPERTS)),
    "grouped_lora_linear": (
        grouped_lora_linear,
        (_DTYPE, _HIDDEN, 2 * _INNER, _RANK, 2, _EXPERTS),
    ),
    "lora_linear": (lora_linear, (_DTYPE,)),
    "lora_swiglu": (lora_swiglu, (_DTYPE, _EXPERTS)),
    "masked_cross_entropy": (masked_cross_entropy, (_DTYPE,)),
    "masked_linear_cross_entropy": (masked_linear_cross_entropy, (_DTYPE,)),
    "masked_linear_kl": (masked_linear_kl, (_DTYPE,)),
    "spread_rows": (combine_rows, (_DTYPE,)),
}


def list_backends(device: torch.device | str) -> dict[str, dict[str, str | None]]:
    """What `backend=` can be for each op, for tensors of a layer in bfloat16 on a device.

    Args:
        device: where the tensors are.

    Returns:
        Name of the op to its backends, preferred first: name to the reason why it is refused, None
        where it can run. The first that can is what `backend=None` takes.
    """
    device = torch.device(device)
    return {
        name: {backend.name: backend.unfit(device, *facts) for backend in op._ORDER}
        for name, (op, facts) in _OPS.items()
    }
