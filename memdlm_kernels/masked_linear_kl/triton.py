"""masked_linear_kl on a GPU: one product for both sides' logits, one kernel, one for the gradient.

Student and teacher lie in one matrix, so that a chunk reads W once for both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memdlm_kernels._triton.add_rows import scatter_rows
from memdlm_kernels._triton.cross_entropy import (
    LOWEST,
    add_words,
    expm1,
    load_logits,
    times_slope,
)
from memdlm_kernels._triton.product import product_

_CHUNK_BYTES = 256 * 2**20
_FEWEST_ROWS = 128  # of the student, and as many of the teacher
_WIDEST_BLOCK = 2048  # words of each that a program holds at a time
_WARPS = 16  # with fewer the compiler keeps to fewer registers, and spills


@triton.jit
def expm1_less_x(x):
    """exp(x) - 1 - x for x in [-1, 1], with all its digits also near 0."""
    series = 1.0 + x * (1 / 12)
    series = 1.0 + x * (1 / 11) * series
    series = 1.0 + x * (1 / 10) * series
    series = 1.0 + x * (1 / 9) * series
    series = 1.0 + x * (1 / 8) * series
    series = 1.0 + x * (1 / 7) * series
    series = 1.0 + x * (1 / 6) * series
    series = 1.0 + x * (1 / 5) * series
    series = 1.0 + x * (1 / 4) * series
    series = 1.0 + x * (1 / 3) * series
    return 0.5 * x * x * series


@triton.jit
def load_pair(
    student, teacher, bias, column, words, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr
):
    s = load_logits(student, bias, column, words, softcap, BIAS, SOFTCAP)  # [BV]
    return s, load_logits(teacher, bias, column, words, softcap, BIAS, SOFTCAP)


@triton.jit
def difference(s, t):
    # Of logits as they are, before the temperature: the compiler would fold its product into this
    # difference, and equal logits would differ by the product's rounding. A forbidden word is one
    # for both, and counts for nothing.
    return tl.where((s == t) | (s == float("-inf")), 0.0, s - t)


@triton.jit
def gradient_of(p, q, d, shift, mean, REVERSE: tl.constexpr):
    """d KL / d logit of the student, in forms that do not cancel where p is close to q."""
    if REVERSE:
        return p * (d - mean)
    return tl.where(tl.abs(d - shift) < 1, q * expm1(d - shift), p - q)


@triton.jit
def kl_row_kernel(
    logits,
    gradient,
    bias,
    kl,
    factor,
    rows,
    words,
    logits_row,
    gradient_row,
    inverse_temperature,
    softcap,
    REVERSE: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row i of the student and row rows + i of the teacher; the gradient lies over the student's.

    With p of the student, q of the teacher and d the difference of their logits, log(p / q) is
    d - shift. `shift` is taken from maxima and sums and not from rounded log-sum-exps, which would
    move all words of the row together.
    """
    row = tl.program_id(0).to(tl.int64)
    student = logits + row * logits_row
    teacher = logits + (row + rows) * logits_row
    gradient += row * gradient_row
    highest_s = tl.full([], LOWEST, tl.float32)
    highest_t = tl.full([], LOWEST, tl.float32)
    sum_s = tl.full([], 0.0, tl.float32)
    sum_t = tl.full([], 0.0, tl.float32)
    weighted = tl.full([], 0.0, tl.float32)  # sum of exp(s - highest_s) * d
    for start in range(0, words, BLOCK):
        column = start + tl.arange(0, BLOCK)
        s, t = load_pair(student, teacher, bias, column, words, softcap, BIAS, SOFTCAP)  # [BV]
        d = difference(s, t) * inverse_temperature
        s, t = s * inverse_temperature, t * inverse_temperature
        before = highest_s
        highest_s, sum_s = add_words(s, highest_s, sum_s)
        highest_t, sum_t = add_words(t, highest_t, sum_t)
        if REVERSE:
            weighted *= tl.exp(before - highest_s)
            weighted += tl.sum(tl.exp(s - highest_s) * d, 0)
    # Rounded to the nearest: of equal sums exactly 1, which the fast division may miss.
    shift = (highest_s - highest_t) + tl.log(tl.div_rn(sum_s, sum_t))
    mean = weighted / sum_s

    scale = 1.0
    if SCALE:
        # float16 holds no number below 6e-8: bring the row's largest to 2^14.
        largest = tl.full([], 1e-30, tl.float32)
        for start in range(0, words, BLOCK):
            column = start + tl.arange(0, BLOCK)
            s, t = load_pair(student, teacher, bias, column, words, softcap, BIAS, SOFTCAP)
            d = difference(s, t) * inverse_temperature
            s, t = s * inverse_temperature, t * inverse_temperature
            p = tl.exp(s - highest_s) / sum_s  # [BV]
            q = tl.exp(t - highest_t) / sum_t
            grad = gradient_of(p, q, d, shift, mean, REVERSE)
            largest = tl.maximum(largest, tl.max(tl.abs(grad), 0))
        scale = 16384.0 / largest
        tl.store(factor + row, largest * (1 / 16384.0))

    total = tl.full([], 0.0, tl.float32)
    for start in range(0, words, BLOCK):
        column = start + tl.arange(0, BLOCK)
        capped_s, t = load_pair(student, teacher, bias, column, words, softcap, BIAS, SOFTCAP)
        d = difference(capped_s, t) * inverse_temperature
        s, t = capped_s * inverse_temperature, t * inverse_temperature
        p = tl.exp(s - highest_s) / sum_s  # [BV]
        q = tl.exp(t - highest_t) / sum_t
        # a log(a / b) - a + b: the last two add up to 0, and with them no term is negative.
        if REVERSE:
            a, b, ratio = p, q, shift - d
        else:
            a, b, ratio = q, p, d - shift
        ratio = tl.where(s == float("-inf"), 0.0, ratio)
        total += tl.sum(tl.where(tl.abs(ratio) < 1, a * expm1_less_x(ratio), b - a - a * ratio), 0)
        if GRADIENT:
            grad = gradient_of(p, q, d, shift, mean, REVERSE)
            grad = times_slope(grad * (inverse_temperature * scale), capped_s, softcap, SOFTCAP)
            # Numbers of half the size lie over logits of this block and of those before it: all
            # threads of the program must have read theirs.
            tl.debug_barrier()
            grad = grad.to(gradient.dtype.element_ty)
            tl.store(gradient + column, grad, mask=column < words)
    tl.store(kl + row, total)


