"""A memory written from prompts: each prompt its own, whatever else is in the batch."""

import pytest
import torch

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.prompt_memory import PromptMemory
from tests.families import FAMILIES, make_family_model
from tests.tiny import MASK, PAD, VOCABULARY, make_model

PROMPTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8], [1, 6, 1, 8, 0, 3, 3])


@pytest.fixture
def model():
    return make_model().eval()


def make_memory(model, **options):
    return PromptMemory(
        model,
        DiffusionConfig(),
        MemoryConfig(rank=4, **options),
        mask_token_id=MASK,
        pad_token_id=PAD,
        vocab_size=VOCABULARY,
    )


def logits(model, prompt):
    return model(input_ids=torch.tensor([prompt]), is_causal=False, use_cache=False).logits


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
def test_each_prompt_has_the_memory_that_it_has_alone(model, inner_steps):
    memory = make_memory(model, inner_steps=inner_steps)
    same_length = [prompt[:4] for prompt in PROMPTS]
    with torch.no_grad():
        with memory.write(same_length):
            together = model(
                input_ids=torch.tensor(same_length), is_causal=False, use_cache=False
            ).logits
        for row, prompt in enumerate(same_length):
            with memory.write([prompt]):
                torch.testing.assert_close(together[row : row + 1], logits(model, prompt))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_backbone_reads_the_memory_of_its_row(family):
    model = make_family_model(family).eval()
    memory = make_memory(model)
    same_length = [prompt[:4] for prompt in PROMPTS]
    with memory.write(same_length):
        together = model(torch.tensor(same_length), is_causal=False, use_cache=False).logits
    bare = model(torch.tensor(same_length), is_causal=False, use_cache=False).logits
    assert not torch.allclose(together, bare)
    for row, prompt in enumerate(same_length):
        with memory.write([prompt]):
            torch.testing.assert_close(together[row : row + 1], logits(model, prompt))


@pytest.mark.parametrize("family", ["llada_moe", "dream"])
@torch.no_grad()
def test_a_batch_of_another_size_than_the_prompts_is_refused(family):
    model = make_family_model(family).eval()
    memory = make_memory(model)
    with memory.write([prompt[:4] for prompt in PROMPTS]):
        for size in (1, 6):
            with pytest.raises(ValueError, match=f"must have 3 sequences, .* got {size}"):
                model(torch.ones(size, 6, dtype=torch.int64))
    model(torch.ones(6, 6, dtype=torch.int64))


def test_ragged_prompts_do_not_touch_each_other(model):
    memory = make_memory(model)
    weights = memory._objective.fast_weights
    memory.write(PROMPTS)
    together = {name: [t.clone() for t in pair] for name, pair in weights.named().items()}
    for row, prompt in enumerate(PROMPTS):
        memory.write([prompt])
        for name, alone in weights.named().items():
            for ours, own in zip(together[name], alone, strict=True):
                torch.testing.assert_close(ours[row], own[0], rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_the_memory_is_read_inside_its_context_only(model):
    before = logits(model, PROMPTS[0])
    memory = make_memory(model)
    with memory.write(PROMPTS[:1]):
        assert not torch.equal(logits(model, PROMPTS[0]), before)
    assert torch.equal(logits(model, PROMPTS[0]), before)


@torch.no_grad()
def test_writing_lowers_the_loss_of_the_prompt_itself(model):
    memory = make_memory(model, inner_epochs=5)
    trace = memory._objective.write_memory(
        memory._collator(
            [{"input_ids": PROMPTS[0], "labels": PROMPTS[0], "example": 0, "epoch": 0}]
        )
    )
    assert trace.loss[-1] < trace.loss[1]


def test_a_reading_of_an_older_prompt_is_an_error(model):
    memory = make_memory(model)
    first = memory.write(PROMPTS[:1])
    memory.write(PROMPTS[1:2])
    with pytest.raises(RuntimeError, match="written again"):
        first.__enter__()
