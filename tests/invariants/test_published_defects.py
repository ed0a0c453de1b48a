"""One test for each defect of the published code (design, section 2) that could come back here.

Those of the trainer (the evaluation loss, checkpoints, paired runs) are tested beside the trainer.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memdlm.backbone import find_targets
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.objective import MDLMObjective, MemDLMObjective
from tests.tiny import (
    MASK,
    gradients,
    make_batch,
    make_features,
    make_model,
    naive_step,
    run,
)

DIFFUSION = DiffusionConfig()
TINY = {"rank": 4, "lora_alpha": 8.0, "layer_fraction": 0.5}


def test_a_nan_gradient_under_a_finite_loss_leaves_the_fast_weights_as_they_were():
    """Published: `norm > clip` is false for NaN, so the NaN is added to the fast weights."""
    memory = MemoryConfig(**TINY, inner_steps=1)
    model = make_model()
    objective = MemDLMObjective(model, DIFFUSION, memory)
    batch = make_batch(DIFFUSION, memory)
    objective.fast_weights.reset(batch["memory_seed"])
    before = objective.fast_weights.param.clone()

    def poison(module, inputs, output):
        output.register_hook(lambda gradient: gradient * math.nan)

    handle = model.model.layers[-1].mlp.gate_proj.register_forward_hook(poison)
    trace = objective.write_memory(batch)
    handle.remove()
    assert trace.loss.isfinite().all()
    assert trace.norm.isfinite().any()  # those above the layer
    assert not trace.norm.isfinite().all()
    assert trace.skipped.tolist() == [[True]]
    assert torch.equal(objective.fast_weights.param, before)


def test_the_sequence_norm_is_a_mean_over_the_batch():
    """Published: the loss is multiplied by the batch size where it should be divided."""
    diffusion = DiffusionConfig(loss_norm="sequence")
    memory = MemoryConfig(**TINY, inner_lr=1e-3)
    one = make_features(((12, 4),))
    _, alone = run(make_model(), diffusion, memory, one)
    _, thrice = run(make_model(), diffusion, memory, one * 3)
    torch.testing.assert_close(thrice.loss, alone.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(thrice.inner.loss, alone.inner.loss, rtol=1e-12, atol=0)


def test_the_cosine_schedule_weighs_a_state_by_the_time_that_belongs_to_its_share():
    """Published: w(share), as though the share were the time."""
    diffusion = DiffusionConfig(schedule="cosine", loss_norm="batch")
    memory = MemoryConfig(inner_steps=3)
    batch = make_batch(diffusion, memory, make_features(((40, 0),), epoch=5))
    shares = []
    for state in batch["trajectory"]:
        share = (state["input_ids"] == MASK).sum().item() / 40
        # 1 - alpha = cos x = share, so -alpha' = pi/2 sin x.
        expected = math.pi / 2 * math.sqrt(1 - share**2) / (share + 1e-6)
        assert state["weight"].tolist() == pytest.approx(
            [expected] * len(state["weight"]), rel=1e-9
        )
        shares.append(share)
    assert 0 < shares[-1] < shares[0] < 1


def test_a_single_consistent_step_visits_the_anchor():
    """Published: with K = 1 `pmc` visits the state with 1.5 times the masks."""
    batch = make_batch(DIFFUSION, MemoryConfig(inner_steps=1))
    (state,) = batch["trajectory"]
    assert state["is_anchor"]
    assert torch.equal(state["input_ids"], batch["anchor"]["input_ids"])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_inner_and_outer_pass_see_the_tokens_to_the_right(family, attention, padded):
    """Published: models converted from autoregressive ones run the inner pass causally."""
    memory = MemoryConfig(**TINY, strategy="pre_anchor_only", pre_anchor_scale=100.0)
    features = make_features(((10, 0), (12, 0)) if padded else ((10, 0),))
    features[0]["labels"][1:] = [-100] * 9  # only the first token is ever masked
    losses = []
    for last in (3, 4):
        features[0]["input_ids"][9] = last
        model = make_model(family, attn_implementation=attention)
        objective = MemDLMObjective(model, DIFFUSION, memory)
        batch = make_batch(DIFFUSION, memory, features)
        for state in (*batch["trajectory"], batch["anchor"]):
            force_mask(state, features)
        output = objective(batch)
        losses.append((output.inner.loss[0].item(), output.loss.item()))
    (inner, outer), (changed_inner, changed_outer) = losses
    assert inner != changed_inner
    assert outer != changed_outer


def force_mask(state, features):
    """Make the first token of the first example the state's only loss row."""
    state["input_ids"][0, 0] = MASK
    state["rows"] = torch.zeros(len(features), 1, dtype=torch.int64)
    state["valid"], state["sample"] = torch.tensor([0]), torch.tensor([0])
    state["target"] = torch.tensor([features[0]["input_ids"][0]])
    state["weight"] = torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_projection_of_an_adapted_ffn_has_fast_weights(family):
    """Published: dense LLaDA names its gate otherwise, so `up_proj` alone is adapted, silently."""
    found, _ = find_targets(make_model(family), "ffn", 0.5)
    expected = [f"{i}.mlp.{kind}_proj" for i in (2, 3) for kind in ("gate", "up", "down")]
    assert list(found) == expected


