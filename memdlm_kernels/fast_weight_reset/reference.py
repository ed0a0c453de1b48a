"""fast_weight_reset_ in plain PyTorch: the oracle. Never optimised, and never waits for the device.

Philox4x32-10: J. K. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def philox_4x32_10(counter: Tensor, key: Tensor) -> Tensor:
    """Words of the generator, unsigned 32 bits held in int64.

    Args:
        counter: [...] int64 in [0, 2**32), the first word of the counter; the others are zero.
        key: [...] int64, all 64 bits used; broadcast against `counter`.

    Returns:
        [..., 4] int64 in [0, 2**32).
    """
    counter, key = torch.broadcast_tensors(counter, key)
    c0, c1, c2, c3 = counter, *(torch.zeros_like(counter) for _ in range(3))
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack((c0, c1, c2, c3), -1)


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in halves since int64 has no room for it."""
    low = constant * (word & 0xFFFF)  # below 2**48
    high = constant * (word >> 16)  # below 2**48, to be shifted by 16
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def fast_weight_reset(param: Tensor, segments: Tensor, bounds: Tensor, seed: Tensor) -> Tensor:
    """What fast_weight_reset_ writes into `param`."""
    columns = param.shape[1]
    work_dtype = torch.float64 if param.dtype == torch.float64 else torch.float32

    counter = torch.arange((columns + 3) // 4, device=param.device)
    word = philox_4x32_10(counter, seed[:, None]).flatten(1)[:, :columns]  # [S, T]
    # 24 bits: u, 2u - 1 and the product's operands are exact in float32, so that one rounding, the
    # product's, is all there is, and every device makes the same numbers.
    uniform = (word >> 8).to(work_dtype) * 2.0**-24  # [0, 1)

    column = torch.arange(columns, device=param.device)
    bound = bounds.to(work_dtype)[
        torch.searchsorted(segments[1:].contiguous(), column, right=True)
    ]  # [T]
    value = (2 * uniform - 1) * bound
    # A negative number times a zero bound is -0.0; the contract is 0.0.
    return torch.where(bound > 0, value, torch.zeros_like(value)).to(param.dtype)
