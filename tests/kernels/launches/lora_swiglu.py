import torch

from memdlm_kernels.lora_swiglu import triton

# Sets, experts (0: a dense layer), rows, in, I, rank, stacked, dtype of A and B (None: as x).
_SIZES = (
    (1, 64, 65_536, 2048, 1024, 32, True, torch.float32),  # LLaDA-MoE
    (8, 64, 65_536, 2048, 1024, 32, True, torch.float32),  # a set for each sequence
    (1, 64, 65_536, 2048, 1024, 32, True, None),
    (1, 256, 65_536, 2048, 512, 32, True, torch.float32),  # LLaDA2-mini
    (1, 256, 8192, 2048, 512, 32, True, torch.float32),  # few rows of each expert
    (1, 64, 65_536, 2048, 1024, 128, True, torch.float32),
    (1, 0, 8192, 4096, 12_288, 8, False, torch.float32),  # LLaDA
    (8, 0, 8192, 4096, 12_288, 32, False, torch.float32),
    (1, 7, 1001, 33, 65, 5, True, torch.float32),  # nothing is aligned
)


def launch(dtype: torch.dtype) -> None:
    for sets, experts, rows, columns, inner, rank, stacked, weight_dtype in _SIZES:
        leading = (rows,) if experts or sets == 1 else (sets, rows // sets)
        own = ((sets,) if sets > 1 else ()) + ((experts,) if experts else ())
        x = _empty(*leading, columns, dtype=dtype)
        gate = _empty(*leading, 2 * inner if stacked else inner, dtype=dtype)
        up = None if stacked else _empty(*leading, inner, dtype=dtype)
        A = _empty(*own, 2 * rank, columns, dtype=weight_dtype or dtype)
        B = _empty(*own, 2 * inner, rank, dtype=weight_dtype or dtype)
        offsets = _empty(*own[::-1], dtype=torch.int32) if experts else None
        for factors in ((A, B), (None, None)):
            h, shrink = triton.lora_swiglu(x, gate, up, *factors, 2.0, offsets, False)
            # Elsewhere the gradients of A and B are the library's, not kernels.
            needs = (True, bool(experts), bool(experts))
            triton.lora_swiglu_backward(h, x, gate, up, shrink, *factors, 2.0, offsets, *needs)


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")
