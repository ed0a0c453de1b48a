"""The gradient through the inner loop: against an unrolled twin and against finite differences."""

import contextlib
import dataclasses
import math
from functools import partial

import pytest
import torch

from bench.timing import peak_mib
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.objective import MDLMObjective, MemDLMObjective
from tests.families import FAMILIES, make_family_model
from tests.tiny import (
    gradients,
    initial_fast_weights,
    make_batch,
    make_features,
    make_model,
    naive_step,
    run,
)
from tests.trainer import family_case
from tests.trainer.twin_case import (
    DIFFUSION_OPTIONS,
    MEMORY,
    MEMORY_OPTIONS,
    MODEL_OPTIONS,
    as_id,
    assert_same_step,
    every_pair,
)

TOLERANCE = 1e-10
DIFFUSION = DiffusionConfig()
EXACT = MEMORY | {"meta_gradient": "exact"}
# A clip that every first gradient meets, that some meet, and that none meets.
CLIPS = [0.01, MEMORY["inner_max_norm"], 1e3]

PAIRS = MEMORY_OPTIONS | {
    "inner_steps": [1, 2, 3],
    "inner_max_norm": CLIPS,
    "meta_gradient": ["exact", "exact_suffix"],
}


@pytest.mark.parametrize("case", every_pair(PAIRS | DIFFUSION_OPTIONS | MODEL_OPTIONS), ids=as_id)
def test_every_pair_of_options_is_the_unrolled_twin(case):
    memory = MemoryConfig(**MEMORY | {name: case[name] for name in PAIRS})
    diffusion = DiffusionConfig(**{name: case[name] for name in DIFFUSION_OPTIONS})
    options = {name: case[name] for name in MODEL_OPTIONS}
    assert_same_step(memory, diffusion, tolerance=TOLERANCE, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"inner_steps": 3, "layer_fraction": 0.5},
        {"scope": "sample", "layer_fraction": 0.5, "inner_clip": "global"},
        {"target": "ffn+attention", "layer_fraction": 1.0, "strategy": "progressive"},
        {"adapter": "full", "layer_fraction": 0.5, "meta_gradient": "exact_suffix"},
        {"outer": "lora", "inner_epochs": 2, "strategy": "anchor_only", "inner_steps": 1},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_backbone_is_the_unrolled_twin(family, options):
    outer = options.get("outer", "full")
    own = {name: value for name, value in options.items() if name != "outer"}
    memory = MemoryConfig(**family_case.MEMORY | {"meta_gradient": "exact"} | own)
    family_case.assert_same_step(family, memory, outer, tolerance=TOLERANCE)


@pytest.mark.parametrize("meta_gradient", ["first_order", "exact", "exact_suffix"])
@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("target", ["ffn", "ffn+attention"])
def test_block_diffusion_is_the_unrolled_twin(meta_gradient, scope, target):
    own = {"meta_gradient": meta_gradient, "scope": scope, "target": target}
    diffusion = DiffusionConfig(block_size=4)
    shapes = ((12, 4), (9, 0))
    tolerance = {"tolerance": TOLERANCE}
    assert_same_step(MemoryConfig(**MEMORY | own), diffusion, shapes, **tolerance)
    memory = MemoryConfig(**family_case.MEMORY | own)
    family_case.assert_same_step("llada2", memory, diffusion=diffusion, shapes=shapes, **tolerance)


@pytest.mark.parametrize(
    ("clip", "above", "below"),
    [(CLIPS[0], True, False), (CLIPS[1], True, True), (CLIPS[2], False, True)],
)
def test_the_cases_reach_both_sides_of_the_clip(clip, above, below):
    memory = MemoryConfig(**EXACT | {"inner_max_norm": clip})
    _, output = run(make_model(), DIFFUSION, memory, make_features())
    norm = output.inner.norm[0]  # of B alone: B is 0, and A has no gradient yet
    norm = norm[norm > 0]
    assert bool((norm > clip).any()) == above
    assert bool((norm < clip).any()) == below


def derivative(value, step=1e-5):
    """Of a function of one number at 0: the central difference."""
    return (value(step) - value(-step)) / (2 * step)


@contextlib.contextmanager
def moved(parameters, directions, amount):
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.add_(direction, alpha=amount)
        yield
        for parameter, old in zip(parameters, before, strict=True):
            parameter.copy_(old)


