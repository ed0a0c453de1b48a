import torch

from memdlm_kernels.combine_rows import triton

# Rows, experts of each, D, dtype of the weights (None: as rows).
_SIZES = (
    (8192, 8, 2048, None),  # LLaDA-MoE, LLaDA2-mini
    (8192, 8, 2048, torch.float32),  # a router that weighs in float32
    (8192, 6, 4096, None),
    (100, 10, 2048, None),  # more than are on their way at once
    (100, 1, 100, None),
    (100, 2, 33, torch.float32),  # nothing is aligned
)


def launch(dtype: torch.dtype) -> None:
    for count, choices, columns, weight_dtype in _SIZES:
        places = count * choices
        rows = torch.empty(places, columns, dtype=dtype, device="cuda")
        index = torch.empty(count, choices, dtype=torch.int64, device="cuda")
        weight = torch.empty(count, choices, dtype=weight_dtype or dtype, device="cuda")
        for own in (weight, None):
            out = triton.combine_rows(rows, index, own, dtype)
        grad_out = torch.empty_like(out)
        of_a_sum = torch.empty((), dtype=dtype, device="cuda").expand(count, columns)
        for grad in (grad_out, of_a_sum):
            triton.combine_rows_backward(grad, rows, index, weight, places, dtype, True)
        triton.combine_rows_backward(grad_out, rows, index, weight, places, dtype, False)
        triton.combine_rows_backward(grad_out, None, index, weight, places, dtype, True)
        triton.spread_rows(grad_out, index, places)
