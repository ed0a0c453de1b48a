"""Fused ops for training masked diffusion language models with fast weights (MemDLM).

Dimension legend, used as names throughout: B batch, L length, N = B * L rows, M masked rows,
V vocabulary, D hidden, R rank, E experts, k experts of each row, S sets of fast weights (1, or one
for each sequence), P fast-weight tensors (of grouped_lora_linear: projections; of combine_rows:
places of rows), T fast-weight elements in one set.
"""

from memdlm_kernels._backends import reference_ops
from memdlm_kernels._build import build_info
from memdlm_kernels.backends import list_backends
from memdlm_kernels.combine_rows import combine_rows, spread_rows
from memdlm_kernels.fast_weight_reset import fast_weight_reset_
from memdlm_kernels.fast_weight_sgd import fast_weight_sgd, fast_weight_sgd_
from memdlm_kernels.grouped_linear import grouped_linear
from memdlm_kernels.grouped_lora_linear import grouped_lora_linear
from memdlm_kernels.lora_linear import lora_linear
from memdlm_kernels.lora_swiglu import lora_swiglu
from memdlm_kernels.masked_cross_entropy import masked_cross_entropy
from memdlm_kernels.masked_linear_cross_entropy import masked_linear_cross_entropy
from memdlm_kernels.masked_linear_kl import masked_linear_kl

__all__ = [
    "build_info",
    "combine_rows",
    "fast_weight_reset_",
    "fast_weight_sgd",
    "fast_weight_sgd_",
    "grouped_linear",
    "grouped_lora_linear",
    "list_backends",
    "lora_linear",
    "lora_swiglu",
    "masked_cross_entropy",
    "masked_linear_cross_entropy",
    "masked_linear_kl",
    "reference_ops",
    "spread_rows",
]
