"""Who sees whom in block diffusion (BD3-LM, arXiv 2503.09573; LLaDA2.x, arXiv 2512.15745).

At inference a token sees the blocks up to its own. In training there are 2L positions: L noisy
tokens, then the same L tokens clean. A noisy token sees its own noisy block and the clean blocks
before; a clean one sees the clean blocks up to its own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask


@dataclass(frozen=True)
class CausalBlocks:
    """The rule for one canvas of tokens: each sees its own block and those before.

    Attributes:
        length: L.
        block_size: tokens of a block; the last may be shorter.
    """

    length: int
    block_size: int

    @property
    def positions(self) -> int:
        """How many positions run."""
        return self.length

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query sees a key, for positions that broadcast."""
        return key // self.block_size <= query // self.block_size

    def seen_by(self, rows: Tensor, visible: Tensor | None) -> Tensor:
        """What some queries see.

        Args:
            rows: [B or 1, W] int64, positions of the queries.
            visible: [B, positions] bool, False for padding, or None.

        Returns:
            [B or 1, 1, W, positions] bool, True where a query sees a key. Padding sees itself, so
            that no query is left without a key.
        """
        keys = torch.arange(self.positions, device=rows.device)
        seen = self.sees(rows[..., None], keys)  # [B or 1, W, positions]
        if visible is not None:
            seen = seen & visible[:, None] | (rows[..., None] == keys)
        return seen[:, None]

    def mask(self, implementation: str, visible: Tensor | None, like: Tensor) -> Any:
        """The mask of all positions, as an attention implementation of transformers takes it.

        Args:
            implementation: "flex_attention", which skips what nobody sees, "sdpa" or "eager".
            visible: [B, positions] bool, False for padding, or None.
            like: any tensor with the dtype and device of the hidden state.

        Returns:
            A `BlockMask`; [B or 1, 1, positions, positions] bool; or that as what is added to the
            scores.

        Raises:
            ValueError: another implementation.
        """
        size = self.positions
        if implementation == "flex_attention":
            batch_size = None if visible is None else len(visible)

            def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                seen = self.sees(query, key)
                if visible is None:
                    return seen
                return seen & visible[batch, key] | (query == key)

            return create_block_mask(rule, batch_size, None, size, size, device=str(like.device))
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                "attn_implementation must be 'flex_attention', 'sdpa' or 'eager' for block "
                f"diffusion, got {implementation!r}"
            )
        seen = self.seen_by(torch.arange(size, device=like.device)[None], visible)
        if implementation == "sdpa":
            return seen
        return like.new_zeros(()).masked_fill(~seen, torch.finfo(like.dtype).min)


@dataclass(frozen=True)
class Blocks(CausalBlocks):
    """The rule for a batch in training: noisy tokens, then the clean ones.

    Attributes:
        length: L.
        block_size: tokens of a block; divides L.

    Raises:
        ValueError: a block size that does not divide L.
    """

    def __post_init__(self) -> None:
        if self.length % self.block_size:
            raise ValueError(
                "block_size must divide the length of the batch, got block_size "
                f"{self.block_size} and {self.length} tokens: pad to a multiple of it"
            )

    @property
    def positions(self) -> int:
        """How many positions run: 2L."""
        return 2 * self.length

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a query sees a key, for positions in [0, 2L) that broadcast."""
        query_block, key_block = (at % self.length // self.block_size for at in (query, key))
        query_clean, key_clean = query >= self.length, key >= self.length
        own = (query_block == key_block) & (query_clean == key_clean)
        return own | (key_clean & (key_block < query_block))
