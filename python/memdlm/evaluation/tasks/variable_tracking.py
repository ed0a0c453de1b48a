"""Variable tracking (RULER, arXiv 2404.06654): which variables a value was handed on to."""

import itertools
import random
import string

from memdlm.evaluation.tasks.example import Draft
from memdlm.evaluation.tasks.text import Prose, draw_depths, hide

_HOPS = 4
_LETTERS = 5
_SHOT_LETTERS = 3
_SHOT_FROM = 1024
_SHOT_WORDS = 40


def draft_variable_tracking(rng: random.Random, length: int) -> Draft:
    """A value that goes through five variables, hidden in real text.

    Args:
        rng: random.Random.
        length: tokens of prompt and answer; from 1,024 on a solved example comes first.

    Returns:
        Draft, whose size is in words of text.
    """
    names, value, lines = _chain(rng, _LETTERS)
    depths = draw_depths(rng, len(lines))
    prose = Prose(rng)
    question = f"Question: Which variables hold the value {value}, directly or by assignment?"
    shot = _solved(rng) if length >= _SHOT_FROM else ""

    def body(words: int) -> str:
        return shot + _ask(hide(prose.words(words), lines, depths), question)

    return Draft(body, None, question, _prefix(value), tuple(names))


def _chain(rng: random.Random, letters: int) -> tuple[list[str], str, list[str]]:
    """The variables, their value, and the lines that assign it."""
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10_000, 99_999))
    lines = [f"VAR {names[0]} = {value}."]
    lines += [f"VAR {after} = VAR {before}." for before, after in itertools.pairwise(names)]
    return names, value, lines


def _ask(context: str, question: str) -> str:
    return f"Keep track of the variables that are assigned in this text.\n{context}\n{question}"


def _prefix(value: str) -> str:
    return f"Answer: The {_HOPS + 1} variables that hold the value {value} are"


def _solved(rng: random.Random) -> str:
    names, value, lines = _chain(rng, _SHOT_LETTERS)
    context = hide(Prose(rng).words(_SHOT_WORDS), lines, draw_depths(rng, len(lines)))
    question = f"Question: Which variables hold the value {value}, directly or by assignment?"
    return f"{_ask(context, question)}\n{_prefix(value)} {' '.join(names)}\n\n"
