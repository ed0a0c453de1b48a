"""The loss of an inner step, token by token: the NLL, or how far it is from the next state.

The paper's ablation of the inner loss. The teacher is the model itself with the same fast weights,
one state further on the trajectory, and a constant.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from memdlm.config import MemoryConfig
from memdlm_kernels import masked_linear_cross_entropy, masked_linear_kl


def has_teacher(config: MemoryConfig) -> bool:
    """Whether the inner loss looks at the next state."""
    return config.inner_loss != "cross_entropy"


def token_losses(
    config: MemoryConfig,
    rows: Tensor,
    teacher: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
) -> Tensor:
    """The loss of each row, before its weight.

    Args:
        config: `inner_loss` and `inner_temperature`.
        rows: [M, D], input of the head at the state's loss rows.
        teacher: [M, D], the same of the next state; None for the NLL, which has no teacher.
        weight: [V, D], the head's.
        bias: [V] or None.
        target: [M] int64, clean tokens; read by the NLL alone.

    Returns:
        [M] float32 (float64 for float64 rows).
    """
    if teacher is None:
        # Ignored are at most the rows that fill up M: the step does not wait to count them.
        return masked_linear_cross_entropy(rows, weight, target, bias=bias, compact=False)
    if config.inner_loss in ("kl", "reverse_kl"):
        return masked_linear_kl(
            rows,
            teacher,
            weight,
            bias=bias,
            direction="forward" if config.inner_loss == "kl" else "reverse",
            temperature=config.inner_temperature,
            # The only one with a gradient for the head.
            backend="reference" if weight.requires_grad else None,
        )
    wide = torch.promote_types(rows.dtype, torch.float32)
    rows, teacher = rows.to(wide), teacher.to(wide)
    if config.inner_loss == "hidden_mse":
        return (rows - teacher).square().mean(-1)
    return 1 - F.cosine_similarity(rows, teacher, dim=-1)
