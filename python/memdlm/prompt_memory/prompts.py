"""What may be a prompt."""

import operator
from collections.abc import Sequence
from typing import Any


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
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        # A tensor or an array is its rows.
        own = prompts.tolist() if hasattr(prompts, "tolist") else prompts
        if not isinstance(own, list):
            raise ValueError(f"prompts must be a list of lists of token ids, got {prompts!r}")
        prompts = own
    if not len(prompts):
        raise ValueError("prompts must hold at least one prompt, got none")
    return [
        _checked(number, prompt, mask_token_id, vocab_size, most)
        for number, prompt in enumerate(prompts)
    ]


def _checked(number: int, prompt: Any, mask_token_id: int, vocab_size: int, most: int) -> list[int]:
    where = f"prompts[{number}]"
    values = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{where} must be a list of token ids, got {prompt!r}")
    if not len(values):
        raise ValueError(f"{where} must have at least one token, got none")
    if len(values) > most:
        raise ValueError(
            f"{where} must have at most the model's {most} positions, got {len(values)} tokens"
        )
    own = []
    for position, value in enumerate(values):
        token = _whole(value)
        if token is None:
            raise ValueError(
                f"{where} must be a list of token ids, got {value!r} at position {position}"
            )
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{where} must hold token ids in [0, vocab_size = {vocab_size}), got {token} at "
                f"position {position}"
            )
        if token == mask_token_id:
            raise ValueError(
                f"{where} must not hold the mask token, {mask_token_id}, got it at position "
                f"{position}"
            )
        own.append(token)
    return own


def _whole(value: Any) -> int | None:
    """A whole number as Python's; None for anything else, True and False too."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
