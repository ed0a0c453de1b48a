"""Prompts in groups that fit a memory budget, and a prompt that is cut to fit."""

import dataclasses

import pytest
import torch

from memdlm.backbone import Backbone
from memdlm.config import DiffusionConfig
from memdlm.prompt_memory.plan import Writing, plan, row_bytes
from tests.families import make_family_model
from tests.oracle import adapted_modules
from tests.tiny import MASK, PAD, make_model
from tests.trainer.memory_case import EIGHT, PROMPTS, fast_weights, logits, make_memory

CANVAS = [5, MASK, 7, 8, MASK]


def budget(model, tokens, **options):
    """GiB that just hold so many tokens."""
    memory = make_memory(model, **options)
    memory.detach()
    per_token = row_bytes(memory._objective.backbone, memory._objective.memory)
    return (tokens + 0.5) * per_token / 2**30


def test_prompts_are_grouped_by_length_and_fit():
    lengths = [9, 2, 5, 4, 1, 3]
    writings = plan(lengths, 10, 1)
    assert [writing.prompts for writing in writings] == [(1, 4, 5), (2, 3), (0,)]
    assert all(writing.chunks == (slice(None),) for writing in writings)
    for writing in writings:
        assert len(writing.prompts) * max(lengths[p] for p in writing.prompts) <= 10
    assert plan(lengths, None, 1) == plan(lengths, 54, 1) == [Writing(tuple(range(6)))]
    # Padded to 4, two of them are too many.
    assert [writing.prompts for writing in plan([3, 2, 1], 7, 4)] == [(2,), (1,), (0,)]


