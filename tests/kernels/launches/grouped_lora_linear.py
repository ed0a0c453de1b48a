import torch

from memdlm_kernels.grouped_lora_linear import triton

# Sets, experts, rows, in, out, projections, rank.
_SIZES = (
    (1, 64, 65536, 2048, 2048, 2, 32),  # LLaDA-MoE: gate and up
    (8, 64, 65536, 2048, 2048, 2, 32),  # a set for each sequence
    (1, 256, 65536, 2048, 1024, 2, 32),  # LLaDA2.x-mini
    (16, 256, 65536, 2048, 1024, 2, 32),  # the most groups
    (1, 64, 65536, 2048, 2048, 2, 8),
    (1, 64, 65536, 2048, 2048, 2, 64),
    (1, 64, 65536, 2048, 2048, 2, 128),
    (8, 64, 16384, 2048, 2048, 1, 128),
    (1, 64, 65536, 2048, 2048, 1, 256),
    (1, 7, 1001, 33, 66, 2, 5),  # nothing is aligned
)


def launch(dtype: torch.dtype) -> None:
    for sets, experts, rows, columns, out, projections, rank in _SIZES:
        for weight_dtype in {dtype, torch.float32}:
            x = torch.empty(rows, columns, dtype=dtype, device="cuda")
            base = torch.empty(rows, out, dtype=dtype, device="cuda")
            own = (sets, experts) if sets > 1 else (experts,)
            A = torch.empty(*own, projections * rank, columns, dtype=weight_dtype, device="cuda")
            B = torch.empty(*own, out, rank, dtype=weight_dtype, device="cuda")
            offsets = torch.empty(own[::-1], dtype=torch.int32, device="cuda")
            _, shrink = triton.grouped_lora_linear(x, base, A, B, offsets, 2.0)
            triton.grouped_lora_linear_backward(base, x, shrink, A, B, offsets, 2.0, True)
            if rank == 32 and sets == 1:  # B as PEFT keeps it: the experts' ranks interleaved
                B = torch.empty(out, rank, experts, dtype=weight_dtype, device="cuda")
                triton.grouped_lora_linear(x, base, A, B.permute(2, 0, 1), offsets, 2.0)
