"""Functions of one variable that a cross-entropy needs, exact where their naive forms cancel.

Written out because libdevice has no counterpart in Triton's interpreter.
"""

import triton
import triton.language as tl


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
def nll_of(highest, others, target_logit):
    """(nll, 1 - p) of the target, where `others` is the sum of exp(logit - highest) of all other
    words. In this form a confident token keeps its digits, and nll is never negative."""
    margin = highest - target_logit + tl.log(others)
    tail = tl.exp(-tl.abs(margin))
    # Both forms are the softplus and the sigmoid of margin; neither exponential overflows.
    nll = tl.where(margin > 0, margin, 0.0) + log1p(tail)
    # -inf - -inf and the like: what is not a number must show.
    nll = tl.where(margin == margin, nll, margin)
    return nll, tl.where(margin > 0, 1.0, tail) / (1.0 + tail)


@triton.jit
def tanh(x):
    decay = expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0, decay, -decay) / (2.0 + decay)


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
