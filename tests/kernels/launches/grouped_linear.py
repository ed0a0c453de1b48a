"""LLaDA-MoE (64 experts of 1024) and LLaDA2-mini (256 experts of 512), over many and few rows."""

import torch

from memdlm_kernels.grouped_linear import triton


def launch(dtype: torch.dtype) -> None:
    for experts, inner, rows in ((64, 1024, 65_536), (256, 512, 65_536)):
        _both(rows, experts, 2048, 2 * inner, dtype)
        _both(rows, experts, inner, 2048, dtype)
    # Few rows of each expert: smaller tiles.
    for rows in (64 * 64, 64 * 16):
        _both(rows, 64, 2048, 1024, dtype)
    # Sizes that are no multiple of 16 bytes: no vectors.
    for rows in (65_536, 64 * 16):
        _both(rows, 64, 2047, 1023, dtype)
    if dtype == torch.float32:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        _both(65_536, 64, 2048, 2048, dtype)
        torch.backends.cuda.matmul.fp32_precision = before


def _both(rows: int, experts: int, columns: int, out: int, dtype: torch.dtype) -> None:
    x = torch.empty(rows, columns, dtype=dtype, device="cuda")
    weight = torch.empty(experts, out, columns, dtype=dtype, device="cuda")
    offsets = torch.empty(experts, dtype=torch.int32, device="cuda")
    grad_out = triton.grouped_linear(x, weight, offsets)
    triton.grouped_linear(grad_out, weight.mT, offsets)
    triton.grouped_linear_outer(grad_out, x, offsets)
