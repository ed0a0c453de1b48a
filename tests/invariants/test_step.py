"""What holds of every training step, whatever the options."""

import copy

import pytest
import torch

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.objective import MDLMObjective, MemDLMObjective
from tests.families import make_family_model
from tests.tiny import gradients, make_batch, make_features, make_model, run

DIFFUSION = DiffusionConfig()
TINY = {"rank": 4, "lora_alpha": 8.0, "layer_fraction": 0.5}
EIGHT = ((12, 4), (9, 0), (7, 7), (5, 4), (11, 0), (6, 2), (12, 0), (8, 3))
scopes = pytest.mark.parametrize("scope", ["batch", "sample"])
norms = pytest.mark.parametrize("norm", ["token", "sequence", "batch"])


def assert_close(actual, expected):
    """Equal up to the order of summation in float64."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * scale)


def assert_same_gradients(actual, expected, compare):
    actual, expected = gradients(actual), gradients(expected)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None, f"{name} has no gradient"
        compare(actual[name], gradient)


def identical(actual, expected):
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("recompute", [False, True])
def test_with_memory_off_the_step_is_plain_mdlm_bit_for_bit(dtype, dropout, recompute):
    memory = MemoryConfig(**TINY)
    steps = []
    for objective_type, arguments, call in (
        (MDLMObjective, (), {}),
        (MemDLMObjective, (memory,), {"memory_enabled": False}),
    ):
        model = make_model(dtype=dtype, attention_dropout=dropout)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        objective = objective_type(model, DIFFUSION, *arguments)
        if arguments:  # a memory that was written before must not show
            objective.write_memory(make_batch(DIFFUSION, memory))
        torch.manual_seed(0)
        output = objective(make_batch(DIFFUSION, memory), **call)
        output.loss.backward()
        assert output.inner is None
        steps.append((output.loss, model))
    (plain_loss, plain), (loss, model) = steps
    identical(loss, plain_loss)
    assert_same_gradients(model, plain, identical)


@norms
def test_in_sample_scope_eight_micro_batches_of_one_are_one_batch_of_eight(norm):
    diffusion, memory = DiffusionConfig(loss_norm=norm), MemoryConfig(**TINY, scope="sample")
    features = make_features(EIGHT)
    together, apart = make_model(), make_model()
    _, output = run(together, diffusion, memory, features)

    whole = sum(len([x for x in f["labels"] if x != -100]) for f in features)
    normalizer = whole if norm == "token" else len(features)
    objective = MemDLMObjective(apart, diffusion, memory)
    total = 0.0
    for feature in features:
        part = objective(make_batch(diffusion, memory, [feature]), normalizer).loss
        part.backward()
        total += part.detach()
    assert_close(total, output.loss.detach())
    assert_same_gradients(apart, together, assert_close)


def test_in_sample_scope_a_batch_of_four_is_four_runs_at_batch_one():
    memory = MemoryConfig(**TINY, scope="sample", inner_steps=3)
    features = make_features(EIGHT[:4])
    objective, output = run(make_model(), DIFFUSION, memory, features)
    for row, feature in enumerate(features):
        alone, alone_output = run(make_model(), DIFFUSION, memory, [feature])
        assert_close(output.inner.loss[:, row], alone_output.inner.loss[:, 0])
        assert_close(output.inner.norm[:, row], alone_output.inner.norm[:, 0])
        assert_close(objective.fast_weights.param[row], alone.fast_weights.param[0])


def test_in_sample_scope_the_place_in_the_batch_does_not_matter():
    memory = MemoryConfig(**TINY, scope="sample")
    features = make_features(EIGHT)
    forward, output = run(make_model(), DIFFUSION, memory, features)
    backward, reversed_output = run(make_model(), DIFFUSION, memory, features[::-1])
    assert_close(output.loss.detach(), reversed_output.loss.detach())
    assert_close(forward.fast_weights.param, backward.fast_weights.param.flip(0))


@scopes
def test_the_normaliser_divides_the_outer_loss_and_nothing_else(scope):
    memory = MemoryConfig(**TINY, scope=scope)
    objective = MemDLMObjective(make_model(), DIFFUSION, memory)
    batch = make_batch(DIFFUSION, memory)
    own, tenth = objective(batch), objective(batch, 10 * int(batch["maskable_count"].sum()))
    assert_close(10 * tenth.loss.detach(), own.loss.detach())
    identical(tenth.inner.loss, own.inner.loss)


@scopes
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("shapes", [((7, 7), (9, 9)), ((5, 4),)], ids=["no response", "unmasked"])
def test_a_batch_without_a_masked_token_gives_loss_zero_and_gradients_zero(scope, adapter, shapes):
    memory = MemoryConfig(**TINY, scope=scope, adapter=adapter)
    features = make_features(((12, 0), (9, 0), (7, 0), *shapes))[3:]
    model = make_model()
    objective, output = run(model, DIFFUSION, memory, features)
    assert output.loss.item() == 0
    assert (output.inner.loss == 0).all()
    assert (output.inner.norm == 0).all()
    assert not output.inner.skipped.any()
    assert objective.fast_weights.param.isfinite().all()
    for name, gradient in gradients(model).items():
        assert gradient is not None, name
        assert (gradient == 0).all(), name


def test_plain_mdlm_without_a_masked_token_gives_loss_zero_and_gradients_zero():
    model = make_model()
    loss = MDLMObjective(model, DIFFUSION)(
        make_batch(DIFFUSION, None, make_features(((7, 7),)))
    ).loss
    loss.backward()
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(model).values())


def test_a_nan_inner_loss_skips_its_own_set_and_step_and_nothing_else():
    memory = MemoryConfig(**TINY, scope="sample", inner_steps=3)
    features = make_features(EIGHT)
    sound = make_batch(DIFFUSION, memory, features)
    broken = copy.deepcopy(sound)
    first = broken["trajectory"][0]
    first["weight"][first["sample"] == 1] = float("nan")

    clean, clean_output = run_batch(sound, memory)
    objective, output = run_batch(broken, memory)
    expected = torch.zeros(3, len(features), dtype=torch.bool)
    expected[0, 1] = True
    identical(output.inner.skipped, expected)
    others = [row for row in range(len(features)) if row != 1]
    assert_close(objective.fast_weights.param[others], clean.fast_weights.param[others])
    assert_close(output.inner.loss[:, others], clean_output.inner.loss[:, others])

    # The trajectory of the broken set goes on from where it stood.
    rest = copy.deepcopy(sound)
    del rest["trajectory"][0]
    later, later_output = run_batch(rest, memory)
    assert_close(objective.fast_weights.param[1], later.fast_weights.param[1])
    assert_close(output.inner.loss[1:, 1], later_output.inner.loss[:, 1])
    assert output.loss.isfinite()


def run_batch(batch, memory):
    objective = MemDLMObjective(make_model(), DIFFUSION, memory)
    return objective, objective(batch)


@scopes
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_fast_weights_are_no_parameter_no_buffer_and_in_no_state_dict(scope, adapter):
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memory = MemoryConfig(**TINY, scope=scope, adapter=adapter)
    objective, _ = run(model, DIFFUSION, memory, make_features())
    fast = objective.fast_weights.param.untyped_storage().data_ptr()
    held = [*objective.parameters(), *objective.buffers(), *objective.state_dict().values()]
    assert fast not in {tensor.untyped_storage().data_ptr() for tensor in held}
    assert {id(p) for p in objective.parameters()} == {id(p) for p in model.parameters()}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_the_inner_loop_shifts_no_dropout_draw_of_the_outer_pass(inner_steps):
    # The adapted layers are the last: a vanishing learning rate leaves their output as it was.
    memory = MemoryConfig(**TINY, inner_steps=inner_steps, inner_lr=1e-30)
    batch = make_batch(DIFFUSION, memory)
    models = make_model(attention_dropout=0.3), make_model(attention_dropout=0.3)
    objectives = MDLMObjective(models[0], DIFFUSION), MemDLMObjective(models[1], DIFFUSION, memory)
    states = []
    for objective in objectives:
        torch.manual_seed(5)
        objective(batch).loss.backward()
        states.append(torch.get_rng_state())
    assert_same_gradients(models[1], models[0], assert_close)
    identical(states[1], states[0])


@scopes
@pytest.mark.parametrize("recompute", [False, True])
def test_two_forward_passes_before_one_backward_are_an_error(scope, recompute):
    """The second batch's fast weights must not slip into the first batch's backward."""
    memory = MemoryConfig(**TINY, scope=scope)
    model = make_model()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = MemDLMObjective(model, DIFFUSION, memory)
    losses = [objective(make_batch(DIFFUSION, memory)).loss for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"modified by an inplace|written again"):
        sum(losses).backward()


@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_an_inner_step_makes_no_gradient_of_the_model(family, monkeypatch):
    """Ops with a backward of their own would make those that they see trained."""
    model = make_family_model(family)
    memory = MemoryConfig(layer_fraction=0.5, rank=4)
    objective = MemDLMObjective(model, DiffusionConfig(), memory)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    suffix, seen = objective.backbone.suffix, []

    def watched(*args, **options):
        weights = model.get_decoder().layers[-1].parameters()
        seen.append(any(weight.requires_grad for weight in weights))
        return suffix(*args, **options)

    monkeypatch.setattr(objective.backbone, "suffix", watched)
    objective(make_batch(DiffusionConfig(), memory)).loss.backward()
    assert seen == [False, False, True]
    assert all(parameter.requires_grad for parameter in trained)

    def failing(*args, **options):
        raise RuntimeError("in the middle of a step")

    monkeypatch.setattr(objective.backbone, "suffix", failing)
    with pytest.raises(RuntimeError, match="middle"):
        objective(make_batch(DiffusionConfig(), memory))
    assert all(parameter.requires_grad for parameter in trained)
