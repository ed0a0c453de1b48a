"""The heads of LLaDA-MoE (157,184 words), LLaDA (126,464), Dream (152,064), and a larger one."""

from unittest import mock

import torch

from memdlm_kernels.masked_linear_cross_entropy import triton

# Bytes of logits in tiles of one block, and in rows of the whole vocabulary.
CHUNK_BYTES = (None, 2**32)


def launch(dtype: torch.dtype) -> None:
    # The libraries' products are no Triton, and fake tensors cannot add to one.
    with mock.patch.object(triton, "product_"):
        for vocabulary, depth in ((157_184, 2048), (126_464, 4096), (152_064, 3584)):
            _all(1500, vocabulary, depth, dtype, bias=False, softcap=None)
        # Past 2 Gi elements.
        _all(16_384, 262_144, 8192, dtype, bias=True, softcap=30.0)
        # A vocabulary and a depth that are no multiple of 16: no vectors.
        _all(300, 997, 33, dtype, bias=True, softcap=None)


def _all(rows, vocabulary, depth, dtype, *, bias, softcap) -> None:
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="cuda")

    hidden, weight = empty(2 * rows, depth), empty(vocabulary, depth)
    target, index = empty(rows, dtype=torch.int64), empty(rows, dtype=torch.int64)
    head = (hidden, weight, target, empty(vocabulary) if bias else None)
    grad_nll = empty(rows, dtype=torch.float32)
    for chunk_bytes in CHUNK_BYTES:
        options = (-100, softcap, chunk_bytes)
        triton.masked_linear_cross_entropy(*head, index, *options, False, False)
        nll, lse, stash = triton.masked_linear_cross_entropy(*head, index, *options, True, False)
        for rows_of in (index, None):
            triton.masked_linear_cross_entropy_stash_backward(
                grad_nll, stash, rows_of, 2 * rows, dtype
            )
            rows_read = hidden if rows_of is not None else hidden.narrow(0, 0, rows)
            triton.masked_linear_cross_entropy_backward(
                grad_nll, rows_read, *head[1:], rows_of, nll, lse, *options, True, True, bias, False
            )
