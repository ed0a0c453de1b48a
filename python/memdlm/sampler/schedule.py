"""How many tokens each step reveals, and the times of Dream's grid."""

import itertools

import torch


def even_split(tokens: int, steps: int) -> list[int]:
    """Share tokens evenly among steps, the larger shares first, as LLaDA does.

    Args:
        tokens: to reveal, at least 0.
        steps: at least 1.

    Returns:
        A number for each step that reveals any: at most `steps` of them.
    """
    share, rest = divmod(tokens, steps)
    return [share + (step < rest) for step in range(steps) if share or step < rest]


def time_grid_split(tokens: int, steps: int, time_epsilon: float) -> list[int]:
    """Share tokens among steps on Dream's time grid, as its confidence-based algorithms do.

    A step reveals floor(n (1 - s/t)) of the n tokens left, the last step all of them.

    Args:
        tokens: to reveal, at least 0.
        steps: at least 1.
        time_epsilon: in (0, 1).

    Returns:
        A number for each step that reveals any: at most `steps` of them.
    """
    # In float32 as there, where a product may fall short of a whole number.
    times = torch.linspace(1, time_epsilon, steps + 1)
    chances = [*(1 - times[1:-1] / times[:-2]), torch.ones(())]
    shares = []
    for chance in chances:
        share = int(tokens * chance)
        tokens -= share
        shares.append(share)
    return [share for share in shares if share]


def reveal_probabilities(steps: int, time_epsilon: float) -> list[float]:
    """The chance of a masked token to be revealed in each step, as in Dream's "origin".

    The times go evenly from 1 to time_epsilon; between t and s a token is revealed with probability
    1 - s/t, and in the last step for certain.

    Args:
        steps: at least 1.
        time_epsilon: in (0, 1).

    Returns:
        A probability for each step.
    """
    times = [1 - (1 - time_epsilon) * step / steps for step in range(steps)]
    return [*(1 - s / t for t, s in itertools.pairwise(times)), 1.0]
