"""Multi-value needles (RULER, arXiv 2404.06654): every value of a key, among other keys'."""

import random

from memdlm.evaluation.tasks.example import Draft
from memdlm.evaluation.tasks.text import Prose, draw_depths, hide, word_list

_VALUES = 4
_OTHER_KEYS = 3
# A shorter prompt has room for one value of each other key; a longer one gives no key away.
_MANY_VALUES_FROM = 1024


def draft_multi_value(rng: random.Random, length: int) -> Draft:
    """Four values of one key, and those of three other keys, in real text.

    Args:
        rng: random.Random.
        length: tokens of prompt and answer.

    Returns:
        Draft, whose size is in words of text.
    """
    pairs = rng.sample(word_list(), 2 * (1 + _OTHER_KEYS))
    key, *others = (f"{a}-{b}" for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    each = _VALUES if length >= _MANY_VALUES_FROM else 1
    values = [str(number) for number in rng.sample(range(10**6, 10**7), _VALUES + 3 * each)]
    wanted = values[:_VALUES]
    owners = [key] * _VALUES + others * each
    needles = [
        f"A special number for {owner} is {value}."
        for owner, value in zip(owners, values, strict=True)
    ]
    rng.shuffle(needles)
    depths = draw_depths(rng, len(needles))
    prose = Prose(rng)
    question = f"What are all the special numbers for {key} that the text gives?"

    def body(words: int) -> str:
        context = hide(prose.words(words), needles, depths)
        return f"Special numbers are hidden in this text. Remember them.\n{context}\n{question}"

    prefix = f"The special numbers for {key} are"
    return Draft(body, None, question, prefix, tuple(wanted))
