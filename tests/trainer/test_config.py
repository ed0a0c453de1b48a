"""The options: their defaults are the paper's, and a value outside its range is an error."""

import dataclasses
import math
import re

import pytest

from memdlm.config import DiffusionConfig, MemoryConfig, from_options

NOT_COUNTS = [0, -1, 1.5, 2.0, True, "2", None]
NOT_POSITIVE = [0, -0.1, math.nan, math.inf, True, "0.1", None]


def test_the_defaults_are_those_of_the_paper():
    memory = MemoryConfig()
    assert (memory.inner_steps, memory.inner_epochs) == (2, 1)
    assert (memory.strategy, memory.pre_anchor_scale) == ("anchor_consistent", 1.5)
    assert (memory.inner_lr, memory.inner_max_norm, memory.inner_clip) == (0.1, 1.0, "tensor")
    assert (memory.adapter, memory.rank, memory.lora_alpha) == ("lora", 32, 64)
    assert (memory.target, memory.layer_fraction) == ("ffn", 0.1)
    assert (memory.scope, memory.state_dtype) == ("batch", "float32")
    assert (memory.inner_loss, memory.meta_gradient) == ("cross_entropy", "first_order")
    diffusion = DiffusionConfig()
    assert (diffusion.schedule, diffusion.time_epsilon) == ("linear", 1e-3)
    assert (diffusion.loss_weight, diffusion.loss_norm) == ("schedule", "token")


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, bad) for name in ("inner_steps", "inner_epochs", "rank") for bad in NOT_COUNTS]
    + [
        (name, bad)
        for name in ("inner_lr", "inner_max_norm", "lora_alpha", "inner_temperature")
        for bad in NOT_POSITIVE
    ]
    + [("pre_anchor_scale", bad) for bad in (0.99, -1, math.nan, math.inf, True, "1.5")]
    + [("layer_fraction", bad) for bad in (0, -0.1, 1.01, math.nan, True, "0.1")]
    + [
        (name, "no such choice")
        for name in (
            "strategy",
            "inner_targets",
            "inner_loss",
            "meta_gradient",
            "inner_clip",
            "adapter",
            "target",
            "scope",
            "state_dtype",
            "inner_checkpoint",
        )
    ]
    + [("strategy", None), ("scope", ["batch"])],
)
def test_a_bad_memory_option_is_named_with_what_it_got(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {re.escape(repr(value))}$"):
        MemoryConfig(**{name: value})


@pytest.mark.parametrize(
    ("meta_gradient", "name", "value"),
    [
        ("exact", "inner_graph", True),
        ("exact_suffix", "inner_graph", True),
        ("exact", "prefix_reuse", "prompt_kv"),
    ],
)
def test_what_has_no_exact_gradient_is_refused(meta_gradient, name, value):
    expected = rf"^{name} must be .* with meta_gradient '{meta_gradient}'.*, got {value!r}$"
    with pytest.raises(ValueError, match=expected):
        MemoryConfig(meta_gradient=meta_gradient, **{name: value})
    assert MemoryConfig(meta_gradient="exact_suffix", prefix_reuse="prompt_kv")


@pytest.mark.parametrize(
    ("name", "value"),
    [("time_epsilon", bad) for bad in (0, 1, 2, -1e-3, math.nan, True, "0.001")]
    + [("schedule", "sqrt"), ("loss_weight", "none"), ("loss_norm", "mean")],
)
def test_a_bad_diffusion_option_is_named_with_what_it_got(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {re.escape(repr(value))}$"):
        DiffusionConfig(**{name: value})


def test_a_bad_choice_is_told_what_exists():
    with pytest.raises(ValueError, match="one of 'anchor_consistent', 'anchor_only', "):
        MemoryConfig(strategy="pmc")


@pytest.mark.parametrize("config", [MemoryConfig(), DiffusionConfig()])
def test_options_do_not_change_under_a_run(config):
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, 1)


def test_from_options_takes_its_own_and_leaves_the_others():
    options = {"rank": 8, "schedule": "cosine", "no_such_key": 1}
    assert from_options(MemoryConfig, options) == MemoryConfig(rank=8)
    assert options == {"schedule": "cosine", "no_such_key": 1}


def test_from_options_checks_the_values():
    with pytest.raises(ValueError, match="rank must be a whole number, at least 1, got 0"):
        from_options(MemoryConfig, {"rank": 0})
