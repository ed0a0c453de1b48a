"""FLOP counts of the ops: importing this module tells them to `torch.utils.flop_counter`.

It is apart from the package because the counter imports Triton wherever that is installed.
"""

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from memdlm_kernels.combine_rows.op import FLOP_FORMULAS as COMBINE_ROWS
from memdlm_kernels.grouped_linear.op import FLOP_FORMULAS as GROUPED_LINEAR
from memdlm_kernels.grouped_lora_linear.op import FLOP_FORMULAS as GROUPED_LORA_LINEAR
from memdlm_kernels.lora_linear.op import FLOP_FORMULAS as LORA_LINEAR
from memdlm_kernels.lora_swiglu.op import FLOP_FORMULAS as LORA_SWIGLU
from memdlm_kernels.masked_cross_entropy.op import FLOP_FORMULAS as MASKED_CROSS_ENTROPY
from memdlm_kernels.masked_linear_cross_entropy.op import FLOP_FORMULAS as MASKED_LINEAR
from memdlm_kernels.masked_linear_kl.op import FLOP_FORMULAS as MASKED_LINEAR_KL

for _op, _formula in {
    **COMBINE_ROWS,
    **GROUPED_LINEAR,
    **GROUPED_LORA_LINEAR,
    **LORA_LINEAR,
    **LORA_SWIGLU,
    **MASKED_CROSS_ENTROPY,
    **MASKED_LINEAR,
    **MASKED_LINEAR_KL,
}.items():
    _register: Callable[[Any], Any] = register_flop_formula(_op)
    _register(_formula)
