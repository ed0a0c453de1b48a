"""The heads of LLaDA-MoE (157,184 words), LLaDA (126,464), Dream (152,064), and a larger one."""

from unittest import mock

import torch

from memdlm_kernels.masked_linear_kl import triton


def launch(dtype: torch.dtype) -> None:
    # The libraries' products are no Triton, and fake tensors cannot add to one.
    with mock.patch.object(triton, "product_"):
        for vocabulary, depth in ((157_184, 2048), (126_464, 4096), (152_064, 3584)):
            _both(vocabulary, depth, dtype, bias=False, softcap=None)
        _both(262_144, 8192, dtype, bias=True, softcap=30.0)
        # A vocabulary and a depth that are no multiple of 16: no vectors.
        _both(997, 33, dtype, bias=True, softcap=None)


def _both(vocabulary, depth, dtype, *, bias, softcap) -> None:
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="cuda")

    sides = (empty(2000, depth), empty(2000, depth))
    head = (empty(vocabulary, depth), empty(vocabulary) if bias else None)
    for index in (None, empty(1500, dtype=torch.int64)):
        for direction in ("forward", "reverse"):
            for need_stash in (False, True):
                kl, stash = triton.masked_linear_kl(
                    *sides, *head, index, direction, 2.0, softcap, None, need_stash
                )
            triton.masked_linear_kl_backward(kl, stash, index, 2000, dtype)
