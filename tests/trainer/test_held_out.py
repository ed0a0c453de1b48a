"""NLL of held-out responses by example, and batches that lie in the memory of their prompts."""

import contextlib
import itertools

import pytest
import torch

from memdlm.evaluation.held_out import adapted_batches, check_prompts, prompt_of
from memdlm.evaluation.nll import held_out_nll
from tests.families import make_family_model
from tests.tiny import MASK, PAD, make_features, make_model

SHAPES = [(12, 4), (9, 0), (5, 4), (11, 3)]
IDS = {"mask_token_id": MASK, "pad_token_id": PAD}


@torch.no_grad()
def exact_nll(model, example, shift):
    """The bound over all masks of a short response, per token, from all logits of the model."""
    truth = torch.tensor([example["input_ids"]])
    response = [i for i, label in enumerate(example["labels"]) if label >= 0]
    total = 0.0
    for count in range(1, len(response) + 1):
        subsets = list(itertools.combinations(response, count))
        for masked in subsets:
            noisy = truth.clone()
            noisy[0, list(masked)] = MASK
            logits = model(noisy, is_causal=False, use_cache=False).logits[0]
            if shift:
                logits = torch.cat((logits[:1], logits[:-1]))
            log_p = logits.log_softmax(-1)
            nll = -sum(log_p[i, truth[0, i]].item() for i in masked)
            total += nll / count / len(subsets) / len(response)
    return total


@pytest.mark.parametrize("family", ["llama", "dream"])
def test_the_nll_is_the_bound_per_token(family):
    model = (make_model() if family == "llama" else make_family_model(family)).eval()
    examples = make_features([(7, 4), (5, 4), (8, 3)])
    own = held_out_nll(model, examples, draws=800, batch_size=3, seed=7, **IDS)
    for each, example in zip(own.tolist(), examples, strict=True):
        assert each == pytest.approx(exact_nll(model, example, family == "dream"), rel=0.03)


def test_a_gap_in_a_response_is_refused():
    example = {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]}
    with pytest.raises(ValueError, match="no -100 in a response, got example 0"):
        held_out_nll(make_model().eval(), [example], **IDS)


def test_a_memory_needs_prompts():
    check_prompts(make_features([(5, 1)]))
    with pytest.raises(ValueError, match="none in example 1"):
        check_prompts(make_features([(5, 1), (5, 0)]))


def test_a_prompt_is_what_stands_before_the_first_label():
    assert prompt_of({"input_ids": [4, 5, 6], "labels": [-100, -100, 6]}) == [4, 5]
    assert prompt_of({"input_ids": [4, 5], "labels": [4, 5]}) == []
    assert prompt_of({"input_ids": [4, 5], "labels": [-100, -100]}) == [4, 5]


def test_each_batch_is_inside_the_memory_of_its_prompts():
    inside = []

    @contextlib.contextmanager
    def adapt(prompts):
        inside.append([len(prompt) for prompt in prompts])
        yield
        inside.append("left")

    seen = [
        (first, len(batch), inside[-1])
        for first, batch in adapted_batches(make_features(SHAPES), 3, adapt, "test")
    ]
    assert seen == [(0, 3, [4, 0, 4]), (3, 1, [3])]
    assert inside == [[4, 0, 4], "left", [3], "left"]