def bilevel(objective, batch, parameters, directions):
    """The bi-level loss as a function of how far the parameters are moved along the directions."""
    clipped = []

    def value(amount):
        with moved(parameters, directions, amount):
            output = objective(batch)
        clipped.append(output.inner.norm > objective.memory.inner_max_norm)
        # On the two sides of a clip the derivative is another.
        assert torch.equal(clipped[-1], clipped[0])
        return output.loss.item()

    return value


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("inner_steps", [1, 2, 3])
@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_the_exact_gradient_is_the_finite_difference(family, inner_steps, clip):
    own = {"inner_steps": inner_steps, "inner_max_norm": clip, "layer_fraction": 0.5}
    memory = MemoryConfig(**EXACT | own)
    model = make_family_model(family)
    objective, _ = run(model, DIFFUSION, memory, make_features())
    batch = make_batch(DIFFUSION, memory)
    named = gradients(model)
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)

    for _ in range(2):
        directions = [
            torch.randn(g.shape, dtype=g.dtype, generator=generator) for g in named.values()
        ]
        length = torch.stack([d.norm() for d in directions]).norm()
        directions = [d / length for d in directions]
        pairs = zip(named.values(), directions, strict=True)
        expected = sum((g * d).sum() for g, d in pairs).item()
        value = bilevel(objective, batch, [parameters[name] for name in named], directions)
        assert derivative(value) == pytest.approx(expected, rel=1e-6)

    # The entries with the largest gradients, of parameters in every part of the model.
    parts = ("embed", "0.self_attn.v", "2.post_attention", "2.mlp.", "3.mlp.", "l.norm", "lm_head")
    for part in parts:
        name = next(name for name in named if part in name)
        largest = named[name].abs().argmax()
        direction = torch.zeros_like(named[name])
        direction.view(-1)[largest] = 1
        expected = named[name].view(-1)[largest].item()
        value = bilevel(objective, batch, [parameters[name]], [direction])
        assert derivative(value) == pytest.approx(expected, rel=1e-6), name


def outer_gradient(memory, model=None):
    """One vector of all parameters."""
    model = model or make_model()
    run(model, DIFFUSION, memory, make_features())
    return torch.cat([gradient.flatten() for gradient in gradients(model).values()])


