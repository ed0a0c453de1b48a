"""masked_linear_kl in plain PyTorch: the oracle. Never optimised."""

import torch
from torch import Tensor


def masked_linear_kl(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    direction: str,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """KL [K], in float64 for float64 inputs, else in float32."""
    log_p = _log_softmax(student, weight, bias, index, temperature, softcap)  # [K, V]
    own_bias = None if bias is None else bias.detach()
    log_q = _log_softmax(teacher.detach(), weight.detach(), own_bias, index, temperature, softcap)
    first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
    a, b = first.exp(), second.exp()
    # A word that the bias forbids has probability 0 in both.
    possible = (a > 0) | (b > 0)
    ratio = torch.where(possible, second - first, 0)
    # a log(a / b) - a + b: the last two add up to 0, and with them no term is negative. Where a and
    # b are close, b - a is a expm1(ratio), and both are 0 where they are equal.
    near = ratio.abs() < 1
    safe = torch.where(near, ratio, 0)
    terms = torch.where(near, a * (torch.expm1(safe) - safe), b - a - a * ratio)
    return terms.sum(-1)


def _log_softmax(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    rows = hidden if index is None else hidden[index]
    logits = rows.to(dtype) @ weight.to(dtype).mT
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, dim=-1)
