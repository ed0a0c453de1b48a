"""The long-context probes: solvable from the prompt, as long as they may be, and scored right."""

import collections
import re

import pytest
from tokenizers.processors import TemplateProcessing

from memdlm.demo.examples import load_tokenizer
from memdlm.evaluation.scoring import score
from memdlm.evaluation.tasks import ANSWER_TOKENS, TASKS, build
from memdlm.evaluation.tasks.supporting_facts import PLACES
from memdlm.evaluation.tasks.text import hide, word_list

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def chat_tokenizer():
    tokenizer = type(load_tokenizer()).from_pretrained(load_tokenizer().name_or_path)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def solve(task, prompt):
    """What the prompt says, read by rules; nothing but its text is known."""
    return {"mv": values_of, "vt": variables_of, "cwe": words_of}.get(task, place_of)(prompt)


def values_of(prompt):
    (key,) = re.findall(r"all the special numbers for (\S+) that", prompt)
    return " and ".join(re.findall(rf"special number for {key} is (\d+)\.", prompt))


def variables_of(prompt):
    value = re.findall(r"hold the value (\d+), directly", prompt)[-1]
    holders = set(re.findall(rf"VAR (\w+) = {value}\.", prompt))
    lines = re.findall(r"VAR (\w+) = VAR (\w+)\.", prompt)
    for _ in lines:
        holders |= {new for new, old in lines if old in holders}
    return ", ".join(holders)


def words_of(prompt):
    listed = prompt.split("occur more often than others.")[-1]
    counts = collections.Counter(re.findall(r"\d+\. ([a-z]+)", listed))
    best = counts.most_common(11)
    assert best[9][1] > best[10][1]
    return " ".join(word for word, _ in best[:10])


def place_of(prompt):
    question = prompt.rpartition("Question: ")[2]
    people, held, things = {}, {}, collections.defaultdict(list)
    facts = re.findall(
        r"(Mary|John|Daniel|Sandra) ([a-z ]+?) the (\w+)(?: there)?\.(?= |\n)", prompt
    )
    for who, _, what in facts:
        if what in PLACES:
            people[who] = what
            for thing in [thing for thing, holder in held.items() if holder == who]:
                things[thing].append(what)
        elif held.get(what) == who:
            del held[what]
        else:
            held[what] = who
            if not things[what]:
                things[what].append(people[who])
    person = re.match(r"Where is (Mary|John|Daniel|Sandra)\?", question)
    if person:
        return people[person[1]]
    thing = re.match(r"Where is the (\w+)\?", question)
    if thing:
        return things[thing[1]][-1]
    thing, last = re.match(r"Where was the (\w+) before it came to the (\w+)\?", question).groups()
    trail = things[thing]
    assert trail[-1] == last
    return trail[-2]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("length", "count"), [(256, 12), (300, 6), (1024, 8), (4096, 4), (32_768, 1)]
)
def test_who_reads_the_whole_prompt_scores_in_full_and_it_is_as_long_as_may_be(
    tokenizer, task, length, count
):
    room = ANSWER_TOKENS[task]
    for example in build(task, tokenizer, length, count, seed=3):
        assert score(example, solve(task, example.prompt)) == 1
        assert score(example, "") == 0
        assert score(example, "17?") == 0
        assert tokenizer(example.prompt).input_ids == example.prompt_ids
        # Less is left than the next word, or the next word's repetitions, would take.
        left = length - room - len(example.prompt_ids)
        assert 0 <= left < (24 if task == "cwe" else 32)


@pytest.mark.parametrize("task", TASKS)
def test_an_example_depends_on_its_index_not_on_how_many_there_are(tokenizer, task):
    few, many = (build(task, tokenizer, 512, count, seed=0) for count in (2, 5))
    assert few == many[:2]
    assert len({example.prompt for example in many}) == 5
    assert build(task, tokenizer, 512, 1, seed=1)[0].prompt != few[0].prompt


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_cannot_hold_the_task_is_refused_with_the_least_that_can(tokenizer, task):
    with pytest.raises(ValueError, match="length must be at least") as caught:
        build(task, tokenizer, 96, 3, seed=0)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    assert len(build(task, tokenizer, least, 3, seed=0)) == 3


def test_a_longer_answer_takes_its_room_from_the_prompt(tokenizer):
    (example,) = build("vt", tokenizer, 512, 1, seed=0, answer_tokens=128)
    assert 0 <= 512 - 128 - len(example.prompt_ids) < 16


