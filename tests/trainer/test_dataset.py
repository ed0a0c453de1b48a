"""Data sets: their forms, what is masked, what is left out, and what is wrong with them."""

import json

import datasets
import pytest

from memdlm.data.dataset import load_examples, prepare_examples
from memdlm.data.numbered import EvaluationOrder, NumberedDataset, TrainOrder
from tests.trainer.trainer_case import END, VOCABULARY, tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% if m.role == 'assistant' %}<eos> "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four five"},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


def prepared(examples, tokenizer=None, max_length=64, truncation="drop"):
    return prepare_examples(
        "data",
        datasets.Dataset.from_list(examples),
        tokenizer or tiny_tokenizer(),
        VOCABULARY,
        max_length,
        truncation,
    ).to_list()


def words(ids):
    return tiny_tokenizer().decode(ids).split()


def masked(example):
    """The tokens that may be masked, after checking that labels are -100 or the token."""
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))
    assert all(label in (-100, token) for token, label in pairs)
    return words([label for _, label in pairs if label != -100])


def test_json_lines_json_arrays_and_saved_folders_are_the_same_examples(tmp_path):
    rows = [{"prompt": "one", "response": "two"}, {"prompt": "three", "response": "four"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})
    splits.save_to_disk(tmp_path / "splits")
    names = [write_lines(tmp_path / "rows.jsonl", rows)]
    names += [str(tmp_path / name) for name in ("rows.json", "saved", "splits")]
    for name in names:
        assert load_examples(name).to_list() == rows


def test_prompt_and_response_the_prompt_stays_visible_and_the_response_ends():
    [example] = prepared([{"prompt": "one two", "response": "three four"}])
    assert words(example["input_ids"]) == ["one", "two", "three", "four", "<eos>"]
    assert masked(example) == ["three", "four", "<eos>"]


def test_text_may_be_masked_everywhere():
    [example] = prepared([{"text": "one two"}])
    assert masked(example) == ["one", "two", "<eos>"]


def test_a_chat_without_a_template_becomes_lines_and_its_last_message_the_response():
    [example] = prepared([{"messages": CHAT}])
    assert masked(example) == ["four", "five", "<eos>"]
    assert words(example["input_ids"]).count("<eos>") == 1


def test_a_chat_with_a_template_ends_as_the_template_says():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    [example] = prepared([{"messages": CHAT}], tokenizer)
    assert masked(example) == ["four", "five", "<eos>"]
    # The earlier answer's end is part of the visible prompt.
    assert example["input_ids"].count(END) == 2


def test_saved_tokens_and_data_weights_are_kept():
    rows = [{"input_ids": [5, 6], "labels": [-100, 6], "weight": 0.5, "extra": "gone"}]
    assert prepared(rows) == [{"input_ids": [5, 6], "labels": [-100, 6], "weight": 0.5}]


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [("left", ["four", "five", "six", "<eos>"]), ("right", ["one", "two", "three", "four"])],
)
def test_long_examples_are_cut_where_asked(truncation, kept):
    rows = [{"prompt": "one two", "response": "three four five six"}]
    [example] = prepared(rows, max_length=4, truncation=truncation)
    assert words(example["input_ids"]) == kept


def test_long_examples_and_those_without_a_label_are_left_out(caplog):
    rows = [
        {"prompt": "one two three four", "response": "five"},
        {"prompt": "one", "response": "two"},
    ]
    [example] = prepared(rows, max_length=4)
    assert words(example["input_ids"]) == ["one", "two", "<eos>"]
    assert "left out 1 of 2" in caplog.text
    # Cut on the right, nothing of the response remains.
    [example] = prepared(rows, max_length=4, truncation="right")
    assert words(example["input_ids"]) == ["one", "two", "<eos>"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": CHAT[:3]}], "data, example 0: messages must end with .* 'assistant'"),
        ([{"messages": []}], "messages must end with"),
        (
            [{"prompt": "a", "response": "b"}, {"prompt": None, "response": "b"}],
            "example 1: prompt",
        ),
        ([{"input_ids": [5, 6], "labels": [5]}], "labels must have the length of input_ids"),
        ([{"input_ids": [5, 6], "labels": [5, 7]}], "labels must be -100 or equal input_ids"),
        ([{"input_ids": [5, 99], "labels": [5, 99]}], "input_ids must be in"),
        ([{"text": "one", "weight": float("nan")}], "weight must be a finite number"),
        ([{"text": "one", "weight": -1.0}], "weight must be a finite number"),
        ([{"text": "one", "weight": 1.0}, {"text": "two", "weight": None}], "weight must be"),
        ([{"prompt": "one " * 9, "response": "two"}], "no example with a label within max_length"),
    ],
)
def test_a_bad_example_is_named(rows, message):
    with pytest.raises(ValueError, match=message):
        prepared(rows, max_length=8)


def test_a_template_that_rewrites_the_prompt_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }} {{ messages[-1].content }}"
    with pytest.raises(ValueError, match="does not begin the whole chat with its prompt"):
        prepared([{"messages": CHAT}], tokenizer)


def test_missing_columns_are_told_with_those_that_are_there(tmp_path):
    name = write_lines(tmp_path / "rows.jsonl", [{"question": "one", "answer": "two"}])
    with pytest.raises(ValueError, match=r"prompt and response.*it has answer, question"):
        load_examples(name)


@pytest.mark.parametrize("content", ["", "\n", "not json\n", '{"text": "a"}\n{"text": \n'])
def test_a_file_that_is_not_json_lines_is_an_error(tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"dataset .*rows\.jsonl"):
        load_examples(str(tmp_path / "rows.jsonl"))


def test_a_missing_file_and_a_missing_split_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_examples(str(tmp_path / "none.jsonl"))
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "one"}])})
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="dataset_split must be one of test, got 'train'"):
        load_examples(str(tmp_path / "splits"))


def test_the_order_is_a_function_of_seed_and_epoch():
    order = TrainOrder(20, seed=3)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    assert sorted(first) == [(0, example) for example in range(20)]
    assert sorted(second) == [(1, example) for example in range(20)]
    assert [example for _, example in first] != [example for _, example in second]
    again = TrainOrder(20, seed=3)
    again.set_epoch(1)
    assert list(again) == second
    assert list(TrainOrder(20, seed=4)) != first


def test_evaluation_is_in_order_and_its_filler_has_no_label():
    order = EvaluationOrder(3, multiple=2)
    assert list(order) == [(0, 0), (0, 1), (0, 2), (0, -1)]
    data = NumberedDataset([{"input_ids": [5, 6], "labels": [-100, 6]}])
    assert data[4, 0] == {"input_ids": [5, 6], "labels": [-100, 6], "example": 0, "epoch": 4}
    assert data[0, -1]["labels"] == [-100, -100]
