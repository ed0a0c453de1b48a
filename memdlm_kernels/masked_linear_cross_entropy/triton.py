"""masked_linear_cross_entropy on a GPU: the libraries' products, and Triton between them.

The logits are made in tiles of some rows by some words, small enough to stay in the cache, and each
is used up before the next: a kernel takes maximum, sum and the target's logit from it and writes
probabilities over it, and a product multiplies these by W.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memdlm_kernels._triton.add_rows import add_rows, groups, scatter_rows, sum_long_runs
from memdlm_kernels._triton.cross_entropy import (
    LOWEST,
    add_words,
    load_logits,
    load_others,
    store_zeros,
    times_slope,
    write_nll,
)
from memdlm_kernels._triton.product import product_

# Bytes of logits that fit the second-level cache of an A100 (40 MiB) or a later GPU.
_CHUNK_BYTES = 32 * 2**20
# Rows that share one reading of W. With fewer, its products wait for memory.
_FEWEST_ROWS = 1024
_COLUMNS_STEP = 128  # whole tiles of a product, and rows that begin on 16 bytes
_WIDEST_BLOCK = 8192  # words that a program holds at a time


@triton.jit
def forward_tile_kernel(
    logits,
    probabilities,
    bias,
    target,
    reference,
    others,
    target_logit,
    total,
    first_word,
    words,
    depth,
    logits_row,
    probabilities_row,
    total_row,
    ignore_index,
    softcap,
    FIRST: tl.constexpr,
    STASH: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PEAK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    logits += row * logits_row
    probabilities += row * probabilities_row
    if label == ignore_index:
        if STASH:
            store_zeros(probabilities, words, BLOCK)
        return
    label -= first_word
    if BIAS:
        bias += first_word
    if FIRST:
        before = tl.full([], LOWEST, tl.float32)
        summed = tl.full([], 0.0, tl.float32)
        chosen = tl.full([], float("nan"), tl.float32)  # stays where the target is no word
    else:
        before = tl.load(reference + row)
        summed = tl.load(others + row)
        chosen = tl.load(target_logit + row)
    if (label >= 0) & (label < words):
        chosen = load_logits(logits, bias, label, words, softcap, BIAS, SOFTCAP)
    column = tl.arange(0, BLOCK)
    value = load_others(logits, bias, column, words, label, softcap, BIAS, SOFTCAP)  # [BV]
    after, summed = add_words(value, before, summed)
    if WIDE:
        for start in range(BLOCK, words, BLOCK):
            value = load_others(logits, bias, start + column, words, label, softcap, BIAS, SOFTCAP)
            after, summed = add_words(value, after, summed)
    tl.store(reference + row, after)
    tl.store(others + row, summed)
    tl.store(target_logit + row, chosen)
    if STASH:
        if not FIRST:
            total += row * total_row
            scale = tl.exp(before - after)
            for start in range(0, tl.where(after > before, depth, 0), BLOCK_D):
                d = start + tl.arange(0, BLOCK_D)
                part = tl.load(total + d, mask=d < depth, other=0.0)  # [BD]
                tl.store(total + d, part * scale, mask=d < depth)
        for start in range(0, words, BLOCK):
            if WIDE:
                value = load_others(
                    logits, bias, start + column, words, label, softcap, BIAS, SOFTCAP
                )
            p = times_slope(tl.exp(value - after) * PEAK, value, softcap, SOFTCAP)  # [BV]
            # Probabilities of half the size lie over logits of this block and of those before it.
            # All threads of the program must have read theirs.
            tl.debug_barrier()
            p = p.to(probabilities.dtype.element_ty)
            tl.store(probabilities + start + column, p, mask=start + column < words)


@triton.jit
def finish_kernel(
    out,
    total,
    factor,
    coefficient,
    weight,
    target,
    depth,
    vocabulary,
    out_row,
    total_row,
    weight_row,
    ignore_index,
    FACTOR: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = factor * total + coefficient * W[target], zeros where ignored; out may be total."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BD]
    label = tl.load(target + row)
    value = tl.zeros([BLOCK_D], tl.float32)
    if label != ignore_index:
        value = tl.load(total + row * total_row + d, mask=d < depth, other=0.0)
        if FACTOR:
            value *= tl.load(factor + row)
        readable = tl.where((label >= 0) & (label < vocabulary), depth, 0)
        of_target = tl.load(weight + label * weight_row + d, mask=d < readable, other=0.0)
        value += tl.load(coefficient + row) * of_target.to(tl.float32)
    tl.store(out + row * out_row + d, value.to(out.dtype.element_ty), mask=d < depth)


@triton.jit
def backward_tile_kernel(
    logits,
    probabilities,
    bias,
    target,
    lse,
    grad_nll,
    first_word,
    words,
    logits_row,
    probabilities_row,
    ignore_index,
    softcap,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_nll * p * slope of the softcap over the logits, 0 at the target and where ignored."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(target + row)
    logits += row * logits_row
    probabilities += row * probabilities_row
    if label == ignore_index:
        store_zeros(probabilities, words, BLOCK)
        return
    label -= first_word
    if BIAS:
        bias += first_word
    total = tl.load(lse + row)
    grad = tl.load(grad_nll + row)
    for start in range(0, words, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = load_others(logits, bias, column, words, label, softcap, BIAS, SOFTCAP)  # [BV]
        p = grad * times_slope(tl.exp(value - total), value, softcap, SOFTCAP)
        tl.debug_barrier()  # as in forward_tile_kernel
        tl.store(probabilities + column, p.to(probabilities.dtype.element_ty), mask=column < words)


def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    chunk_bytes: int | None,
    need_stash: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (ignore_index, softcap, chunk_bytes, need_stash)
    kept = _kept_rows(target, ignore_index) if compact and index is None else None
    if kept is None:
        return _forward(hidden, weight, target, bias, index, *options)
    nll, lse, stash = _forward(hidden, weight, target.index_select(0, kept), bias, kept, *options)
    rows = target.shape[0]
    stash = _among_zeros(stash, kept, rows) if need_stash else stash
    return _among_zeros(nll, kept, rows), _among_zeros(lse, kept, rows), stash


def masked_linear_cross_entropy_backward(
    grad_nll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    nll: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    chunk_bytes: int | None,
    need_grad_hidden: bool,
    need_grad_weight: bool,
    need_grad_bias: bool,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = (ignore_index, softcap, chunk_bytes)
    needs = (need_grad_hidden, need_grad_weight, need_grad_bias)
    # Found again: an op's output has a shape that is known without its values, and this has none.
    kept = _kept_rows(target, ignore_index) if compact and index is None else None
    if kept is None:
        return _backward(grad_nll, hidden, weight, target, bias, index, nll, lse, *options, *needs)
    grad_nll, h, label, nll, lse = (
        tensor.index_select(0, kept) for tensor in (grad_nll, hidden, target, nll, lse)
    )
    grad_hidden, grad_weight, grad_bias = _backward(
        grad_nll, h, weight, label, bias, None, nll, lse, *options, *needs
    )
    if need_grad_hidden:
        grad_hidden = _among_zeros(grad_hidden, kept, target.shape[0])
    return grad_hidden, grad_weight, grad_bias


def _kept_rows(target: Tensor, ignore_index: int) -> Tensor | None:
    """The rows not ignored, or None to take all; the host waits for a GPU, where it may."""
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    kept = torch.nonzero(target != ignore_index).squeeze(1)
    return None if kept.shape == target.shape else kept


def _among_zeros(rows: Tensor, kept: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, kept, rows)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    chunk_bytes: int | None,
    need_stash: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, target = _with_rows(hidden), _with_rows(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, depth, vocabulary = target.shape[0], hidden.shape[1], weight.shape[0]
    nll = hidden.new_empty(rows, dtype=torch.float32)
    lse = torch.empty_like(nll)
    stash = nll.new_empty((rows, depth) if need_stash else (0,))
    if rows == 0:
        return nll, lse, stash
    chunk, columns = tile_size(rows, vocabulary, chunk_bytes)
    tile = _Tile(nll, chunk, columns, hidden.dtype)
    gathered = None if index is None else hidden.new_empty(chunk, depth)
    reference, others, target_logit, factor, coefficient = (nll.new_empty(chunk) for _ in range(5))
    # float16 has few digits below 6e-5: let its largest probabilities be in the thousands.
    peak = 4096.0 if hidden.dtype == torch.float16 else 1.0
    for first in range(0, rows, chunk):
        count = min(chunk, rows - first)
        label = target.narrow(0, first, count)
        total = stash.narrow(0, first, count) if need_stash else stash
        if index is None or gathered is None:
            h = hidden.narrow(0, first, count)
        else:
            h = gathered.narrow(0, 0, count)
            torch.index_select(hidden, 0, index.narrow(0, first, count), out=h)
        for first_word in range(0, vocabulary, columns):
            words = min(columns, vocabulary - first_word)
            w = weight.narrow(0, first_word, words)
            logits, probabilities = tile.of(count, words)
            product_(logits, h, w.mT, accumulate=False)
            forward_tile_kernel[(count,)](
                logits,
                probabilities,
                bias,
                label,
                reference,
                others,
                target_logit,
                total,
                first_word,
                words,
                depth,
                logits.stride(0),
                probabilities.stride(0),
                depth,
                ignore_index,
                softcap or 0.0,
                FIRST=first_word == 0,
                STASH=need_stash,
                BIAS=bias is not None,
                SOFTCAP=softcap is not None,
                PEAK=peak,
                WIDE=columns > tile.block,
                BLOCK=tile.block,
                BLOCK_D=_depth_block(depth),
                num_warps=tile.warps,
            )
            if need_stash:
                product_(total, probabilities, w, accumulate=first_word > 0)
        state = (reference, others, target_logit)
        gradient = (factor, coefficient) if need_stash else None
        losses = nll.narrow(0, first, count), lse.narrow(0, first, count)
        write_nll(label, *losses, state, gradient, ignore_index, softcap, peak)
        if need_stash:
            _finish_rows(total, total, factor, coefficient, weight, label, ignore_index)
    return nll, lse, stash


def _backward(
    grad_nll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    nll: Tensor,
    lse: Tensor,
    ignore_index: int,
    softcap: float | None,
    chunk_bytes: int | None,
    need_grad_hidden: bool,
    need_grad_weight: bool,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight, target = _with_rows(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows, depth, vocabulary = target.shape[0], hidden.shape[1], weight.shape[0]
    count_hidden, dtype = hidden.shape[0], hidden.dtype
    grad_weight = weight.new_empty(weight.shape if need_grad_weight else (0,))
    grad_bias = nll.new_empty(weight.shape[:1] if need_grad_bias else (0,))
    if rows == 0:
        empty = hidden.new_zeros(hidden.shape if need_grad_hidden else (0,))
        return empty, grad_weight.zero_(), grad_bias.zero_().to(dtype)
    keep = target != ignore_index
    # A copy with zeros for the rows ignored: nan in them must not reach grad_weight.
    h = _with_rows(hidden) if index is None else hidden.index_select(0, index)
    h = torch.where(keep.unsqueeze(1), h, 0)
    grad_nll = torch.where(keep, grad_nll, 0)
    coefficient = grad_nll * torch.expm1(-nll)  # p(target) - 1, times the row's gradient
    if softcap is not None:
        coefficient = coefficient * (1 - ((lse - nll) / softcap).square())
    scale = _scale(grad_nll) if dtype == torch.float16 else None
    scaled = grad_nll if scale is None else grad_nll * scale
    scaled_coefficient = coefficient if scale is None else coefficient * scale

    chunk, columns = tile_size(rows, vocabulary, chunk_bytes)
    tile = _Tile(nll, chunk, columns, dtype)
    grad_rows = nll.new_empty((rows, depth) if need_grad_hidden else (0,))
    grad_words = nll.new_empty((columns, depth) if need_grad_weight else (0,))
    words_read = groups(target)
    of_words = sum_long_runs(scaled_coefficient, h, words_read) if need_grad_weight else None
    # The words are the outer loop: the gradient of W is complete, and rounded once, tile by tile.
    for first_word in range(0, vocabulary, columns):
        words = min(columns, vocabulary - first_word)
        w = weight.narrow(0, first_word, words)
        for first in range(0, rows, chunk):
            count = min(chunk, rows - first)
            h_part = h.narrow(0, first, count)
            logits, probabilities = tile.of(count, words)
            product_(logits, h_part, w.mT, accumulate=False)
            backward_tile_kernel[(count,)](
                logits,
                probabilities,
                bias,
                target.narrow(0, first, count),
                lse.narrow(0, first, count),
                scaled.narrow(0, first, count),
                first_word,
                words,
                logits.stride(0),
                probabilities.stride(0),
                ignore_index,
                softcap or 0.0,
                BIAS=bias is not None,
                SOFTCAP=softcap is not None,
                BLOCK=tile.block,
                num_warps=tile.warps,
            )
            if need_grad_hidden:
                part = grad_rows.narrow(0, first, count)
                product_(part, probabilities, w, accumulate=first_word > 0)
            if need_grad_weight:
                part = grad_words.narrow(0, 0, words)
                product_(part, probabilities.mT, h_part, accumulate=first > 0)
            if need_grad_bias:
                sums = torch.sum(probabilities, 0, dtype=torch.float32)
                part = grad_bias.narrow(0, first_word, words)
                torch.add(sums, part if first > 0 else 0.0, out=part)
        if need_grad_weight:
            part = grad_words.narrow(0, 0, words)
            add_rows(part, scaled_coefficient, h, words_read, of_words, first_word)
            torch.mul(part, _inverse(scale), out=grad_weight.narrow(0, first_word, words))
    if need_grad_bias:
        of_words = sum_long_runs(scaled_coefficient, None, words_read)
        add_rows(grad_bias.unsqueeze(1), scaled_coefficient, None, words_read, of_words, 0)
        torch.mul(grad_bias, _inverse(scale), out=grad_bias)
    if need_grad_hidden:
        factor = None if scale is None else torch.ones_like(nll) / scale
        out = grad_rows if index is not None else hidden.new_empty(hidden.shape)
        _finish_rows(out, grad_rows, factor, coefficient, weight, target, ignore_index)
        if index is not None:
            ones = torch.ones_like(nll)
            out = scatter_rows(ones, grad_rows, index, count_hidden, dtype)
        return out, grad_weight, grad_bias.to(dtype)
    return hidden.new_empty(0), grad_weight, grad_bias.to(dtype)


def masked_linear_cross_entropy_stash_backward(
    grad_nll: Tensor, stash: Tensor, index: Tensor | None, rows: int, dtype: torch.dtype
) -> Tensor:
    if index is not None:
        return scatter_rows(grad_nll, stash, index, rows, dtype)
    out = stash.new_empty(stash.shape, dtype=dtype)
    return torch.mul(grad_nll.unsqueeze(1), stash, out=out)


def tile_size(rows: int, vocabulary: int, chunk_bytes: int | None) -> tuple[int, int]:
    """(rows, words) of a tile whose float32 logits take about `chunk_bytes`.

    Whole rows, as many as there is room for, if that is enough of them to share a reading of W;
    otherwise enough rows, and as many words as there is room for. All tiles are about equal.
    """
    logits = (_CHUNK_BYTES if chunk_bytes is None else chunk_bytes) // 4
    most_rows = 2 * _FEWEST_ROWS
    if logits >= min(rows, _FEWEST_ROWS) * vocabulary:
        most_rows = logits // vocabulary
    chunk = triton.cdiv(rows, triton.cdiv(rows, most_rows))
    most_columns = max(logits // chunk // _COLUMNS_STEP, 1) * _COLUMNS_STEP
    columns = triton.cdiv(vocabulary, triton.cdiv(vocabulary, most_columns))
    return chunk, triton.cdiv(columns, _COLUMNS_STEP) * _COLUMNS_STEP


class _Tile:
    """The buffer of a tile, and the block of words that a program takes from a row of it."""

    def __init__(self, like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> None:
        self._logits = like.new_empty(rows, columns)
        self._probabilities = self._logits.view(dtype)
        self.block = min(triton.next_power_of_2(columns), _WIDEST_BLOCK)
        self.warps = max(4, self.block // 512)

    def of(self, rows: int, words: int) -> tuple[Tensor, Tensor]:
        """(logits, probabilities): the same memory in float32 and in the dtype of W."""
        logits = self._logits.narrow(0, 0, rows).narrow(1, 0, words)
        return logits, self._probabilities.narrow(0, 0, rows).narrow(1, 0, words)


def _finish_rows(
    out: Tensor,
    total: Tensor,
    factor: Tensor | None,
    coefficient: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
) -> None:
    rows, depth = total.shape
    block = _depth_block(depth)
    finish_kernel[(rows, triton.cdiv(depth, block))](
        out,
        total,
        factor,
        coefficient,
        weight,
        target,
        depth,
        weight.shape[0],
        out.stride(0),
        total.stride(0),
        weight.stride(0),
        ignore_index,
        FACTOR=factor is not None,
        BLOCK_D=block,
    )


def _scale(grad_nll: Tensor) -> Tensor:
    """The power of two that brings the largest of grad_nll near float16's maximum."""
    largest = grad_nll.abs().amax().clamp(min=2.0**-100)
    return torch.exp2(15 - torch.log2(largest).ceil())


def _inverse(scale: Tensor | None) -> Tensor | float:
    return 1.0 if scale is None else 1 / scale


def _with_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _depth_block(depth: int) -> int:
    return min(triton.next_power_of_2(depth), 1024)
