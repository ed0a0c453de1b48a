"""What each masked token's NLL is multiplied by. Made on the host, where the counts are known.

A loss is then one weighted sum: sum_i weight_i * nll_i, for the outer loss divided by a normaliser
that may span several accumulated batches.
"""

from torch import Tensor


def outer_weight(norm: str, row_weight: Tensor, maskable_count: Tensor) -> Tensor:
    """Weight of a masked token of each row in the outer loss, before the normaliser.

    Args:
        norm: `DiffusionConfig.loss_norm`.
        row_weight: [B] float64, w(t_b) or 1.
        maskable_count: [B] int64.

    Returns:
        [B] float64.
    """
    if norm == "sequence":
        return row_weight / maskable_count.clamp_min(1)
    return row_weight


def outer_normalizer(norm: str, maskable_count: Tensor) -> int:
    """What the outer loss of these rows is divided by: their maskable tokens, or their number.

    Of an accumulated batch: of the counts of all its micro-batches together.

    Args:
        norm: `DiffusionConfig.loss_norm`.
        maskable_count: [B] int64 on the host.

    Returns:
        At least 1.
    """
    count = int(maskable_count.sum()) if norm == "token" else len(maskable_count)
    return max(1, count)


def inner_weight(norm: str, scope: str, row_weight: Tensor, target_count: Tensor) -> Tensor:
    """Weight of a target token of each row in an inner loss, normaliser included.

    Args:
        norm: `DiffusionConfig.loss_norm`, here with the counts of the tokens in the loss.
        scope: `MemoryConfig.scope`: "sample" gives every row the loss of a batch of one.
        row_weight: [B] float64, w(r_b) or 1.
        target_count: [B] int64, tokens in this step's loss.

    Returns:
        [B] float64.
    """
    rows = 1 if scope == "sample" else len(target_count)
    if norm == "batch":
        return row_weight / rows
    if norm == "sequence":
        return row_weight / target_count.clamp_min(1) / rows
    count = target_count if scope == "sample" else target_count.sum()
    return row_weight / count.clamp_min(1)
