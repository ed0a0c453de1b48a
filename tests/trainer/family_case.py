"""What the comparisons with the plain twins of all families share."""

from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

from memdlm.config import DiffusionConfig
from memdlm.data.collator import MaskCollator
from memdlm.objective import MemDLMObjective
from tests import oracle
from tests.families import (
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


def route_in_float64(model):
    """Hugging Face's router of OLMoE rounds its softmax to float32."""

    def forward(router, hidden_states):
        logits = nn.functional.linear(hidden_states, router.weight)
        weight, index = logits.softmax(-1).topk(router.top_k)
        return logits, weight / weight.sum(-1, keepdim=True), index

    for module in model.modules():
        if isinstance(module, OlmoeTopKRouter):
            module.forward = partial(forward, module)


def assert_close(name, actual, truth, tolerance=TOLERANCE):
    assert actual is not None, f"{name}: no gradient"
    assert actual.dtype == truth.dtype == torch.float64
    error = (actual - truth).abs().max().item()
    assert error <= tolerance * max(truth.abs().max().item(), 1e-6), f"{name}: off by {error}"


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
    route_in_float64(bare)
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


def assert_same_step(
    family, memory, outer="full", diffusion=None, shapes=None, tolerance=TOLERANCE
):
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
    assert_close("inner losses", output.inner.loss, losses, tolerance)
    # [set][step][tensor], in the order of the twin's fast weights.
    order = [(name, which) for name, pair in start[0].items() for which in range(len(pair))]
    places = {key: place for place, key in enumerate(order)}
    ours = [
        places[f"model.layers.{name}", which]
        for name, which in segment_names(objective_stacks(objective))
    ]
    norms = torch.tensor(truth.inner_norms, dtype=torch.float64).transpose(0, 1)[..., ours]
    assert_close("gradient norms", output.inner.norm, norms, tolerance)
    assert not output.inner.skipped.any()
    for s, expected in enumerate(truth.fast_weights):
        for name, tensors in objective.fast_weights.named().items():
            of_set = [t[s] if memory.scope == "sample" else t for t in tensors]
            for linear, pair in per_linear(name, of_set).items():
                for actual, own in zip(pair, expected[f"model.layers.{linear}"], strict=True):
                    assert_close(linear, actual, own, tolerance)
    assert_close("outer loss", output.loss.detach(), truth.outer_loss, tolerance)
    actual = own_gradients(model, outer)
    for name, leaf in leaves.items():
        expected = leaf.grad if leaf.grad is not None else leaf * 0
        assert_close(name, actual[name], expected, tolerance)


def objective_stacks(objective):
    """Layer to tensors without the S sets."""
    per_sample = objective.memory.scope == "sample"
    named = objective.fast_weights.named()
    return {name: [t[0] if per_sample else t for t in tensors] for name, tensors in named.items()}
