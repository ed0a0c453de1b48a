"""masked_cross_entropy on a GPU: of the rows that are ignored only the gradient is written.

Forward reads a row, backward reads it again and writes its gradient: three transfers. Were the
gradient made in forward and kept, forward would read and write, and backward read and write to
scale it: four, and the gradient would lie beside the logits from forward to backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memdlm_kernels._triton.cross_entropy import (
    LOWEST,
    add_words,
    expm1,
    load_logits,
    load_others,
    times_slope,
    write_nll,
)

_WIDEST_BLOCK = 8192  # words that a program holds at a time


@triton.jit
def forward_row_kernel(
    logits,
    target,
    reference,
    others,
    target_logit,
    words,
    logits_row,
    ignore_index,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    if label == ignore_index:
        return
    logits += row * logits_row
    chosen = tl.full([], float("nan"), tl.float32)  # stays where the target is no word
    if (label >= 0) & (label < words):
        chosen = load_logits(logits, None, label, words, softcap, False, SOFTCAP)
    tl.store(target_logit + row, chosen)
    highest = tl.full([], LOWEST, tl.float32)
    summed = tl.full([], 0.0, tl.float32)
    for start in range(0, words, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = load_others(logits, None, column, words, label, softcap, False, SOFTCAP)  # [BV]
        highest, summed = add_words(value, highest, summed)
    tl.store(reference + row, highest)
    tl.store(others + row, summed)


@triton.jit
def gradient_kernel(
    grad_logits,
    logits,
    target,
    nll,
    lse,
    grad_nll,
    words,
    grad_row,
    logits_row,
    ignore_index,
    softcap,
    GRAD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_logits may be logits: what a program writes it alone has read."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BV]
    label = tl.load(target + row)
    grad_logits += row * grad_row + column
    value = tl.zeros([BLOCK], tl.float32)
    if label != ignore_index:
        logits += row * logits_row
        logit = load_logits(logits, None, column, words, softcap, False, SOFTCAP)  # [BV]
        # The target's p - 1 in float32: rounded first, a confident token would lose it.
        missing = expm1(-tl.load(nll + row))
        value = tl.where(column == label, missing, tl.exp(logit - tl.load(lse + row)))
        value = times_slope(value, logit, softcap, SOFTCAP)
        if GRAD:
            value *= tl.load(grad_nll + row)
    tl.store(grad_logits, value.to(grad_logits.dtype.element_ty), mask=column < words)


@triton.jit
def scale_rows_kernel(
    grad_logits, target, grad_nll, words, grad_row, ignore_index, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BV]
    grad_logits += row * grad_row + column
    grad = tl.load(grad_nll + row)
    # Zeros stay zeros, and a sum's gradient is 1: nothing is read.
    if (tl.load(target + row) != ignore_index) & (grad != 1.0):
        value = tl.load(grad_logits, mask=column < words, other=0.0).to(tl.float32)  # [BV]
        tl.store(grad_logits, (value * grad).to(grad_logits.dtype.element_ty), mask=column < words)


def masked_cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    rows, words = _rows(logits)
    target = target.contiguous()
    nll = logits.new_empty(target.shape, dtype=torch.float32)
    lse = torch.empty_like(nll)
    block, warps = _block(words)
    if target.numel() > 0:
        state = (torch.empty_like(nll), torch.empty_like(nll), torch.empty_like(nll))
        forward_row_kernel[(target.numel(),)](
            rows,
            target,
            *state,
            words,
            rows.stride(0),
            ignore_index,
            softcap or 0.0,
            SOFTCAP=softcap is not None,
            BLOCK=block,
            num_warps=warps,
        )
        write_nll(target.view(-1), nll, lse, state, None, ignore_index, softcap, 1.0)
    return nll, lse


def masked_cross_entropy_backward(
    grad_nll: Tensor,
    logits: Tensor,
    target: Tensor,
    nll: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
) -> Tensor:
    grad_logits = logits.new_empty(logits.shape)
    _write_gradient(
        grad_logits, grad_nll.contiguous(), logits, target, nll, lse, ignore_index, softcap
    )
    return grad_logits


def masked_cross_entropy_(
    logits: Tensor, target: Tensor, ignore_index: int, softcap: float | None
) -> tuple[Tensor, Tensor]:
    nll, lse = masked_cross_entropy(logits, target, ignore_index, softcap)
    _write_gradient(logits, None, logits, target, nll, lse, ignore_index, softcap)
    return nll, lse


def scale_rows_(grad_logits: Tensor, grad_nll: Tensor, target: Tensor, ignore_index: int) -> None:
    rows, words = _rows(grad_logits)
    block, warps = _block(words)
    if target.numel() > 0:
        scale_rows_kernel[(target.numel(), triton.cdiv(words, block))](
            rows,
            target.contiguous(),
            grad_nll.contiguous(),
            words,
            rows.stride(0),
            ignore_index,
            BLOCK=block,
            num_warps=warps,
        )


def _write_gradient(
    grad_logits: Tensor,
    grad_nll: Tensor | None,
    logits: Tensor,
    target: Tensor,
    nll: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
) -> None:
    out, words = _rows(grad_logits)
    rows, _ = _rows(logits)
    block, warps = _block(words)
    if target.numel() > 0:
        gradient_kernel[(target.numel(), triton.cdiv(words, block))](
            out,
            rows,
            target.contiguous(),
            nll,
            lse,
            grad_nll,
            words,
            out.stride(0),
            rows.stride(0),
            ignore_index,
            softcap or 0.0,
            GRAD=grad_nll is not None,
            SOFTCAP=softcap is not None,
            BLOCK=block,
            num_warps=warps,
        )


def _rows(logits: Tensor) -> tuple[Tensor, int]:
    """(logits as a matrix with contiguous rows, its words)."""
    words = logits.shape[-1]
    if logits.dim() == 2 and logits.stride(1) == 1:  # rows may lie apart
        return logits, words
    return logits.reshape(-1, words).contiguous(), words


def _block(words: int) -> tuple[int, int]:
    """(words, warps) of a program."""
    block = min(triton.next_power_of_2(words), _WIDEST_BLOCK)
    return block, max(4, block // 512)
