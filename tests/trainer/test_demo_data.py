"""The demo's data: deterministic examples whose values can be found in their prompts."""

import random
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from memdlm.data.corpus import passages
from memdlm.demo.examples import IGNORE_INDEX, build_examples, load_text, load_tokenizer
from memdlm.demo.initialise import OFFSETS, initialise_for_copying
from memdlm.demo.needles import KEYS, answer, statement
from memdlm.demo.pretrain import CURRICULUM, base_config, facts_row, pairs_row, span_row


def test_keys_and_digit_pairs_are_single_tokens() -> None:
    tokenizer = load_tokenizer()
    assert all(len(tokenizer(f" {key}").input_ids) == 1 for key in KEYS)
    assert all(len(tokenizer(f"{pair:02d}").input_ids) == 1 for pair in range(100))
    assert all(len(tokenizer(f" {pair:02d}").input_ids) == 1 for pair in range(100))


def test_splits_share_no_paragraph() -> None:
    train, held_out = (
        {paragraph for text in passages(split) for paragraph in text.split("\n\n")}
        for split in ("train", "validation")
    )
    assert not train & held_out


def test_examples_are_the_same_for_the_same_arguments() -> None:
    assert build_examples("train", 6, 128, 3) == build_examples("train", 6, 128, 3)
    assert build_examples("train", 6, 128, 3) != build_examples("train", 6, 128, 4)
    # An example does not depend on how many there are.
    assert build_examples("train", 6, 128, 3)[:2] == build_examples("train", 2, 128, 3)


@pytest.mark.parametrize("length", [96, 256])
def test_values_stand_in_the_prompt_and_in_the_response(length: int) -> None:
    tokenizer = load_tokenizer()
    for example in build_examples("validation", 40, length, 0, recall_share=1.0):
        ids, labels = example["input_ids"], example["labels"]
        assert len(ids) == len(labels) == length
        prompt_length = labels.count(IGNORE_INDEX)
        assert labels[prompt_length:] == ids[prompt_length:]
        prompt = tokenizer.decode(ids[:prompt_length])
        response = tokenizer.decode(ids[prompt_length:])
        assert response == answer(example["values"]) + tokenizer.eos_token
        places = [prompt.index(statement(example["key"], value)) for value in example["values"]]
        assert places == sorted(places)
        for value, start in zip(example["values"], example["value_positions"], strict=True):
            assert tokenizer.decode(ids[start : start + 2]) == f" {value}"


def test_continuations_give_the_last_quarter() -> None:
    for example in build_examples("train", 5, 128, 0, recall_share=0.0):
        assert example["kind"] == "continuation"
        assert example["labels"].count(IGNORE_INDEX) == 96


@pytest.mark.parametrize(
    ("argument", "value"),
    [("split", "test"), ("n", -1), ("length", 95), ("recall_share", 1.5), ("several_share", -0.1)],
)
def test_bad_arguments_are_named(argument: str, value: object) -> None:
    arguments: dict[str, object] = {"split": "train", "n": 1, "length": 96, "seed": 0}
    with pytest.raises(ValueError, match=argument):
        build_examples(**{**arguments, argument: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [pairs_row, span_row, facts_row])
def test_pretraining_rows_have_their_length(make: Callable[..., list[int]]) -> None:
    rng = random.Random(0)
    for stage in CURRICULUM:
        for _ in range(20):
            assert len(make(load_text("train"), rng, stage.length)) == stage.length


def test_first_layer_attends_to_its_offsets() -> None:
    torch.manual_seed(0)
    config = base_config(load_tokenizer())
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval()
    initialise_for_copying(model)
    ids = torch.randint(3, config.vocab_size, (1, 32))
    out = model(ids, attention_mask=torch.zeros(1, 1, 32, 32), output_attentions=True)
    heads = out.attentions[0][0, :, 16]  # [H, L]
    assert [int(head.argmax()) - 16 for head in heads] == list(OFFSETS)


def test_a_model_of_another_shape_is_refused() -> None:
    config = base_config(load_tokenizer())
    config.attention_bias = False
    with pytest.raises(ValueError, match="attention_bias"):
        initialise_for_copying(LlamaForCausalLM(config))
