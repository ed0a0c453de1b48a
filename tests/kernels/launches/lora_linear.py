import torch

from memdlm_kernels.lora_linear import triton

# Sets, rows of each, in, out, rank.
_SIZES = (
    (1, 8192, 4096, 12288, 32),  # LLaDA-8B
    (8, 1024, 4096, 12288, 32),  # a set for each sequence
    (8, 100, 4096, 12288, 32),
    (1, 8192, 4096, 12288, 8),
    (1, 8192, 4096, 12288, 64),
    (1, 8192, 4096, 12288, 128),
    (3, 7, 33, 65, 5),  # nothing is aligned
)


def launch(dtype: torch.dtype) -> None:
    for sets, rows, columns, out, rank in _SIZES:
        for weight_dtype in {dtype, torch.float32}:
            own = (sets,) if sets > 1 else ()
            x = torch.empty(*own, rows, columns, dtype=dtype, device="cuda")
            base = torch.empty(*own, rows, out, dtype=dtype, device="cuda")
            A = torch.empty(*own, rank, columns, dtype=weight_dtype, device="cuda")
            B = torch.empty(*own, out, rank, dtype=weight_dtype, device="cuda")
            _, shrink = triton.lora_linear(x, base, A, B, 2.0)
            triton.lora_linear_backward(base, x, shrink, A, B, 2.0, True)
