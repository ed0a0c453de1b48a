"""The restructured step on every backbone against the naive twin, float64.

The twin runs `tests.plain`: experts are linear layers in a loop. Ours are stacked, sorted and
grouped; a layer's fast weights and an outer LoRA are stacked too.
"""

import pytest
import torch
from peft import get_peft_model_state_dict

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.objective import MDLMObjective, MemDLMObjective
from tests.families import FAMILIES, make_family_model, per_linear
from tests.tiny import make_features, naive_step
from tests.trainer.family_case import (
    MEMORY,
    assert_close,
    assert_same_step,
    batch_of,
    own_gradients,
    prepare,
    start_of,
    with_outer_lora,
)


@pytest.mark.parametrize("outer", ["full", "lora"])
@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("inner_steps", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_backbone_is_the_naive_step(family, inner_steps, scope, outer):
    assert_same_step(family, MemoryConfig(**MEMORY, inner_steps=inner_steps, scope=scope), outer)


@pytest.mark.parametrize(
    "options",
    [
        {"layer_fraction": 0.5},
        {"layer_fraction": 1.0, "scope": "sample"},
        {"layer_fraction": 0.5, "target": "ffn+attention"},
        {"adapter": "full"},
        {"adapter": "full", "scope": "sample", "layer_fraction": 0.5},
        {"inner_clip": "global", "inner_epochs": 2},
        {"inner_checkpoint": "layer", "layer_fraction": 0.5},
        {"strategy": "anchor_only", "inner_targets": "newly_revealed", "scope": "sample"},
        {"strategy": "progressive", "layer_fraction": 0.5},
        {"strategy": "pre_anchor_only"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_options_on_every_backbone(family, options):
    assert_same_step(family, MemoryConfig(**MEMORY | options))


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_mdlm_on_every_backbone(family):
    features, diffusion = make_features(), DiffusionConfig()
    model, twin, leaves = prepare(family, "full")
    batch = batch_of(model, diffusion, None, features)
    truth = naive_step(twin, batch, features, diffusion)
    loss = MDLMObjective(model, diffusion)(batch).loss
    loss.backward()
    assert_close("loss", loss.detach(), truth.outer_loss)
    actual = own_gradients(model, "full")
    for name, leaf in leaves.items():
        assert_close(name, actual[name], leaf.grad)


@pytest.mark.parametrize("family", ["llada_moe", "llada2", "olmoe"])
def test_an_expert_without_rows_keeps_its_fast_weights(family):
    memory, diffusion = MemoryConfig(**MEMORY), DiffusionConfig()
    model = make_family_model(family)
    objective = MemDLMObjective(model, diffusion, memory)
    batch = batch_of(model, diffusion, memory, make_features(((6, 4), (6, 4))))
    before = [set_.copy() for set_ in start_of(objective, batch)]
    output = objective(batch)
    idle = [
        name
        for s, own in enumerate(start_after(objective))
        for name, pair in own.items()
        if all(torch.equal(a, b) for a, b in zip(pair, before[s][name], strict=True))
    ]
    assert any(
        ".experts." in name for name in idle
    )  # the batch is smaller than the experts are many
    assert len(idle) < len(before[0])
    assert (output.inner.norm == 0).any()


def start_after(objective):
    named = objective.fast_weights.named()
    own = {}
    for name, tensors in named.items():
        for linear, pair in per_linear(name, tensors).items():
            own[f"model.layers.{linear}"] = pair
    return [own]


@pytest.mark.parametrize("family", ["llada_moe", "llada2", "olmoe"])
def test_fast_weights_of_experts_are_no_part_of_the_model(family):
    model = with_outer_lora(make_family_model(family))
    memory, diffusion = MemoryConfig(**MEMORY), DiffusionConfig()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = set(get_peft_model_state_dict(model))
    parameters = [name for name, _ in model.named_parameters()]
    objective = MemDLMObjective(model, diffusion, memory)
    objective(batch_of(model, diffusion, memory, make_features()))
    assert objective.fast_weights.param.any()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert set(get_peft_model_state_dict(model)) == adapter
    assert [name for name, _ in model.named_parameters()] == parameters
    # What an optimiser and DDP are given is the objective's.
    assert {id(p) for p in objective.parameters()} == {id(p) for p in model.parameters()}
    assert not any("fast_weights" in name for name in objective.state_dict())
