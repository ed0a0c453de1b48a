"""Common words (RULER, arXiv 2404.06654): the ten words that a long list names most often."""

import functools
import random
from collections.abc import Sequence

from memdlm.evaluation.tasks.example import Draft
from memdlm.evaluation.tasks.text import word_list

_COMMON = 10
# (least length, how often a common word occurs, and another), longest first. The first two are
# RULER's; shorter prompts have no room for the second.
_REPEATS = ((4096, 30, 3), (1024, 6, 1), (512, 3, 1), (0, 2, 1))
_SHOT_FROM = 1024
_SHOT_OTHERS = 10
_QUESTION = f"Question: Which {_COMMON} words occur most often in the list?"
_PREFIX = f"Answer: The {_COMMON} words that occur most often in the list are:"


def draft_common_words(rng: random.Random, length: int) -> Draft:
    """Ten words many times each, and as many others as fit a few times each.

    Args:
        rng: random.Random.
        length: tokens of prompt and answer: below 4,096 words occur less often, as in RULER; from
            1,024 on a solved example comes first.

    Returns:
        Draft, whose size is in other words; at least one.
    """
    repeats, rare = next((often, rare) for least, often, rare in _REPEATS if length >= least)
    shot = _solved(rng) if length >= _SHOT_FROM else ""
    common = rng.sample(_whole_words(), _COMMON)
    others = [word for word in word_list() if word not in common]
    rng.shuffle(others)
    order = rng.getrandbits(32)

    def body(size: int) -> str:
        items = common * repeats + others[: size + 1] * rare
        # Its own generator, so that a size always gives the same list.
        random.Random(order).shuffle(items)
        return shot + _ask(items)

    return Draft(body, len(others) - 1, _QUESTION, _PREFIX, tuple(common))


@functools.cache
def _whole_words() -> tuple[str, ...]:
    """The words that are no part of another: a wrong answer does not hold one by chance."""
    joined = " ".join(word_list())
    return tuple(word for word in word_list() if joined.count(word) == 1)


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, 1))


def _ask(items: Sequence[str]) -> str:
    context = _numbered(items)
    return f"Some words of this list occur more often than others.\n{context}\n{_QUESTION}"


def _solved(rng: random.Random) -> str:
    words = rng.sample(word_list(), _COMMON + _SHOT_OTHERS)
    common = words[:_COMMON]
    items = common * 3 + words[_COMMON:]
    rng.shuffle(items)
    return f"{_ask(items)}\n{_PREFIX} {_numbered(common)}\n\n"
