"""The restructured step against the naive twin: float64, 1e-9 of the largest element."""

import pytest
import torch

from memdlm import backbone
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.objective import MDLMObjective, MemDLMObjective
from tests import oracle
from tests.tiny import MASK, gradients, make_batch, make_features, make_model, naive_step
from tests.trainer.twin_case import (
    DIFFUSION_OPTIONS,
    GRID,
    MEMORY,
    MEMORY_OPTIONS,
    MODEL_OPTIONS,
    as_id,
    assert_equal,
    assert_same_step,
    build,
    every_combination,
    every_pair,
)


@pytest.mark.parametrize("case", every_combination(GRID), ids=as_id)
def test_every_strategy_depth_scope_and_adapter_is_the_naive_step(case):
    assert_same_step(MemoryConfig(**MEMORY | case), DiffusionConfig())


@pytest.mark.parametrize(
    "case", every_pair(MEMORY_OPTIONS | DIFFUSION_OPTIONS | MODEL_OPTIONS), ids=as_id
)
def test_every_pair_of_options_is_the_naive_step(case):
    memory = MemoryConfig(**MEMORY | {name: case[name] for name in MEMORY_OPTIONS})
    diffusion = DiffusionConfig(**{name: case[name] for name in DIFFUSION_OPTIONS})
    assert_same_step(memory, diffusion, **{name: case[name] for name in MODEL_OPTIONS})


@pytest.mark.parametrize(
    "case", every_pair(DIFFUSION_OPTIONS | MODEL_OPTIONS | {"normalizer": [None, 7.0]}), ids=as_id
)
def test_plain_mdlm_is_the_naive_step(case):
    diffusion = DiffusionConfig(**{name: case[name] for name in DIFFUSION_OPTIONS})
    options = {name: case[name] for name in MODEL_OPTIONS if name != "shapes"}
    features = make_features(case["shapes"])
    batch = make_batch(diffusion, features=features)
    twin, model = build(**options | {"gradient_checkpointing": False}), build(**options)

    truth = naive_step(twin, batch, features, diffusion, normalizer=case["normalizer"])
    loss = MDLMObjective(model, diffusion)(batch, case["normalizer"]).loss
    loss.backward()

    assert_equal("loss", loss.detach(), truth.outer_loss)
    for name, expected in gradients(twin).items():
        assert_equal(name, gradients(model)[name], expected)


def test_the_cases_reach_both_sides_of_the_clip():
    memory, diffusion = MemoryConfig(**MEMORY), DiffusionConfig()
    norm = MemDLMObjective(make_model(), diffusion, memory)(
        make_batch(diffusion, memory)
    ).inner.norm
    assert (norm > memory.inner_max_norm).any()
    assert ((norm > 0) & (norm < memory.inner_max_norm)).any()


def test_the_cases_have_padding_and_a_row_without_masked_and_one_without_maskable_tokens():
    batch = make_batch(DiffusionConfig(), MemoryConfig())
    masked = (batch["anchor"]["input_ids"] == MASK).sum(1)
    assert not batch["attention_mask"].all()
    assert ((masked == 0) & (batch["maskable_count"] > 0)).any()
    assert (batch["maskable_count"] == 0).any()
    assert (masked > 1).any()


def test_the_naive_twin_sees_the_tokens_to_the_right_and_no_padding():
    model = make_model().eval()
    ids = torch.randint(0, MASK, (1, 8))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % MASK
    seen = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    first = [
        oracle.token_nll(model, tokens, mask, [[0]], MASK)[0, 0].item()
        for mask in (None, seen)
        for tokens in (ids, changed)
    ]
    assert first[0] != first[1]
    assert first[2] == first[3]


@pytest.mark.parametrize("inner_checkpoint", ["none", "layer"])
@pytest.mark.parametrize("outer", [False, True])
def test_layers_are_recomputed_where_that_was_asked_for(monkeypatch, inner_checkpoint, outer):
    calls = []
    real = backbone.checkpoint
    monkeypatch.setattr(
        backbone, "checkpoint", lambda *args, **kw: calls.append(args) or real(*args, **kw)
    )
    memory = MemoryConfig(**MEMORY, inner_checkpoint=inner_checkpoint)
    model = build(gradient_checkpointing=outer)
    MemDLMObjective(model, DiffusionConfig(), memory)(make_batch(DiffusionConfig(), memory))
    assert bool(calls) == (outer or inner_checkpoint == "layer")
