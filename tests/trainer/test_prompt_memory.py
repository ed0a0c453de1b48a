"""A memory written from prompts: each prompt its own, whatever else is in the batch."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.inference import Checkpoint
from memdlm.objective import MemDLMObjective
from memdlm.prompt_memory import PromptMemory
from tests.families import FAMILIES, make_family_model
from tests.tiny import MASK, PAD, VOCABULARY, make_model
from tests.trainer.memory_case import (
    EIGHT,
    PROMPTS,
    assert_same,
    fast_weights,
    logits,
    make_memory,
    snapshot,
)

CANVAS = [5, MASK, 7, 8, MASK]


@pytest.fixture
def model():
    return make_model().eval()


def make_checkpoint(model, memory):
    class Tokenizer:
        pad_token_id = PAD

    return Checkpoint(model, Tokenizer(), MASK, DiffusionConfig(), memory, "some/folder")


@pytest.mark.parametrize("inner_steps", [1, 2, 3])
def test_eight_prompts_together_are_each_as_alone(model, inner_steps):
    memory = make_memory(model, inner_steps=inner_steps, layer_fraction=0.5)
    with memory.adapt(EIGHT, merge=False) as trace:
        together, written = logits(model, [CANVAS] * 8), fast_weights(memory)
    for row, prompt in enumerate(EIGHT):
        with memory.adapt([prompt], merge=False) as own:
            torch.testing.assert_close(fast_weights(memory)[0], written[row], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(logits(model, CANVAS)[0], together[row])
            torch.testing.assert_close(own.loss[:, 0], trace.loss[:, row])
            torch.testing.assert_close(own.norm[:, 0], trace.norm[:, row])
    assert trace.loss.shape == (inner_steps, 8)
    assert trace.skipped.shape == (inner_steps, 8)
    assert trace.chunks == (1,) * 8
    assert len({tuple(row.tolist()) for row in written}) == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_every_backbone_reads_the_memory_of_its_row(family):
    model = make_family_model(family).eval()
    memory = make_memory(model)
    with memory.adapt(PROMPTS):
        together = logits(model, [CANVAS] * 3)
    assert not torch.allclose(together, logits(model, [CANVAS] * 3))
    for row, prompt in enumerate(PROMPTS):
        with memory.adapt([prompt], merge=False):
            torch.testing.assert_close(together[row], logits(model, CANVAS)[0])


@pytest.mark.parametrize("family", ["llada_moe", "dream"])
@torch.no_grad()
def test_a_batch_of_another_size_than_the_prompts_is_refused(family):
    model = make_family_model(family).eval()
    memory = make_memory(model)
    with memory.adapt(PROMPTS):
        for size in (1, 6):
            with pytest.raises(ValueError, match=f"must have 3 sequences, .* got {size}"):
                model(torch.ones(size, 6, dtype=torch.int64))
    model(torch.ones(6, 6, dtype=torch.int64))


def test_the_memory_is_read_inside_its_context_only(model):
    before = logits(model, CANVAS)
    memory = make_memory(model)
    with memory.adapt(PROMPTS[:1]):
        assert not torch.equal(logits(model, CANVAS), before)
    assert torch.equal(logits(model, CANVAS), before)


def test_writing_lowers_the_loss_of_the_prompt_itself(model):
    with make_memory(model, inner_epochs=5).adapt(PROMPTS) as trace:
        assert (trace.loss[-1] < trace.loss[1]).all()


@pytest.mark.parametrize("merge", [None, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_afterwards_the_model_is_what_it_was(merge, training, count):
    model = make_family_model("llada_moe").train(training)
    model.model.layers[0].self_attn.train(not training)
    for parameter in model.model.layers[-1].mlp.gate.parameters():
        parameter.requires_grad_(False)
    memory = make_memory(model)
    before = snapshot(model)
    with memory.adapt(PROMPTS[:count], merge=merge):
        assert not any(module.training for module in model.modules())
        logits(model, [CANVAS] * count)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("merge", [True, False])
def test_an_exception_inside_leaves_the_model_as_it_was(model, merge):
    memory, before = make_memory(model.train()), snapshot(model)
    with pytest.raises(KeyError, match="inside"), memory.adapt(PROMPTS[:1], merge=merge):
        raise KeyError("inside")
    assert_same(before, snapshot(model))
    with memory.adapt(PROMPTS[:1]):
        pass


def test_an_exception_while_writing_leaves_the_model_as_it_was(model, monkeypatch):
    memory, before = make_memory(model.train()), snapshot(model)
    write = MemDLMObjective.write_memory

    def fail(*args, **options):
        write(*args, **options)
        raise KeyError("writing")

    monkeypatch.setattr(MemDLMObjective, "write_memory", fail)
    with pytest.raises(KeyError, match="writing"), memory.adapt(PROMPTS):
        pytest.fail("entered")
    assert_same(before, snapshot(model))
    with pytest.raises(ValueError, match="got none"):
        memory.save("nowhere")


def test_dropout_is_off_in_writing_and_reading():
    outputs = []
    for dropout in (0.0, 0.5):
        lora = LoraConfig(
            r=2,
            lora_dropout=dropout,
            target_modules=["up_proj", "q_proj"],
            init_lora_weights=False,
        )
        torch.manual_seed(0)
        model = get_peft_model(make_model(attention_dropout=dropout), lora).double().train()
        memory = make_memory(model)
        with memory.adapt(PROMPTS):
            outputs.append((fast_weights(memory), logits(model, [CANVAS] * 3)))
        assert model.training
    for plain, dropped in zip(*outputs, strict=True):
        assert torch.equal(plain, dropped)


def test_a_memory_is_written_under_inference_mode(model):
    memory = make_memory(model)
    with memory.adapt(PROMPTS[:1]):
        expected = logits(model, CANVAS)
    before = snapshot(model)
    with torch.inference_mode(), memory.adapt(PROMPTS[:1]):
        actual = logits(model, CANVAS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert_same(before, snapshot(model))
    with torch.inference_mode():
        made_inside = make_memory(model)
        with made_inside.adapt(PROMPTS[:1]):
            torch.testing.assert_close(logits(model, CANVAS), expected, rtol=0, atol=0)
    with made_inside.adapt(PROMPTS[:1]):
        torch.testing.assert_close(logits(model, CANVAS), expected, rtol=0, atol=0)


@pytest.mark.parametrize("wrapped", [False, True])
def test_one_memory_at_a_time_on_a_model(model, wrapped):
    first = make_memory(model)
    other = model
    if wrapped:
        other = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    second, strange = make_memory(other), make_memory(make_model().eval())
    before = snapshot(model)
    with first.adapt(PROMPTS[:1], merge=True):
        expected = logits(model, CANVAS)
        with pytest.raises(RuntimeError, match="one memory at a time"), second.adapt(PROMPTS):
            pytest.fail("entered")
        assert torch.equal(logits(model, CANVAS), expected)
        with strange.adapt(PROMPTS):
            pass
    assert_same(before, snapshot(model))
    with second.adapt(PROMPTS):
        pass


@pytest.mark.parametrize("family", ["llada_moe", "olmoe"])
def test_experts_run_as_before_once_it_is_detached(family):
    model = make_family_model(family, torch.bfloat16).eval()
    ids = [EIGHT[7]] * 4
    before = logits(model, ids)
    memory = make_memory(model)
    assert not torch.equal(logits(model, ids), before)
    with memory.adapt(PROMPTS, merge=False):
        pass
    memory.detach()
    assert torch.equal(logits(model, ids), before)
    memory.detach()
    with make_memory(model).adapt(PROMPTS):
        pass


def test_experts_are_left_to_a_backbone_that_still_needs_them():
    model = make_family_model("olmoe").eval()
    own = model.config._experts_implementation
    first, second = make_memory(model), make_memory(model)
    first.detach()
    with second.adapt(PROMPTS):
        assert not torch.equal(logits(model, [CANVAS] * 3), logits(model, [EIGHT[1][:5]] * 3))
    second.detach()
    assert model.config._experts_implementation == own


def test_the_graph_is_left_out_where_there_is_no_cuda(model):
    written = []
    for inner_graph in (False, True):
        memory = make_memory(model, inner_graph=inner_graph)
        with memory.adapt(PROMPTS):
            written.append(fast_weights(memory))
    assert torch.equal(*written)


def test_a_checkpoint_trained_with_the_exact_gradient_writes_the_same_memory(model):
    written = []
    for meta_gradient in ("first_order", "exact"):
        memory = make_memory(model, meta_gradient=meta_gradient)
        with memory.adapt(PROMPTS):
            written.append(fast_weights(memory))
    assert torch.equal(*written)
    # Nothing is differentiated twice: an attention that could not be is no reason to refuse.
    model.config._attn_implementation = "flash_attention_2"
    make_memory(model, meta_gradient="exact").detach()


def test_a_memory_that_is_not_merged_is_read_in_as_many_rows_as_prompts(model):
    memory = make_memory(model)
    with (
        memory.adapt(PROMPTS[:1], merge=False),
        pytest.raises(ValueError, match=r"input_ids must have 1 sequences, .* got 3"),
    ):
        logits(model, [CANVAS] * 3)


def test_one_memory_at_a_time(model):
    memory = make_memory(model)
    before = snapshot(model)
    with memory.adapt(PROMPTS):
        expected = logits(model, [CANVAS] * 3)
        with pytest.raises(RuntimeError, match="one memory at a time"), memory.adapt(PROMPTS):
            pytest.fail("entered")
        assert torch.equal(logits(model, [CANVAS] * 3), expected)
    assert_same(before, snapshot(model))
    memory.detach()
    with pytest.raises(RuntimeError, match="detached"), memory.adapt(PROMPTS):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts must hold at least one prompt, got none"),
        ([[1, 2], []], r"prompts\[1\] must have at least one token, got none"),
        ([[1, MASK, 2]], rf"prompts\[0\] must not hold the mask token, {MASK}, .* position 1"),
        ([[1] * 65], r"prompts\[0\] must have at most the model's 64 positions, got 65"),
        (
            [[1, VOCABULARY]],
            rf"prompts\[0\] must hold token ids in \[0, .*{VOCABULARY}\), got 61 at position 1",
        ),
        ([[1, -1]], r"prompts\[0\] must hold token ids"),
        ([1, 2], r"prompts\[0\] must be a list of token ids, got 1"),
        ([[1.5, 2.0]], r"prompts\[0\] must be a list of token ids, got 1.5 at position 0"),
        ([["a", "b"]], r"prompts\[0\] must be a list of token ids, got 'a' at position 0"),
        ([[1], [2, None]], r"prompts\[1\] must be a list of token ids, got None at position 1"),
        ([[[1], [1, 2]]], r"prompts\[0\] must be a list of token ids, got \[1\] at position 0"),
        ([[True, 2]], r"prompts\[0\] must be a list of token ids, got True at position 0"),
        ([[2**70]], rf"prompts\[0\] must hold token ids in \[0, .*got {2**70} at position 0"),
        ([{1: 2}], r"prompts\[0\] must be a list of token ids, got \{1: 2\}"),
        (torch.tensor([1, 2]), r"prompts\[0\] must be a list of token ids, got 1"),
        (torch.tensor(3), "prompts must be a list of lists of token ids, got tensor"),
        (None, "prompts must be a list of lists of token ids, got None"),
        ("text", "prompts must be a list of lists of token ids, got 'text'"),
        ({1: 2}, "prompts must be a list of lists of token ids, got"),
        (["text"], r"prompts\[0\] must be a list of token ids, got 'text'"),
    ],
)
def test_what_is_no_prompt_is_refused_before_any_work(model, monkeypatch, prompts, message):
    memory = make_memory(model)
    monkeypatch.setattr(MemDLMObjective, "write_memory", lambda *args, **options: 1 / 0)
    with pytest.raises(ValueError, match=message), memory.adapt(prompts):
        pytest.fail("entered")


def test_a_prompt_may_be_a_tensor(model):
    memory = make_memory(model)
    written = []
    own = torch.tensor(PROMPTS[0])
    for prompts in ([PROMPTS[0]], [own], own[None], [own.numpy()], [tuple(own)]):
        with memory.adapt(prompts):
            written.append(fast_weights(memory))
    assert all(torch.equal(other, written[0]) for other in written)


def test_the_prompt_ratio_is_the_share_that_the_anchor_masks(model):
    prompt = [(3 * place) % PAD for place in range(60)]
    for ratio in (0.2, 1.0):
        memory = make_memory(model, prompt_ratio=ratio)
        features = [{"input_ids": prompt, "labels": prompt, "example": 0, "epoch": 0}]
        masked = (memory._collator(features)["anchor"]["input_ids"] == MASK).float().mean()
        assert masked == pytest.approx(ratio, abs=0.12)
        memory.detach()
    with pytest.raises(ValueError, match=r"prompt_ratio must be in \(0, 1\], got 0"):
        MemoryConfig(prompt_ratio=0)


def test_of_a_checkpoint(model):
    options = MemoryConfig(rank=4, scope="batch", prompt_ratio=0.5)
    written = []
    made = PromptMemory.of(make_checkpoint(model, options), seed=3)
    by_hand = make_memory(model, seed=3, prompt_ratio=0.5)
    other = make_memory(model, prompt_ratio=0.5)
    for memory in (made, by_hand, other):
        with memory.adapt(PROMPTS, merge=False):
            written.append(fast_weights(memory))
    assert torch.equal(written[0], written[1])
    assert not torch.equal(written[0], written[2])


def test_of_a_checkpoint_without_a_memory(model):
    with pytest.raises(ValueError, match="some/folder, which was trained without one"):
        PromptMemory.of(make_checkpoint(model, None))


def test_the_options_of_training_are_kept(model):
    options = dataclasses.asdict(MemoryConfig(rank=4))
    memory = make_memory(model)
    assert dataclasses.asdict(memory._objective.memory) == options | {"scope": "sample"}
