"""What the kernels of a cross-entropy share: reading a row of logits, and exact functions.

The functions of one variable are exact where their naive forms cancel. They are written out because
libdevice has no counterpart in Triton's interpreter.
"""

import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3.4028234663852886e38)
# How far a logit may exceed the row's reference before it becomes the reference. Every change costs
# a scaling of the row's sum of p * W; but p of a word that dominates the others is exact in
# bfloat16 only where that word is the reference.
LAG = tl.constexpr(2.0)


@triton.jit
def expm1(x):
    """exp(x) - 1 with all its digits also near 0."""
    series = 1.0 + x * (1 / 9)
    series = 1.0 + x * (1 / 8) * series
    series = 1.0 + x * (1 / 7) * series
    series = 1.0 + x * (1 / 6) * series
    series = 1.0 + x * (1 / 5) * series
    series = 1.0 + x * (1 / 4) * series
    series = 1.0 + x * (1 / 3) * series
    series = x + x * x * 0.5 * series
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], with all its digits also near 0."""
    z = x / (2.0 + x)  # log(1 + x) = 2 artanh(z), and z is at most 1/3
    square = z * z
    series = 1 / 13 + square * (1 / 15)
    series = 1 / 11 + square * series
    series = 1 / 9 + square * series
    series = 1 / 7 + square * series
    series = 1 / 5 + square * series
    series = 1 / 3 + square * series
    return 2.0 * z + 2.0 * z * square * series


@triton.jit
def tanh(x):
    size = tl.abs(x)
    decay = expm1(-2.0 * size)
    near_0 = -decay / (2.0 + decay)
    # Here an error of the exponential counts for half or less.
    value = tl.where(size < 0.25, near_0, 1.0 - 2.0 / (1.0 + tl.exp(2.0 * size)))
    return tl.where(x < 0, -value, value)


@triton.jit
def capped(logits, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(logits / softcap); -inf beyond the vocabulary must be set after it."""
    if SOFTCAP:
        logits = softcap * tanh(logits / softcap)
    return logits


@triton.jit
def times_slope(values, logits, softcap, SOFTCAP: tl.constexpr):
    """values times the softcap's derivative, from the logits that it gave."""
    if SOFTCAP:
        tangent = logits / softcap
        # Where the value is 0 the logit may be -inf: not a product.
        values = tl.where(values == 0, 0.0, values * (1.0 - tangent * tangent))
    return values


@triton.jit
def load_logits(logits, bias, column, words, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    value = tl.load(logits + column, mask=column < words, other=0.0).to(tl.float32)  # [BV]
    if BIAS:
        value += tl.load(bias + column, mask=column < words, other=0.0).to(tl.float32)
    value = capped(value, softcap, SOFTCAP)
    return tl.where(column < words, value, float("-inf"))


@triton.jit
def load_others(
    logits, bias, column, words, label, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr
):
    value = load_logits(logits, bias, column, words, softcap, BIAS, SOFTCAP)
    return tl.where(column == label, float("-inf"), value)


@triton.jit
def add_words(value, reference, others):
    """Take a block of logits into a row's (reference, sum of exp(logit - reference))."""
    highest = tl.max(value, 0)
    raised = tl.where(highest > reference + LAG, highest, reference)
    others = others * tl.exp(reference - raised) + tl.sum(tl.exp(value - raised), 0)
    return raised, others


@triton.jit
def store_zeros(out, words, BLOCK: tl.constexpr):
    for start in range(0, words, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(out + column, tl.zeros([BLOCK], out.dtype.element_ty), mask=column < words)


@triton.jit
def nll_kernel(
    target,
    reference,
    others,
    target_logit,
    nll,
    lse,
    factor,
    coefficient,
    rows,
    ignore_index,
    softcap,
    GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PEAK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and log-sum-exp of rows, from what their logits have been reduced to.

    In float64, for a rounded log-sum-exp is an error of every probability of its row. There is one
    value a row, and no thread repeats another's work.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BM]
    inside = row < rows
    keep = inside & (tl.load(target + row, mask=inside, other=0) != ignore_index)
    highest = tl.load(reference + row, mask=keep, other=0.0).to(tl.float64)
    summed = tl.load(others + row, mask=keep, other=1.0).to(tl.float64)
    chosen = tl.load(target_logit + row, mask=keep, other=0.0).to(tl.float64)
    margin = highest - chosen + tl.log(summed)
    tail = tl.exp(-tl.abs(margin))
    # The softplus and the sigmoid of margin: a confident token keeps its digits, nll is never
    # negative, and no exponential overflows. What is not a number must show.
    loss = tl.where(margin > 0, margin, 0.0) + log1p(tail)
    loss = tl.where(margin == margin, loss, margin)
    missing = tl.where(margin > 0, 1.0, tail) / (1.0 + tail)  # 1 - p(target)
    tl.store(nll + row, tl.where(keep, loss, 0.0).to(tl.float32), mask=inside)
    tl.store(lse + row, tl.where(keep, chosen + loss, 0.0).to(tl.float32), mask=inside)
    if GRADIENT:
        # What the others have together, over their sum: exp(reference - lse) with more digits.
        scale = tl.where(summed == 0, 0.0, missing / (summed * PEAK)).to(tl.float32)
        tl.store(factor + row, scale, mask=keep)
        missing = times_slope(-missing, chosen, softcap, SOFTCAP).to(tl.float32)
        tl.store(coefficient + row, missing, mask=keep)


def write_nll(
    target: Tensor,
    nll: Tensor,
    lse: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    gradient: tuple[Tensor, Tensor] | None,
    ignore_index: int,
    softcap: float | None,
    peak: float,
) -> None:
    """Fill nll and lse, and `gradient`: the factor of sum of p * W, the coefficient of W[target].

    `state` is (reference, sum of exp(logit - reference) of all words but the target, the target's
    logit); the probabilities have been multiplied by `peak`.
    """
    rows = target.shape[0]
    factor, coefficient = (None, None) if gradient is None else gradient
    nll_kernel[(triton.cdiv(rows, 128),)](
        target,
        *state,
        nll,
        lse,
        factor,
        coefficient,
        rows,
        ignore_index,
        softcap or 0.0,
        GRADIENT=gradient is not None,
        SOFTCAP=softcap is not None,
        PEAK=peak,
        BLOCK=128,
    )
