"""What the comparisons with the naive twin share: options, models, and what must be equal."""

import itertools
import random

import torch
from peft import LoraConfig, get_peft_model

from memdlm.objective import MemDLMObjective
from tests.tiny import (
    EVEN,
    RAGGED,
    gradients,
    initial_fast_weights,
    make_batch,
    make_features,
    make_model,
    naive_step,
)

TOLERANCE = 1e-9
# Some of the first gradients' norms lie above the clip, some below; the last layer alone is adapted
# unless a case says otherwise.
MEMORY = {"rank": 4, "lora_alpha": 8.0, "inner_lr": 0.3, "inner_max_norm": 0.15}

# The named cases of the acceptance list, each with each.
GRID = {
    "strategy": ["anchor_consistent", "anchor_only", "pre_anchor_only", "progressive"],
    "inner_steps": [1, 2, 3, 4],
    "scope": ["batch", "sample"],
    "adapter": ["lora", "full"],
}
# Everything else that the result depends on or must not depend on: each pair of values once.
MEMORY_OPTIONS = GRID | {
    "target": ["ffn", "ffn+attention"],
    "layer_fraction": [0.1, 0.5, 1.0],
    "inner_clip": ["tensor", "global", "none"],
    "inner_targets": ["all_masked", "newly_revealed"],
    "inner_epochs": [1, 2],
    "inner_checkpoint": ["none", "layer", "auto"],
    "pre_anchor_scale": [1.0, 1.5, 3.0],
}
DIFFUSION_OPTIONS = {
    "schedule": ["linear", "cosine"],
    "loss_norm": ["token", "sequence", "batch"],
    "loss_weight": ["schedule", "uniform"],
}
MODEL_OPTIONS = {
    "family": ["llama", "qwen3"],
    "tied": [False, True],
    "outer": ["full", "lora", "lora and head"],
    "gradient_checkpointing": [False, True],
    "shapes": [RAGGED, EVEN],
}


def every_combination(options):
    return [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]


def every_pair(options):
    """Few combinations in which every pair of values of two options occurs."""
    generator = random.Random(0)
    uncovered = set()
    for first, second in itertools.combinations(options, 2):
        uncovered |= {
            ((first, a), (second, b))
            for a in range(len(options[first]))
            for b in range(len(options[second]))
        }
    cases = []
    while uncovered:
        candidates = [
            {name: generator.randrange(len(values)) for name, values in options.items()}
            for _ in range(60)
        ]
        covered = [set(itertools.combinations(case.items(), 2)) & uncovered for case in candidates]
        best = max(range(len(candidates)), key=lambda i: len(covered[i]))
        uncovered -= covered[best]
        cases.append({name: options[name][i] for name, i in candidates[best].items()})
    return cases


def build(family="llama", tied=False, outer="full", gradient_checkpointing=False):
    model = make_model(family, tied=tied)
    if outer != "full":
        config = LoraConfig(
            r=3,
            lora_alpha=6,
            target_modules=["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"],
            modules_to_save=["lm_head"] if outer == "lora and head" and not tied else None,
        )
        torch.manual_seed(1)
        model = get_peft_model(model, config).double().train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def assert_equal(name, actual, truth, tolerance=TOLERANCE):
    assert actual is not None, f"{name}: no gradient"
    assert actual.dtype == truth.dtype == torch.float64
    error = (actual - truth).abs().max().item()
    assert error <= tolerance * truth.abs().max().item(), f"{name}: off by {error}"


def assert_same_step(memory, diffusion, shapes=RAGGED, tolerance=TOLERANCE, **model_options):
    features = make_features(shapes)
    batch = make_batch(diffusion, memory, features)
    twin = build(**model_options | {"gradient_checkpointing": False})
    model = build(**model_options)
    objective = MemDLMObjective(model, diffusion, memory)
    start = initial_fast_weights(objective, twin, batch)

    truth = naive_step(twin, batch, features, diffusion, memory, start)
    output = objective(batch)
    output.loss.backward()

    losses = torch.tensor(truth.inner_losses, dtype=torch.float64).T  # [steps, S]
    norms = torch.tensor(truth.inner_norms, dtype=torch.float64).transpose(0, 1)  # [steps, S, P]
    assert_equal("inner losses", output.inner.loss, losses, tolerance)
    assert_equal("gradient norms", output.inner.norm, norms, tolerance)
    assert not output.inner.skipped.any()
    expected_sets = zip(*(pairs.values() for pairs in truth.fast_weights), strict=True)
    for (name, tensors), expected in zip(
        objective.fast_weights.named().items(), expected_sets, strict=True
    ):
        for actual, *per_set in zip(tensors, *expected, strict=True):
            stacked = torch.stack(per_set) if memory.scope == "sample" else per_set[0]
            assert_equal(name, actual, stacked, tolerance)
    assert_equal("outer loss", output.loss.detach(), truth.outer_loss, tolerance)
    expected_gradients = gradients(twin)
    for name, actual in gradients(model).items():
        assert_equal(name, actual, expected_gradients[name], tolerance)


def as_id(case):
    return "-".join(str(value) for value in case.values() if not isinstance(value, tuple))
