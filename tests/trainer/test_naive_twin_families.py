"""The restructured step on every backbone against the naive twin, float64.

The twin runs `tests.plain`: experts are linear layers in a loop. Ours are stacked, sorted and
grouped; a layer's fast weights and an outer LoRA are stacked too.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator
from memdlm.objective import MDLMObjective, MemDLMObjective
from tests import oracle
from tests.families import (
    FAMILIES,
    add_outer_lora,
    make_family_model,
    make_twin,
    per_expert,
    per_linear,
    segment_names,
)
from tests.tiny import MASK, PAD, VOCABULARY, gradients, make_features, naive_step

TOLERANCE = 1e-9
MEMORY = {"rank": 2, "lora_alpha": 4.0, "inner_lr": 0.3, "inner_max_norm": 0.05}


@pytest.fixture(autouse=True)
def _olmoe_routes_in_float64(monkeypatch):
    """Hugging Face's router of OLMoE rounds its softmax to float32."""

    def forward(self, hidden_states):
        logits = nn.functional.linear(hidden_states, self.weight)
        weight, index = logits.softmax(-1).topk(self.top_k)
        return logits, weight / weight.sum(-1, keepdim=True), index

    monkeypatch.setattr(OlmoeTopKRouter, "forward", forward)


def assert_close(name, actual, truth):
    assert actual is not None, f"{name}: no gradient"
    assert actual.dtype == truth.dtype == torch.float64
    error = (actual - truth).abs().max().item()
    assert error <= TOLERANCE * max(truth.abs().max().item(), 1e-6), f"{name}: off by {error}"


def with_outer_lora(model):
    torch.manual_seed(1)
    stacked = any("experts.down_proj" in name for name, _ in model.named_parameters())
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
        + ["gate_proj", "up_proj", "down_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"] if stacked else None,
    )
    adapted = get_peft_model(model, config).double().train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return adapted


def prepare(family, outer):
    """The model, its twin, and what to compare their gradients by: name to the twin's leaf."""
    bare = make_family_model(family)
    twin = make_twin(bare)
    if outer == "lora":
        model = with_outer_lora(bare)
        twin.requires_grad_(False)
        return model, twin, add_outer_lora(model, twin)
    leaves = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    return bare, twin, leaves


def own_gradients(model, outer):
    if outer == "lora":
        return gradients(model)
    named = {}
    for name, gradient in gradients(model).items():
        named |= per_expert(name, gradient)
    return named


def batch_of(model, diffusion, memory, features):
    shifts = bool(getattr(model.config, "right_shift_logits", False))
    collator = MaskCollator(MASK, PAD, VOCABULARY, diffusion, memory, right_shift_logits=shifts)
    return collator(features)


def start_of(objective, batch):
    """The draw of this batch: a dict for each set, with the twin's names."""
    objective.fast_weights.reset(batch["memory_seed"])
    named = objective.fast_weights.named()
    per_sample = objective.memory.scope == "sample"
    sets = []
    for s in range(len(batch["input_ids"]) if per_sample else 1):
        own = {}
        for name, tensors in named.items():
            of_set = [(t[s] if per_sample else t).detach().clone() for t in tensors]
            for linear, pair in per_linear(name, of_set).items():
                own[f"model.layers.{linear}"] = tuple(tensor.contiguous() for tensor in pair)
        sets.append(own)
    return sets


def assert_same_step(family, memory, outer="full", diffusion=None, shapes=None):
    diffusion = diffusion or DiffusionConfig()
    features = make_features() if shapes is None else make_features(shapes)
    model, twin, leaves = prepare(family, outer)
    objective = MemDLMObjective(model, diffusion, memory)
    batch = batch_of(model, diffusion, memory, features)
    start = start_of(objective, batch)
    wanted = oracle.adapted_modules(twin, memory)
    assert {name for own in start for name in own} == set(wanted)

    truth = naive_step(twin, batch, features, diffusion, memory, start)
    output = objective(batch)
    output.loss.backward()

    losses = torch.tensor(truth.inner_losses, dtype=torch.float64).T  # [steps, S]
    assert_close("inner losses", output.inner.loss, losses)
    # [set][step][tensor], in the order of the twin's fast weights.
    order = [(name, which) for name, pair in start[0].items() for which in range(len(pair))]
    places = {key: place for place, key in enumerate(order)}
    ours = [
        places[f"model.layers.{name}", which]
        for name, which in segment_names(objective_stacks(objective))
    ]
    norms = torch.tensor(truth.inner_norms, dtype=torch.float64).transpose(0, 1)[..., ours]
    assert_close("gradient norms", output.inner.norm, norms)
    assert not output.inner.skipped.any()
    for s, expected in enumerate(truth.fast_weights):
        for name, tensors in objective.fast_weights.named().items():
            of_set = [t[s] if memory.scope == "sample" else t for t in tensors]
            for linear, pair in per_linear(name, of_set).items():
                for actual, own in zip(pair, expected[f"model.layers.{linear}"], strict=True):
                    assert_close(linear, actual, own)
    assert_close("outer loss", output.loss.detach(), truth.outer_loss)
    actual = own_gradients(model, outer)
    for name, leaf in leaves.items():
        assert_close(name, actual[name], leaf.grad if leaf.grad is not None else leaf * 0)


def objective_stacks(objective):
    """Layer to tensors without the S sets."""
    per_sample = objective.memory.scope == "sample"
    named = objective.fast_weights.named()
    return {name: [t[0] if per_sample else t for t in tensors] for name, tensors in named.items()}


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
