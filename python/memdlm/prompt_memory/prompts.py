"""What may be a prompt."""

from collections.abc import Sequence
from typing import Any

import torch


def checked_prompts(
    prompts: Sequence[Any], mask_token_id: int, vocab_size: int, most: int
) -> list[list[int]]:
    """Prompts as lists of token ids.

    Args:
        prompts: B sequences of token ids.
        mask_token_id: the token that none of them may hold.
        vocab_size: V.
        most: tokens that a prompt may have, the model's positions.

    Returns:
        B lists.

    Raises:
        ValueError: not such prompts; says which one is not.
    """
    if not len(prompts):
        raise ValueError("prompts must hold at least one prompt, got none")
    return [
        _checked(number, prompt, mask_token_id, vocab_size, most)
        for number, prompt in enumerate(prompts)
    ]


def _checked(number: int, prompt: Any, mask_token_id: int, vocab_size: int, most: int) -> list[int]:
    where = f"prompts[{number}]"
    if not hasattr(prompt, "__len__") or isinstance(prompt, str):
        raise ValueError(f"{where} must be a list of token ids, got {prompt!r}")
    if not len(prompt):
        raise ValueError(f"{where} must have at least one token, got none")
    ids = torch.as_tensor(prompt)
    if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{where} must be a list of token ids, got {ids.dtype} {list(ids.shape)}")
    if len(ids) > most:
        raise ValueError(
            f"{where} must have at most the model's {most} positions, got {len(ids)} tokens"
        )
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ValueError(
            f"{where} must hold token ids in [0, vocab_size = {vocab_size}), "
            f"got {int(ids.min())} to {int(ids.max())}"
        )
    masked = (ids == mask_token_id).nonzero()
    if len(masked):
        raise ValueError(
            f"{where} must not hold the mask token, {mask_token_id}, got it at position "
            f"{int(masked[0])}"
        )
    own: list[int] = ids.tolist()
    return own
