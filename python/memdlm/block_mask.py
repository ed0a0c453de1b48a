"""Who sees whom in block diffusion (BD3-LM, arXiv 2503.09573; LLaDA2.x, arXiv 2512.15745).

2L positions: L noisy tokens, then the same L tokens clean. A noisy token sees its own noisy block
and the clean blocks before; a clean one sees the clean blocks up to its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

Sees = Callable[[Tensor, Tensor], Tensor]


def block_mask(
    length: int, block_size: int, attention_mask: Tensor | None, device: torch.device
) -> Tensor:
    """The mask, for an attention that takes one.

    Args:
        length: L.
        block_size: tokens of a block; divides L.
        attention_mask: [B, 2L] bool, False for padding, or None.
        device: of the mask.

    Returns:
        [B or 1, 1, 2L, 2L] bool, True where a query sees a key. Padding sees itself, so that no
        query is left without a key.

    Raises:
        ValueError: a block size that does not divide L.
    """
    place = torch.arange(2 * length, device=device)
    sees = _rule(length, block_size)(place[:, None], place[None])[None, None]
    if attention_mask is None:
        return sees
    itself = torch.eye(2 * length, dtype=torch.bool, device=device)
    return sees & attention_mask[:, None, None, :] | itself


def block_flex_mask(
    length: int, block_size: int, attention_mask: Tensor | None, device: torch.device
) -> Any:
    """The same for flex attention, which skips what nobody sees.

    Args:
        length, block_size, attention_mask, device: as for `block_mask`.

    Returns:
        A `torch.nn.attention.flex_attention.BlockMask`.

    Raises:
        ValueError: a block size that does not divide L.
    """
    rule = _rule(length, block_size)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = rule(query, key)
        if attention_mask is None:
            return seen
        return seen & attention_mask[batch, key] | (query == key)

    batch_size = None if attention_mask is None else len(attention_mask)
    return create_block_mask(sees, batch_size, None, 2 * length, 2 * length, device=str(device))


def _rule(length: int, block_size: int) -> Sees:
    if length % block_size:
        raise ValueError(
            f"block_size must divide the length of the batch, got block_size {block_size} and "
            f"{length} tokens: pad to a multiple of it"
        )

    def sees(query: Tensor, key: Tensor) -> Tensor:
        query_block, key_block = query % length // block_size, key % length // block_size
        query_clean, key_clean = query >= length, key >= length
        own = (query_block == key_block) & (query_clean == key_clean)
        return own | (key_clean & (key_block < query_block))

    return sees
