"""Facts to put together (bAbI's, hidden as BABILong does, arXiv 2406.10149): where is it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from memdlm.evaluation.tasks.example import Draft
from memdlm.evaluation.tasks.text import Prose, draw_depths, hide

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_PEOPLE = ("Daniel", "John", "Mary", "Sandra")
# Others in the solved examples, so that no fact of theirs answers the question.
_SHOT_PEOPLE = ("Anna", "Bruno", "Clara", "Victor")
_THINGS = ("apple", "football", "milk")
_MOVES = ("moved to", "went to", "travelled to", "journeyed to")
_TAKES = ("took", "picked up", "grabbed")
_DROPS = ("dropped", "put down", "left")
# Facts of a story with one, two and three that matter; between them, one for 64 tokens.
_FACTS = {1: (4, 10), 2: (6, 20), 3: (8, 30)}
_TOKENS_PER_FACT = 64
_SHOTS_FROM = 1024
_SHOTS = 2
_RULES = {
    1: "A person is where that person went last.",
    2: "A thing goes where the person goes who holds it, and stays where it is put down.",
    3: "A thing goes where the person goes who holds it, and stays where it is put down.",
}


@dataclass
class _Story:
    """What happened, and where everybody and everything has been, in order."""

    facts: list[str] = field(default_factory=list)
    people: dict[str, list[str]] = field(default_factory=dict)
    things: dict[str, list[str]] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)


def draft_supporting_facts(rng: random.Random, length: int, supporting: int) -> Draft:
    """A story of people who go places and carry things, in real text, and where one of them is.

    Args:
        rng: random.Random.
        length: tokens of prompt and answer; from 1,024 on two solved examples come first.
        supporting: how many facts the answer needs: 1 asks where a person is, 2 where a thing is, 3
            where it was before.

    Returns:
        Draft, whose size is in words of text.
    """
    shots = ""
    if length >= _SHOTS_FROM:
        for _ in range(_SHOTS):
            facts, question, prefix, place = _ask(
                rng, _SHOT_PEOPLE, _FACTS[supporting][0], supporting
            )
            shots += f"Example: {' '.join(facts)}\n{question}\n{prefix} {place}.\n\n"
    fewest, most = _FACTS[supporting]
    most = min(most, max(fewest, length // _TOKENS_PER_FACT))
    count = rng.randint(fewest, most)
    facts, question, prefix, place = _ask(rng, _PEOPLE, count, supporting)
    depths = draw_depths(rng, len(facts))
    prose = Prose(rng)

    def body(words: int) -> str:
        context = hide(prose.words(words), facts, depths)
        return (
            f"Facts about people and places are hidden in a text. {_RULES[supporting]} "
            f"Answer with one place.\n\n{shots}{context}\n{question}"
        )

    return Draft(body, None, question, prefix, (place,))


def _ask(
    rng: random.Random, people: Sequence[str], count: int, supporting: int
) -> tuple[list[str], str, str, str]:
    """The facts of a story that can be asked about, question, answer's beginning, and answer."""
    while True:
        story = _tell(rng, people, count)
        if supporting == 1:
            who = rng.choice(list(story.people))
            question, prefix = f"Question: Where is {who}?", f"Answer: {who} is in the"
            return story.facts, question, prefix, story.people[who][-1]
        # A thing that was carried on from where it was taken, and came to its last place once.
        carried = {
            thing: trail
            for thing, trail in story.things.items()
            if len(trail) > 1 and trail.count(trail[-1]) == 1
        }
        if not carried:
            continue
        thing = rng.choice(list(carried))
        *_, before, last = carried[thing]
        if supporting == 2:
            question = f"Question: Where is the {thing}?"
            return story.facts, question, f"Answer: The {thing} is in the", last
        question = f"Question: Where was the {thing} before it came to the {last}?"
        prefix = f"Answer: Before the {last}, the {thing} was in the"
        return story.facts, question, prefix, before


def _tell(rng: random.Random, people: Sequence[str], count: int) -> _Story:
    story = _Story()
    for _ in range(count):
        _happen(rng, people, story)
    return story


def _happen(rng: random.Random, people: Sequence[str], story: _Story) -> None:
    """One more fact: someone moves, or takes or drops a thing."""
    who = rng.choice(people)
    trail = story.people.get(who)
    here = trail[-1] if trail else None
    held = [thing for thing, holder in story.holder.items() if holder == who]
    # A thing that nobody has held yet may be anywhere.
    free = [
        thing
        for thing in _THINGS
        if thing not in story.holder and story.things.get(thing, [here])[-1] == here
    ]
    choice = rng.random()
    if here is not None and free and choice < 0.35:
        thing = rng.choice(free)
        story.facts.append(f"{who} {rng.choice(_TAKES)} the {thing} there.")
        story.holder[thing] = who
        story.things.setdefault(thing, [here])
    elif held and choice < 0.5:
        thing = rng.choice(held)
        story.facts.append(f"{who} {rng.choice(_DROPS)} the {thing} there.")
        del story.holder[thing]
    else:
        place = rng.choice([place for place in PLACES if place != here])
        story.facts.append(f"{who} {rng.choice(_MOVES)} the {place}.")
        story.people.setdefault(who, []).append(place)
        for thing in held:
            story.things[thing].append(place)