def test_the_chat_template_goes_around_the_question_and_before_the_answer(chat_tokenizer):
    for task in TASKS:
        (example,) = build(task, chat_tokenizer, 512, 1, seed=0, chat=True)
        user, _, answer = example.prompt.partition("<|assistant|>")
        assert user.startswith("<|user|>")
        assert user.endswith(example.question)
        assert answer
        assert 0 <= 512 - ANSWER_TOKENS[task] - len(example.prompt_ids) < 24
        assert score(example, solve(task, example.prompt.replace("<|assistant|>", "\n"))) == 1


def test_a_token_that_begins_every_text_is_there_and_counted(chat_tokenizer):
    begin = chat_tokenizer.eos_token
    chat_tokenizer.add_special_tokens({"bos_token": begin})
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, chat_tokenizer.bos_token_id)]
    )
    (example,) = build("vt", chat_tokenizer, 300, 1, seed=0)
    assert example.prompt_ids == chat_tokenizer(example.prompt).input_ids
    assert example.prompt_ids[0] == chat_tokenizer.bos_token_id
    assert 0 <= 300 - ANSWER_TOKENS["vt"] - len(example.prompt_ids) < 16


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task": "qa9"}, "task must be one of mv"),
        ({"count": 0}, "count must be at least 1"),
        ({"chat": True}, "chat must be false"),
        ({"length": 200_000, "task": "cwe"}, "tokens only"),
    ],
)
def test_what_cannot_be_built_is_refused(tokenizer, keys, message):
    given = {"task": "mv", "length": 512, "count": 1, "seed": 0} | keys
    with pytest.raises(ValueError, match=message):
        build(tokenizer=tokenizer, **given)


def test_needles_and_words_score_by_the_share_that_is_named(tokenizer):
    (example,) = build("mv", tokenizer, 512, 1, seed=0)
    values = example.references
    assert len(set(values)) == 4
    assert score(example, f"{values[0]}, {values[2]}") == 0.5
    assert score(example, "".join(values)) == 1
    (example,) = build("vt", tokenizer, 512, 1, seed=0)
    assert score(example, "  ".join(name.lower() for name in example.references)) == 1
    (example,) = build("cwe", tokenizer, 512, 1, seed=0)
    assert score(example, f"1. {example.references[0].upper()} 2. nothing") == 0.1


def test_a_place_scores_where_no_other_is_named_but_those_of_the_question(tokenizer):
    (example,) = build("qa3", tokenizer, 512, 1, seed=0)
    (place,) = example.references
    (asked,) = [other for other in PLACES if other in example.question]
    other = next(name for name in PLACES if name not in (place, asked))
    assert score(example, f" {place.upper()}.") == 1
    assert score(example, f"the {place}, before the {asked}") == 1
    assert score(example, f"the {place} or the {other}") == 0
    assert score(example, f"the {place}. Not the {other}.") == 1
    assert score(example, f"not said. The {place}.") == 0
    assert score(example, other) == 0
    assert score(example, asked) == 0


def test_common_words_occur_as_often_as_ruler_says(tokenizer):
    for length, often, rare in ((1024, 6, 1), (4096, 30, 3)):
        (example,) = build("cwe", tokenizer, length, 1, seed=0)
        listed = example.prompt.split("occur more often than others.")[-1]
        counts = collections.Counter(re.findall(r"\d+\. ([a-z]+)", listed))
        assert {counts.pop(word) for word in example.references} == {often}
        assert set(counts.values()) == {rare}


def test_a_common_word_is_no_part_of_another_word(tokenizer):
    words = word_list()
    for example in build("cwe", tokenizer, 1024, 20, seed=0):
        others = " ".join(set(words) - set(example.references))
        assert score(example, others) == 0
        for reference in example.references:
            assert score(example, reference) == 0.1


def test_sentences_are_hidden_in_order_where_a_sentence_ends():
    words = "One two. Three four. Five six. Seven".split()
    assert hide(words, ["A.", "B."], [0.0, 0.7]) == "A. One two. Three four. B. Five six. Seven"
    assert hide(words, ["A."], [0.99]) == "One two. Three four. Five six. A. Seven"
    assert hide([], ["A.", "B."], [0.2, 0.9]) == "A. B."


def test_facts_spread_over_the_whole_text(tokenizer):
    places = []
    for example in build("qa2", tokenizer, 4096, 6, seed=0):
        context = example.prompt.split(".\n\n")[-1]
        found = re.finditer(r"(?:Mary|John|Daniel|Sandra) [a-z ]+? the \w+", context)
        places += [match.start() / len(context) for match in found]
    assert min(places) < 0.1
    assert max(places) > 0.85
    assert 0.3 < sum(places) / len(places) < 0.65
