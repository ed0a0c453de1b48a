"""The vocabularies of LLaDA-MoE, LLaDA and Dream, a larger one, and one of no whole vectors."""

import torch

from memdlm_kernels.masked_cross_entropy import triton


def launch(dtype: torch.dtype) -> None:
    for vocabulary in (157_184, 126_464, 152_064, 262_144, 997):
        logits = torch.empty(16_384, vocabulary, dtype=dtype, device="cuda")
        target = torch.empty(16_384, dtype=torch.int64, device="cuda")
        for softcap in (None, 30.0):
            triton.masked_cross_entropy_(logits, target, -100, softcap)
            nll, lse = triton.masked_cross_entropy(logits, target, -100, softcap)
            triton.masked_cross_entropy_backward(nll, logits, target, nll, lse, -100, softcap)
        triton.scale_rows_(logits, nll, target, -100)
