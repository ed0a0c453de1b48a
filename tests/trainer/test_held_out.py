"""NLL of held-out responses by example, and batches that lie in the memory of their prompts."""

import contextlib

import pytest
import torch

from memdlm.config import DiffusionConfig
from memdlm.data.collator import MaskCollator
from memdlm.evaluation.held_out import adapted_batches, held_out_nll, prompt_of
from tests.families import make_family_model
from tests.tiny import MASK, PAD, VOCABULARY, make_features, make_model

SHAPES = [(12, 4), (9, 0), (5, 4), (11, 3)]
IDS = {"mask_token_id": MASK, "pad_token_id": PAD}


@torch.no_grad()
def plain_nll(model, example, number, draws, seed, shift=False):
    """The weighted sum over masked tokens, from all logits of the model."""
    collator = MaskCollator(MASK, PAD, VOCABULARY, DiffusionConfig(), seed=seed)
    total = 0.0
    for draw in range(draws):
        batch = collator([{**example, "example": number, "epoch": draw}])
        noisy = batch["anchor"]["input_ids"]
        logits = model(noisy, is_causal=False, use_cache=False).logits[0]
        if shift:
            logits = torch.cat((logits[:1], logits[:-1]))
        log_p = logits.log_softmax(-1)
        masked = (noisy[0] != batch["input_ids"][0]).nonzero().flatten().tolist()
        weight = 1 / (batch["time"].item() + 1e-6)
        truth = batch["input_ids"][0]
        responses = sum(label >= 0 for label in example["labels"])
        total += weight * sum(-log_p[i, truth[i]].item() for i in masked) / responses
    return total / draws


@pytest.mark.parametrize("family", ["llama", "llada_moe", "dream"])
def test_each_example_has_the_nll_of_a_plain_sum(family):
    model = (make_model() if family == "llama" else make_family_model(family)).eval()
    examples = make_features(SHAPES)
    own = held_out_nll(
        model, examples, DiffusionConfig(loss_norm="token"), draws=3, batch_size=3, seed=7, **IDS
    )
    plain = [
        plain_nll(model, each, number, 3, 7, shift=family == "dream")
        for number, each in enumerate(examples)
    ]
    torch.testing.assert_close(own, torch.tensor(plain, dtype=torch.float64), rtol=1e-6, atol=0)


def test_block_diffusion_pads_to_whole_blocks():
    model = make_family_model("llada2").eval()
    diffusion = DiffusionConfig(block_size=4)
    examples = make_features(SHAPES)
    together = held_out_nll(model, examples, diffusion, batch_size=4, **IDS)
    alone = held_out_nll(model, examples, diffusion, batch_size=1, **IDS)
    torch.testing.assert_close(together, alone)


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
