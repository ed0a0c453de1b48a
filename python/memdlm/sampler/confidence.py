"""From the logits of some masked tokens to what would stand there, and how sure the model is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from memdlm.sampler.config import SamplerConfig


@dataclass(frozen=True)
class Guess:
    """What a model would write at some positions of one row.

    Attributes:
        tokens: [n] int64.
        confidence: [n] float, of the logits' precision but at least float32; larger is surer.
    """

    tokens: Tensor
    confidence: Tensor


def guess(logits: Tensor, config: SamplerConfig, generator: torch.Generator) -> Guess:
    """Draw a token for each position of a row, and say how sure the model is of it.

    Args:
        logits: [n, V], -inf for tokens that must not be written.
        config: temperature, filters and confidence.
        generator: of the row, on the device of the logits; read where the temperature is above 0.

    Returns:
        The tokens and their confidences.
    """
    plain = logits if logits.dtype == torch.float64 else logits.float()
    tempered = plain
    if config.temperature == 0:
        tokens = plain.argmax(-1)
    else:
        tempered = keep_top_p(keep_top_k(plain / config.temperature, config.top_k), config.top_p)
        # Gumbel's maximum in float64: coarser noise changes the distribution (arXiv 2409.02908).
        tokens = (tempered + gumbel(tempered.shape, generator)).argmax(-1)
    read = tempered if config.tempered_confidence else plain
    return Guess(tokens, _confidence(read, tokens, config))


def gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise.

    Args:
        shape: of the result.
        generator: decides the device too.

    Returns:
        float64.
    """
    uniform = torch.rand(shape, dtype=torch.float64, device=generator.device, generator=generator)
    # 0 may be drawn, and would be infinite.
    return -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()


def keep_top_k(logits: Tensor, top_k: int | None) -> Tensor:
    """Rule out all but the largest logits, and those equal to the last of them.

    Args:
        logits: [n, V].
        top_k: how many stay; None for all.

    Returns:
        [n, V], -inf for the others.
    """
    if top_k is None or top_k >= logits.shape[-1]:
        return logits
    least = logits.topk(top_k).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float | None) -> Tensor:
    """Rule out all but the nucleus: the most probable tokens, as few as reach a probability.

    Args:
        logits: [n, V].
        top_p: the probability that stays; None for all of it.

    Returns:
        [n, V], -inf for the others.
    """
    # The sum of all may be rounded to more than 1.
    if top_p is None or top_p == 1:
        return logits
    largest, order = logits.sort(descending=True, stable=True)
    probability = largest.softmax(-1)
    # A token stays if those before it have not reached top_p, so the first always does.
    outside = probability.cumsum(-1) - probability > top_p
    return logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)


def _confidence(logits: Tensor, tokens: Tensor, config: SamplerConfig) -> Tensor:
    probability = logits.softmax(-1)
    if config.remasking == "entropy":
        return -torch.special.entr(probability).sum(-1)
    if config.remasking == "margin":
        first, second = probability.topk(2).values.unbind(-1)
        return first - second
    drawn = probability.gather(-1, tokens[:, None])[:, 0]
    if config.begin_suppress_tokens is None:
        return drawn
    late = torch.tensor(config.begin_suppress_tokens, device=tokens.device)
    return drawn.masked_fill(torch.isin(tokens, late), 0)