@pytest.mark.parametrize("missing", ["mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj"])
def test_a_projection_with_another_name_is_an_error_not_left_out(missing):
    model = make_model()
    parent, name = missing.split(".")
    for layer in model.model.layers:
        module = getattr(layer, parent)
        module.ff_proj = getattr(module, name)
        delattr(module, name)
    with pytest.raises(ValueError, match=name):
        find_targets(model, "ffn+attention", 0.5)


def test_adaptation_at_evaluation_runs_without_dropout_and_leaves_the_mode_alone():
    """Published: the inner loop switches the model to training mode, dropout included."""
    memory = MemoryConfig(**TINY)
    batch = make_batch(DIFFUSION, memory)
    model = make_model(attention_dropout=0.5)
    objective = MemDLMObjective(model, DIFFUSION, memory)
    noisy = [objective.write_memory(batch).loss for _ in range(2)]
    objective.eval()
    quiet = [objective.write_memory(batch).loss for _ in range(2)]
    assert not any(module.training for module in model.modules())
    assert torch.equal(quiet[0], quiet[1])
    assert not torch.equal(noisy[0], quiet[0])
    without = MemDLMObjective(make_model(), DIFFUSION, memory).write_memory(batch).loss
    assert torch.equal(quiet[0], without)


def test_the_memory_of_the_last_batch_does_not_stay_in_the_model_or_its_checkpoint(tmp_path):
    """Published: the model keeps it after training, and full fine-tuning saves it."""
    memory = MemoryConfig(**TINY, inner_lr=10.0)
    model = make_model(dtype=torch.float32).eval()
    ids = torch.arange(10)[None]
    before, names = model(ids).logits, set(model.state_dict())
    run(model, DIFFUSION, memory, make_features())
    assert torch.equal(model(ids).logits, before)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == names
    assert torch.equal(loaded(ids).logits, before)


def test_the_fast_weights_gradients_stay_out_of_the_outer_clip_norm():
    """Published: they are parameters of the model, so their gradients enter its norm."""
    memory = MemoryConfig(**TINY)
    model = make_model()
    objective, _ = run(model, DIFFUSION, memory, make_features())
    own = torch.stack([g.norm() for g in gradients(model).values()]).norm()
    clipped = nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    torch.testing.assert_close(clipped, own)
    assert all(leaf.grad is None for leaf in objective.fast_weights.leaves)


def test_memory_changes_no_draw_of_the_outer_noise():
    """Published: the fast weights' draws shift the noise, so no run pairs with its baseline."""
    features = make_features()
    plain = make_batch(DIFFUSION, None, features)
    for memory in (MemoryConfig(), MemoryConfig(inner_steps=4, rank=8, scope="sample")):
        batch = make_batch(DIFFUSION, memory, features)
        assert torch.equal(batch["time"], plain["time"])
        assert torch.equal(batch["anchor"]["input_ids"], plain["anchor"]["input_ids"])


def test_a_step_leaves_the_random_generators_as_plain_mdlm_does():
    memory = MemoryConfig(**TINY)
    batch = make_batch(DIFFUSION, memory)
    states = []
    for objective in (
        MDLMObjective(make_model(attention_dropout=0.3), DIFFUSION),
        MemDLMObjective(make_model(attention_dropout=0.3), DIFFUSION, memory),
    ):
        torch.manual_seed(0)
        objective(batch).loss.backward()
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


class Packed(nn.Linear):
    """A frozen 4-bit layer as bitsandbytes has it: the weight is a column of bytes."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features, bias=False)
        self.compute_dtype = dense.weight.dtype
        codes = (dense.weight.detach() * 8).round().clamp(-8, 7) + 8  # 0 .. 15
        low, high = codes.to(torch.uint8).flatten().view(-1, 2).unbind(1)
        self.weight = nn.Parameter((low | high << 4)[:, None], requires_grad=False)

    def dense_weight(self):
        both = torch.stack([self.weight & 15, self.weight >> 4], dim=-1)
        values = (both.to(self.compute_dtype) - 8) / 8
        return values.view(self.out_features, self.in_features)

    def forward(self, x):
        return F.linear(x, self.dense_weight())


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_4_bit_base_is_adapted_by_its_true_shape(adapter):
    """Published: the fast weights take their shape and dtype from the packed weight, and crash."""
    memory = MemoryConfig(**TINY, adapter=adapter)
    features = make_features()
    packed, twin = make_model(), make_model()
    for layer, twin_layer in zip(packed.model.layers, twin.model.layers, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            quantised = Packed(getattr(layer.mlp, name))
            setattr(layer.mlp, name, quantised)
            getattr(twin_layer.mlp, name).weight = nn.Parameter(quantised.dense_weight())
    objective = MemDLMObjective(packed, DIFFUSION, memory)
    batch = make_batch(DIFFUSION, memory, features)
    objective.fast_weights.reset(batch["memory_seed"])
    start = {
        f"model.layers.{name}": tuple(tensor.clone() for tensor in tensors)
        for name, tensors in objective.fast_weights.named().items()
    }
    truth = naive_step(twin, batch, features, DIFFUSION, memory, [start])
    output = objective(batch)
    output.loss.backward()
    inner = torch.tensor(truth.inner_losses, dtype=torch.float64).T
    torch.testing.assert_close(output.inner.loss, inner, rtol=1e-9, atol=0)
    torch.testing.assert_close(output.loss.detach(), truth.outer_loss, rtol=1e-9, atol=0)
