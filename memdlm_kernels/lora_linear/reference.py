"""lora_linear in plain PyTorch: the oracle. Never optimised."""

from torch import Tensor


def lora_linear(x: Tensor, base: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    A, B = A.to(x.dtype), B.to(x.dtype)
    shrink = x @ A.mT  # [..., R]
    return base + scale * (shrink @ B.mT)  # [..., out]
