"""The text that the probes hide things in, and the words of their lists."""

import bisect
import collections
import functools
import itertools
import random
import re
from collections.abc import Sequence

from memdlm.data.corpus import SPLITS, passages

# The demo's model was not trained on it.
_SPLIT = "validation"
_SENTENCE_END = (".", "!", "?")
_WORD = re.compile(r"(?<![\w.])[a-z]{4,9}(?![\w.(])")
_MIN_OCCURRENCES = 2


class Prose:
    """Real English, as many words as are wanted: the corpus's passages in a random order.

    Args:
        rng: random.Random.
    """

    def __init__(self, rng: random.Random) -> None:
        chosen = list(_passage_words())
        rng.shuffle(chosen)
        self._words = list(itertools.chain.from_iterable(chosen))

    def words(self, count: int) -> list[str]:
        """The first `count` words; after the last passage the first comes again."""
        rounds, rest = divmod(count, len(self._words))
        return self._words * rounds + self._words[:rest]


@functools.cache
def _passage_words() -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(passage.split()) for passage in passages(_SPLIT))


@functools.cache
def word_list() -> tuple[str, ...]:
    """The plain words of the corpus, four to nine lower-case letters, that occur more than once."""
    found = (word for split in SPLITS for text in passages(split) for word in _WORD.findall(text))
    counts = collections.Counter(found)
    return tuple(sorted(word for word, n in counts.items() if n >= _MIN_OCCURRENCES))


def hide(words: Sequence[str], sentences: Sequence[str], depths: Sequence[float]) -> str:
    """Put sentences into a text, each where a sentence of the text ends.

    Args:
        words: of the text.
        sentences: in the order in which they are to stand.
        depths: rising, one for each sentence: 0 is the beginning of the text, 1 its end.

    Returns:
        The text.
    """
    ends = [0, *(i for i, word in enumerate(words, 1) if word.endswith(_SENTENCE_END))]
    parts: list[str] = []
    done = 0
    for sentence, depth in zip(sentences, depths, strict=True):
        place = ends[bisect.bisect_right(ends, depth * len(words)) - 1]
        parts += [*words[done:place], sentence]
        done = place
    return " ".join([*parts, *words[done:]])


def draw_depths(rng: random.Random, count: int) -> list[float]:
    """Rising depths, evenly drawn from [0, 1)."""
    return sorted(rng.random() for _ in range(count))