def relative_difference(memory, other):
    truth = outer_gradient(memory)
    return ((outer_gradient(other) - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("meta_gradient", ["exact", "exact_suffix"])
def test_the_exact_gradient_is_not_the_first_order_one(meta_gradient):
    exact = MemoryConfig(**EXACT | {"meta_gradient": meta_gradient})
    first = dataclasses.replace(exact, meta_gradient="first_order")
    assert relative_difference(exact, first) > 1e-2


def test_what_first_order_leaves_out_falls_with_the_inner_learning_rate():
    differences = []
    for inner_lr in (1e-3, 1e-4):
        exact = MemoryConfig(**EXACT | {"inner_lr": inner_lr})
        first = dataclasses.replace(exact, meta_gradient="first_order")
        differences.append(relative_difference(exact, first))
    assert differences[0] < 1e-2
    assert differences[0] / differences[1] == pytest.approx(10, rel=0.05)


def test_noisier_states_are_all_that_the_suffix_gradient_leaves_out():
    """Behind the boundary it is the exact one; below as well where every state is the anchor."""
    model = make_model()
    pairs = {}
    for strategy in ("anchor_consistent", "anchor_only"):
        for meta_gradient in ("exact", "exact_suffix"):
            model.zero_grad()
            own = {"strategy": strategy, "meta_gradient": meta_gradient, "inner_steps": 3}
            objective, _ = run(model, DIFFUSION, MemoryConfig(**EXACT | own), make_features())
            found = {name: gradient.clone() for name, gradient in gradients(model).items()}
            pairs.setdefault(strategy, []).append(found)
    boundary = objective.backbone.boundary  # the FFN of the last layer
    assert boundary == 7
    behind = ("model.layers.3.mlp.", "model.norm.", "lm_head.")
    for strategy, (exact, suffix) in pairs.items():
        for name, gradient in exact.items():
            error = (suffix[name] - gradient).abs().max() / gradient.abs().max()
            if strategy == "anchor_only" or name.startswith(behind):
                assert error <= TOLERANCE, name
            else:
                assert error > 1e-4, name


@pytest.mark.parametrize("meta_gradient", ["exact", "exact_suffix"])
def test_narrow_dtypes_stay_within_their_rounding(meta_gradient):
    """No further from float64 than the first-order gradient is, by the measure of each dtype."""
    errors = {}
    for choice in ("first_order", meta_gradient):
        memory = MemoryConfig(**EXACT | {"meta_gradient": choice})
        truth = outer_gradient(memory)
        for dtype in (torch.float32, torch.bfloat16):
            own = outer_gradient(memory, make_model().to(dtype)).double()
            assert own.isfinite().all()
            errors[choice, dtype] = ((own - truth).norm() / truth.norm()).item()
    for dtype in (torch.float32, torch.bfloat16):
        bar = 2 * errors["first_order", dtype] + torch.finfo(dtype).eps
        assert errors[meta_gradient, dtype] <= bar, errors


def poisoned(batch, steps, value=math.inf):
    """A batch whose first sequence has an inner loss that is not finite, at some steps."""
    trajectory = []
    for step, state in enumerate(batch["trajectory"]):
        weight = state["weight"].clone()
        if step in steps:
            assert (state["sample"] == 0).any()
            weight[state["sample"] == 0] = value
        trajectory.append({**state, "weight": weight})
    return {**batch, "trajectory": trajectory}


@pytest.mark.parametrize("meta_gradient", ["exact", "exact_suffix"])
@pytest.mark.parametrize(
    ("steps", "value", "inner_loss"),
    [
        ((0,), math.inf, "cross_entropy"),
        ((1,), math.inf, "cross_entropy"),
        ((0, 1), math.nan, "cross_entropy"),
        # The last step's teacher is not a state: it is the same without the first.
        ((0,), math.nan, "kl"),
        ((0,), math.inf, "hidden_mse"),
        ((0,), math.inf, "hidden_cosine"),
        ((0, 1), math.inf, "hidden_cosine"),
    ],
)
@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_a_skipped_step_contributes_nothing(family, steps, value, inner_loss, meta_gradient):
    own = {"scope": "sample", "layer_fraction": 0.5, "inner_loss": inner_loss}
    memory = MemoryConfig(**EXACT | own | {"meta_gradient": meta_gradient})
    shapes = ((12, 4), (11, 0), (8, 2))
    features = make_features(shapes)
    normalizer = 10.0

    def step(model, features, change, memory_enabled=True):
        objective = MemDLMObjective(model, DIFFUSION, memory)
        batch = change(make_batch(DIFFUSION, memory, features))
        output = objective(batch, normalizer, memory_enabled=memory_enabled)
        output.loss.backward()
        return output

    model, twin = make_family_model(family), make_family_model(family)
    output = step(model, features, lambda batch: poisoned(batch, steps, value))
    skipped = torch.zeros(2, len(shapes), dtype=torch.bool)
    skipped[list(steps), 0] = True
    assert torch.equal(output.inner.skipped, skipped)

    step(twin, features[1:], lambda batch: batch)
    # The other sequences as though it were not there, and it as though the step were not; without
    # any step the memory is blank.
    left = [k for k in (0, 1) if k not in steps]
    without = [{**memory_state(features[:1], memory, k)} for k in left]
    step(twin, features[:1], lambda batch: {**batch, "trajectory": without}, bool(left))
    truth = gradients(twin)
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all(), name
        error = (gradient - truth[name]).abs().max().item()
        assert error <= 1e-10 * truth[name].abs().max().item(), name


def memory_state(features, memory, step):
    return make_batch(DIFFUSION, memory, features)["trajectory"][step]


@pytest.mark.parametrize("steps", [(0,), (1,), (0, 1)])
def test_a_step_that_the_whole_batch_skips_contributes_nothing(steps):
    memory = MemoryConfig(**EXACT)
    model, twin = make_model(), make_model()
    batch = make_batch(DIFFUSION, memory)
    output = MemDLMObjective(model, DIFFUSION, memory)(poisoned(batch, steps))
    output.loss.backward()
    assert output.inner.skipped.flatten().tolist() == [k in steps for k in (0, 1)]
    left = [state for k, state in enumerate(batch["trajectory"]) if k not in steps]
    objective = MemDLMObjective(twin, DIFFUSION, memory)
    objective({**batch, "trajectory": left}, memory_enabled=bool(left)).loss.backward()
    for name, truth in gradients(twin).items():
        error = (gradients(model)[name] - truth).abs().max().item()
        assert error <= 1e-10 * truth.abs().max().item(), name


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("meta_gradient", ["exact", "exact_suffix"])
@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_forward_is_that_of_first_order_bit_for_bit(family, meta_gradient, enabled):
    outputs = []
    for choice in ("first_order", meta_gradient):
        memory = MemoryConfig(**MEMORY, meta_gradient=choice, layer_fraction=0.5)
        objective = MemDLMObjective(make_family_model(family), DIFFUSION, memory)
        with torch.set_grad_enabled(enabled):
            output = objective(make_batch(DIFFUSION, memory))
        assert output.loss.requires_grad == enabled
        outputs.append(output)
    first, exact = outputs
    assert torch.equal(first.loss, exact.loss)
    for name in ("loss", "norm", "skipped"):
        assert torch.equal(getattr(first.inner, name), getattr(exact.inner, name))


def test_memory_off_is_plain_mdlm_bit_for_bit():
    memory = MemoryConfig(**EXACT)
    batch = make_batch(DIFFUSION, memory)
    model, twin = make_model(), make_model()
    MemDLMObjective(model, DIFFUSION, memory)(batch, memory_enabled=False).loss.backward()
    MDLMObjective(twin, DIFFUSION)(batch).loss.backward()
    for one, other in zip(gradients(model).values(), gradients(twin).values(), strict=True):
        assert torch.equal(one, other)


def test_backward_can_run_twice_where_it_is_asked_to():
    memory = MemoryConfig(**EXACT)
    model = make_model()
    loss = MemDLMObjective(model, DIFFUSION, memory)(make_batch(DIFFUSION, memory)).loss
    loss.backward(retain_graph=True)
    once = {name: gradient.clone() for name, gradient in gradients(model).items()}
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[name], rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_accumulated_gradients_are_the_sum():
    memory = MemoryConfig(**EXACT)
    model = make_model()
    objective = MemDLMObjective(model, DIFFUSION, memory)
    batches = [make_batch(DIFFUSION, memory, make_features(epoch=epoch)) for epoch in (0, 1)]
    own = []
    for batch in batches:
        model.zero_grad()
        objective(batch).loss.backward()
        own.append({name: gradient.clone() for name, gradient in gradients(model).items()})
    model.zero_grad()
    for batch in batches:
        objective(batch).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, own[0][name] + own[1][name], rtol=1e-12, atol=1e-15)
    # The fast weights of a forward pass are its own, also after another's.
    model.zero_grad()
    losses = [objective(batch).loss for batch in batches]
    torch.stack(losses).sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, own[0][name] + own[1][name], rtol=1e-12, atol=1e-15)