def masked_linear_kl(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    direction: str,
    temperature: float,
    softcap: float | None,
    chunk_bytes: int | None,
    need_stash: bool,
) -> tuple[Tensor, Tensor]:
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows = student.shape[0] if index is None else index.shape[0]
    depth, vocabulary, dtype = student.shape[1], weight.shape[0], student.dtype
    kl = student.new_empty(rows, dtype=torch.float32)
    stash = kl.new_empty((rows, depth) if need_stash else (0,))
    if rows == 0:
        return kl, stash
    chunk = chunk_rows(rows, vocabulary, chunk_bytes)
    # Rows of whole vectors, whatever the vocabulary.
    buffer = kl.new_empty(2 * chunk, triton.cdiv(vocabulary, 8) * 8)
    factor = kl.new_empty(chunk)
    block = min(triton.next_power_of_2(vocabulary), _WIDEST_BLOCK)
    for first in range(0, rows, chunk):
        count = min(chunk, rows - first)
        if index is None:
            pair = [side.narrow(0, first, count) for side in (student, teacher)]
        else:
            part = index.narrow(0, first, count)
            pair = [side.index_select(0, part) for side in (student, teacher)]
        logits = buffer.narrow(0, 0, 2 * count).narrow(1, 0, vocabulary)
        gradient = buffer.view(dtype).narrow(0, 0, count).narrow(1, 0, vocabulary)
        product_(logits, torch.cat(pair), weight.mT, accumulate=False)
        kl_row_kernel[(count,)](
            logits,
            gradient,
            bias,
            kl.narrow(0, first, count),
            factor,
            count,
            vocabulary,
            logits.stride(0),
            gradient.stride(0),
            1 / temperature,
            softcap or 0.0,
            REVERSE=direction == "reverse",
            GRADIENT=need_stash,
            SCALE=need_stash and dtype == torch.float16,
            BIAS=bias is not None,
            SOFTCAP=softcap is not None,
            BLOCK=block,
            num_warps=_WARPS,
        )
        if need_stash:
            total = stash.narrow(0, first, count)
            product_(total, gradient, weight, accumulate=False)
            if dtype == torch.float16:
                torch.mul(total, factor.narrow(0, 0, count).unsqueeze(1), out=total)
    return kl, stash


def masked_linear_kl_backward(
    grad_kl: Tensor, stash: Tensor, index: Tensor | None, rows: int, dtype: torch.dtype
) -> Tensor:
    if index is not None:
        return scatter_rows(grad_kl, stash, index, rows, dtype)
    out = stash.new_empty(stash.shape, dtype=dtype)
    return torch.mul(grad_kl.unsqueeze(1), stash, out=out)


def chunk_rows(rows: int, vocabulary: int, chunk_bytes: int | None) -> int:
    """Rows of the student whose float32 logits, and the teacher's, take about `chunk_bytes`."""
    most = (_CHUNK_BYTES if chunk_bytes is None else chunk_bytes) // (8 * vocabulary)
    return triton.cdiv(rows, triton.cdiv(rows, max(most, _FEWEST_ROWS)))
