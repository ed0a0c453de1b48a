"""The inner losses that learn from the next state, against the naive twin in float64."""

import pytest
import torch

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.objective import MemDLMObjective
from tests import oracle
from tests.tiny import gradients, make_batch, make_features, make_model, run
from tests.trainer import family_case
from tests.trainer.memory_case import PROMPTS, fast_weights, make_memory
from tests.trainer.twin_case import (
    DIFFUSION_OPTIONS,
    GRID,
    MEMORY,
    MEMORY_OPTIONS,
    MODEL_OPTIONS,
    as_id,
    assert_same_step,
    every_combination,
    every_pair,
)

DIFFUSION = DiffusionConfig()
NAMES = ["kl", "reverse_kl", "hidden_mse", "hidden_cosine"]
LOSSES = [{"inner_loss": name} for name in NAMES]
LOSSES += [{"inner_loss": "kl", "inner_temperature": 2.5}]
LOSSES += [{"inner_loss": "reverse_kl", "inner_temperature": 0.7}]

PAIRS = MEMORY_OPTIONS | {
    "loss": LOSSES,
    "inner_steps": [1, 2, 3],
    # At 1.0 some states are their own teachers, and a loss of 0 leaves nothing to compare.
    "pre_anchor_scale": [1.5, 3.0],
    "inner_max_norm": [0.01, MEMORY["inner_max_norm"]],
    "meta_gradient": ["first_order", "exact", "exact_suffix"],
}


def memory_of(case, names):
    own = {name: case[name] for name in names if name != "loss"}
    return MemoryConfig(**MEMORY | own | case["loss"])


@pytest.mark.parametrize(
    "case",
    every_combination({"loss": LOSSES[:4], "strategy": GRID["strategy"], "inner_steps": [1, 2, 3]}),
    ids=as_id,
)
def test_every_loss_strategy_and_depth_is_the_naive_step(case):
    assert_same_step(memory_of(case, case), DIFFUSION)


@pytest.mark.parametrize("case", every_pair(PAIRS | DIFFUSION_OPTIONS | MODEL_OPTIONS), ids=as_id)
def test_every_pair_of_options_is_the_naive_step(case):
    diffusion = DiffusionConfig(**{name: case[name] for name in DIFFUSION_OPTIONS})
    options = {name: case[name] for name in MODEL_OPTIONS}
    assert_same_step(memory_of(case, PAIRS), diffusion, **options)


@pytest.mark.parametrize("options", [{"scope": "sample"}, {"meta_gradient": "exact"}], ids=str)
@pytest.mark.parametrize("inner_loss", NAMES)
@pytest.mark.parametrize("family", ["llada", "llada_moe", "llada2", "dream", "olmoe"])
def test_every_backbone_is_the_naive_step(family, inner_loss, options):
    own = {"layer_fraction": 0.5, "inner_loss": inner_loss} | options
    family_case.assert_same_step(family, MemoryConfig(**family_case.MEMORY | own))


@pytest.mark.parametrize("meta_gradient", ["first_order", "exact"])
@pytest.mark.parametrize("inner_loss", NAMES)
def test_block_diffusion_is_the_naive_step(inner_loss, meta_gradient):
    own = {"inner_loss": inner_loss, "meta_gradient": meta_gradient}
    memory = MemoryConfig(**family_case.MEMORY | own)
    diffusion, shapes = DiffusionConfig(block_size=4), ((12, 4), (9, 0))
    family_case.assert_same_step("llada2", memory, diffusion=diffusion, shapes=shapes)


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("inner_loss", ["kl", "reverse_kl", "hidden_mse"])
def test_a_state_learns_nothing_from_itself(inner_loss, scope):
    """The state behind the noisiest is the anchor; with a scale of 1 they are the same."""
    own = {"strategy": "pre_anchor_only", "pre_anchor_scale": 1.0, "inner_steps": 1}
    memory = MemoryConfig(**MEMORY | own, inner_loss=inner_loss, scope=scope)
    objective = MemDLMObjective(make_model(), DIFFUSION, memory)
    batch = make_batch(DIFFUSION, memory)
    objective.fast_weights.reset(batch["memory_seed"])
    # B is not zero: a gradient of A would not be either.
    generator = torch.Generator().manual_seed(0)
    before = torch.empty_like(objective.fast_weights.param).normal_(std=0.1, generator=generator)
    objective.fast_weights.fill(before)
    trace = objective.write_memory(batch, reset=False)
    assert not trace.loss.any()
    assert not trace.norm.any()
    assert not trace.skipped.any()
    assert torch.equal(objective.fast_weights.param, before)


def test_the_losses_differ():
    found = []
    for options in [{}, *LOSSES]:
        _, output = run(make_model(), DIFFUSION, MemoryConfig(**MEMORY | options), make_features())
        assert output.inner.loss.isfinite().all()
        assert (output.inner.loss >= 0).all()
        found.append(output.inner.loss.sum().item())
    assert len(set(found)) == len(found)


def test_the_teacher_has_no_gradient_and_reads_the_same_fast_weights():
    """A step's gradient is that of the student alone, and its teacher moves with the memory."""
    memory = MemoryConfig(**MEMORY, inner_loss="hidden_mse", strategy="anchor_only")
    model = make_model()
    seen = []

    def note(module, inputs, output):
        seen.append((output.requires_grad, output.detach().clone()))

    handle = model.model.norm.register_forward_hook(note)
    batch = make_batch(DIFFUSION, memory)
    MemDLMObjective(model, DIFFUSION, memory).write_memory(batch)
    handle.remove()
    teachers = [rows for differentiable, rows in seen if not differentiable]
    students = [rows for differentiable, rows in seen if differentiable]
    assert len(teachers) == len(students) == 2
    assert not torch.equal(*teachers)
    assert all(rows.shape == teachers[0].shape for rows in students)


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("options", LOSSES, ids=lambda own: "-".join(map(str, own.values())))
def test_bfloat16(options, scope):
    memory = MemoryConfig(**MEMORY | options, scope=scope)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        model = make_model().to(dtype)
        objective, output = run(model, DIFFUSION, memory, make_features())
        assert not output.inner.skipped.any()
        assert objective.fast_weights.param.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())
        found.append(output.inner.loss.double())
    assert output.inner.loss.dtype == torch.float32
    # A smoke test: rounding 0.4 % everywhere, on weights far from those of a trained model.
    torch.testing.assert_close(found[1], found[0], rtol=0.3, atol=0.02)


@pytest.mark.parametrize("inner_loss", NAMES)
def test_a_prompt_is_written_with_the_loss(inner_loss):
    written = []
    for own in ("cross_entropy", inner_loss):
        memory = make_memory(make_model(), inner_loss=own)
        with memory.adapt(PROMPTS):
            written.append(fast_weights(memory))
    assert written[1].isfinite().all()
    assert not torch.equal(*written)


def test_the_twins_losses_are_distances():
    generator = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, 1, 3, 8, dtype=torch.float64, generator=generator)
    logits, wanted = torch.randn(2, 1, 3, 5, dtype=torch.float64, generator=generator)
    for name in NAMES:
        memory = MemoryConfig(inner_loss=name)
        same = oracle.distillation(memory, (hidden, logits), (hidden, logits))
        torch.testing.assert_close(same, torch.zeros(1, 3, dtype=torch.float64))
        assert (oracle.distillation(memory, (hidden, logits), (other, wanted)) > 0).all()