def test_peak_memory_does_not_grow_with_the_steps():
    """A step of the unrolled twin is what its peak grows by with each."""
    cpu, features = torch.device("cpu"), make_features(((64, 8),) * 2)
    choices = ("first_order", "exact", "exact_suffix")
    growth = {}
    for inner_steps in (2, 8):
        memory = MemoryConfig(**EXACT | {"inner_steps": inner_steps})
        batch, twin = make_batch(DIFFUSION, memory, features), make_model()
        start = initial_fast_weights(MemDLMObjective(twin, DIFFUSION, memory), twin, batch)
        whole = partial(naive_step, twin, batch, features, DIFFUSION, memory, start)
        growth.setdefault("unrolled", []).append(peak_mib(whole, cpu))
        for choice in choices:
            own = dataclasses.replace(memory, meta_gradient=choice)
            objective = MemDLMObjective(make_model(), DIFFUSION, own)
            take = partial(take_step, objective, batch)
            take()  # the gradients are allocated
            growth.setdefault(choice, []).append(peak_mib(take, cpu))
    growth = {name: (many - few) / 6 for name, (few, many) in growth.items()}
    # The fast weights before each step are kept.
    snapshot = objective.fast_weights.param.nbytes / 2**20
    assert growth["exact"] <= snapshot + 0.1 * growth["unrolled"], growth
    # The states' constant activations at the boundary are made at once, as those of first order.
    allowed = growth["first_order"] + snapshot + 0.1 * growth["unrolled"]
    assert growth["exact_suffix"] <= allowed, growth


def take_step(objective, batch):
    objective(batch).loss.backward()


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_an_attention_without_a_second_derivative_is_refused(attention):
    model = make_model()
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match=f"meta_gradient must be 'first_order' .*{attention}"):
        MemDLMObjective(model, DIFFUSION, MemoryConfig(**EXACT))


def test_dropout_in_the_attention_is_refused():
    model = make_model(attention_dropout=0.1)
    with pytest.raises(
        ValueError, match=r"meta_gradient must be .* attention_dropout above 0, got"
    ):
        MemDLMObjective(model, DIFFUSION, MemoryConfig(**EXACT))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("prefix_reuse", ["none", "prompt_kv"])
def test_going_on_from_a_memory_is_first_order(prefix_reuse):
    """Prompts are written without a gradient of the model."""
    own = {"meta_gradient": "exact_suffix", "prefix_reuse": prefix_reuse}
    memory = MemoryConfig(**MEMORY | own)
    batch = make_batch(DIFFUSION, memory)
    written = []
    for choice in ("first_order", "exact_suffix"):
        own = dataclasses.replace(memory, meta_gradient=choice)
        objective = MemDLMObjective(make_model(), DIFFUSION, own)
        objective.write_memory(batch)
        objective.write_memory(batch, reset=False)
        written.append(objective.fast_weights.param.clone())
    assert torch.equal(*written)