@pytest.mark.parametrize(
    ("length", "most", "unit", "sizes"),
    [
        (10, 9, 1, [5, 5]),
        (10, 4, 1, [3, 3, 4]),
        (10, 1, 1, [1] * 10),
        (10, 9, 4, [4, 6]),
        (9, 11, 8, [8, 1]),
    ],
)
def test_a_prompt_that_does_not_fit_is_cut_evenly(length, most, unit, sizes):
    (writing,) = plan([length], most, unit)
    prompt = list(range(length))
    chunks = [prompt[chunk] for chunk in writing.chunks]
    assert [token for chunk in chunks for token in chunk] == prompt
    assert sorted(map(len, chunks)) == sorted(sizes)
    assert all(chunk[0] % unit == 0 for chunk in chunks)
    assert max(-(-len(chunk) // unit) * unit for chunk in chunks) <= most


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("family", ["dream", "llada_moe"])
def test_groups_are_written_as_if_together(family, dtype):
    model = make_family_model(family, dtype).eval()
    written = []
    for gib in (None, budget(model, 50)):
        memory = make_memory(model, budget_gib=gib)
        with memory.adapt(EIGHT) as trace:
            written.append((fast_weights(memory), logits(model, [CANVAS] * 8), trace.loss))
            assert trace.chunks == (1,) * 8
        if gib is not None:
            assert len(memory._plan([len(prompt) for prompt in EIGHT])) > 2
        memory.detach()
    exact = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(written[1][0], written[0][0], **exact)
    torch.testing.assert_close(written[1][2], written[0][2], **exact)
    if dtype == torch.float64:
        torch.testing.assert_close(written[1][1], written[0][1])


def written_by_hand(model, memory, chunks):
    """The naive twin: K steps of SGD by autograd on each chunk in turn, whole forward passes."""
    objective = memory._objective
    config, fast = objective.memory, objective.fast_weights
    names = {name.split("layers.")[-1]: name for name in adapted_modules(model, config)}
    read = [0]
    scale = config.lora_alpha / config.rank
    for number, chunk in enumerate(chunks):
        batch = memory._collator(
            [{"input_ids": chunk, "labels": chunk, "example": number, "epoch": 0}]
        )
        if number == 0:
            fast.reset(batch["memory_seed"])
            own = {
                name: [tensor[0].clone().requires_grad_() for tensor in pair]
                for name, pair in fast.named().items()
            }
        for state in batch["trajectory"]:
            weights = {
                f"{names[name]}.weight": model.get_submodule(names[name]).weight.detach()
                + scale * B @ A
                for name, (A, B) in own.items()
            }
            output = torch.func.functional_call(
                model,
                weights,
                (),
                {"input_ids": state["input_ids"], "is_causal": False, "use_cache": False},
            )
            masked = (state["input_ids"] == MASK)[0]
            read[0] += int(masked.sum())
            loss = 0.0
            if masked.any():
                loss = torch.nn.functional.cross_entropy(
                    output.logits[0, masked], torch.tensor(chunk)[masked]
                )
                leaves = [tensor for pair in own.values() for tensor in pair]
                gradients = torch.autograd.grad(loss, leaves)
                with torch.no_grad():
                    for leaf, gradient in zip(leaves, gradients, strict=True):
                        norm = gradient.norm()
                        leaf -= config.inner_lr * gradient * min(1.0, config.inner_max_norm / norm)
    assert read[0] > 0
    return {name: [tensor.detach() for tensor in pair] for name, pair in own.items()}


def test_chunks_are_written_one_after_another():
    model = make_model().eval()
    prompt = [(7 * place + place // 3) % PAD for place in range(40)]
    memory = make_memory(model, budget_gib=budget(model, 15), inner_steps=2)
    expected = written_by_hand(model, memory, [prompt[:13], prompt[13:26], prompt[26:]])
    with memory.adapt([prompt], merge=False) as trace:
        assert trace.chunks == (3,)
        assert trace.loss.shape == (6, 1)
        for name, pair in memory._objective.fast_weights.named().items():
            for actual, own in zip(pair, expected[name], strict=True):
                torch.testing.assert_close(actual[0], own, rtol=1e-9, atol=1e-12)


def test_whole_and_cut_prompts_in_one_memory():
    model = make_model().eval()
    gib = budget(model, 12)
    prompts = [EIGHT[7], PROMPTS[0], EIGHT[6], PROMPTS[1]]
    alone = []
    memory = make_memory(model, budget_gib=gib)
    for prompt in prompts:
        with memory.adapt([prompt], merge=False) as trace:
            alone.append((fast_weights(memory)[0], logits(model, CANVAS)[0], trace))
    with memory.adapt(prompts) as trace:
        assert trace.chunks == (3, 1, 2, 1)
        together = logits(model, [CANVAS] * 4)
        for row, (weights, output, own) in enumerate(alone):
            steps = len(own.loss)
            torch.testing.assert_close(fast_weights(memory)[row], weights, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(together[row], output)
            torch.testing.assert_close(trace.loss[:steps, row], own.loss[:, 0])
            assert trace.loss[steps:, row].isnan().all()
            assert trace.norm[steps:, row].isnan().all()
    assert not trace.skipped.any()


def test_chunks_end_at_blocks():
    model = make_model().eval()
    options = {"diffusion": DiffusionConfig(block_size=4)}
    memory = make_memory(model, budget_gib=budget(model, 8, **options), **options)
    with memory.adapt([list(range(22)), [1, 2]]) as trace:
        assert trace.chunks == (3, 1)
        assert [chunk.start for chunk in memory._plan([22])[0].chunks] == [0, 8, 16]


def test_the_estimate_counts_what_is_stored():
    model = make_model(layers=8)
    memory = make_memory(model, layer_fraction=0.5)

    def of(boundary, block_size=None, **options):
        own = make_memory(model, **options)._objective.memory
        return row_bytes(Backbone(model, boundary, block_size), own)

    assert of(8) > of(15)
    assert of(8, inner_checkpoint="layer") < of(8)
    assert of(8, inner_steps=4) > of(8)
    assert of(8, block_size=4) == 2 * of(8)
    assert of(8) == 2 * row_bytes(
        Backbone(make_model(layers=8, dtype=torch.float32), 8), memory._objective.memory
    )


def test_a_budget_that_cannot_be_kept_is_refused():
    model = make_model().eval()
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="budget_gib must be a number above 0, or None, got"):
            make_memory(model, budget_gib=wrong)
    memory = make_memory(model, budget_gib=budget(model, 0))
    with pytest.raises(ValueError, match=r"budget_gib must be at least .* for 1 token"):
        memory.adapt(PROMPTS).__enter__()
    graph = make_memory(model, budget_gib=budget(model, 8), inner_graph=True)
    with graph.adapt(PROMPTS) as trace:  # without the graph: there is no CUDA
        assert max(trace.chunks) > 1
    objective = graph._objective
    objective.memory = dataclasses.replace(objective.memory, inner_graph=True)
    with pytest.raises(ValueError, match="must leave every prompt whole with inner_graph"):
        graph.adapt(PROMPTS).__enter__()
    batch = graph._collator([{"input_ids": [1], "labels": [1], "example": 0, "epoch": 0}])
    with pytest.raises(ValueError, match="reset must be True with inner_graph, got False"):
        objective.write_memory(batch, reset=False)
