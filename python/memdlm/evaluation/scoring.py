"""The scores of the probes."""

from memdlm.evaluation.tasks import Example
from memdlm.evaluation.tasks.supporting_facts import PLACES


def score(example: Example, prediction: str) -> float:
    """How much of the answer is right; upper and lower case are one.

    Args:
        example: what was asked.
        prediction: what came after the prompt.

    Returns:
        float in [0, 1]. For needles, variables and words, the share of the references that the
        prediction contains (RULER's string_match_all, arXiv 2404.06654). For a place, 1 if the
        prediction's first sentence names it and no other place; those that the question names do
        not count (BABILong, arXiv 2406.10149).
    """
    said = prediction.lower()
    if example.answer == "all":
        return sum(word.lower() in said for word in example.references) / len(example.references)
    sentence = said.partition(".")[0]
    asked = example.question.lower()
    named = [place for place in PLACES if place in sentence and place not in asked]
    return float(named == list(example.references))
