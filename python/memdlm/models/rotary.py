"""Rotary position embedding."""

import torch
from torch import Tensor, nn

from memdlm.models.config import DecoderConfig


class RotaryEmbedding(nn.Module):
    """cos and sin of every position, without state: the frequencies are computed when used.

    A buffer would have to survive meta devices, casts and checkpoints; a few dozen powers cost
    nothing beside one layer.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.theta = config.rope_theta
        self.width = config.rotary_width
        self.in_float32 = config.rotary_in_float32

    @torch.no_grad()
    def forward(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Angles in float32, or in float64 for a model in float64.

        Args:
            like: any tensor with the dtype and device of the hidden state.
            position_ids: [1 or B, L] int64.

        Returns:
            cos and sin, each [1 or B, L, rotary_width], in the dtype of `like`, or in float32 at
            least where the config says so.
        """
        wide = torch.promote_types(like.dtype, torch.float32)
        exponent = torch.arange(0, self.width, 2, device=like.device).to(wide) / self.width
        angle = position_ids.to(like.device, wide)[..., None] * (1.0 / self.theta**exponent)
        both_halves = torch.cat((angle, angle), dim=-1)
        dtype = wide if self.in_float32 else like.dtype
        return both_halves.cos().to(dtype), both_halves.sin().to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first elements of each head, its two halves against each other.

    Args:
        heads: [..., L, head_dim].
        cos, sin: [..., L, rotary_width], broadcast over the heads; where their dtype is wider, it
            is the dtype of the rotation.

    Returns:
        [..., L, head_dim] in the dtype of `heads`; elements from rotary_width on are unchanged.
    """
    width = cos.shape[-1]
    turning, still = heads.split((width, heads.shape[-1] - width), dim=-1)
    first, second = turning.chunk(2, dim=-1)
    turned = (turning * cos + torch.cat((-second, first), dim=-1) * sin).to(heads.dtype)
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned
