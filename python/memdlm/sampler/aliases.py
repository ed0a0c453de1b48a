"""What other samplers call the same options: LLaDA, dllm, Dream, LLaDA2.x, diffusers."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from memdlm.sampler.config import BY_CONFIDENCE, SamplerConfig

# Other name to ours.
ALIASES = {
    "alg": "remasking",
    "alg_temp": "remasking_temperature",
    "block_size": "block_length",
    "editing_threshold": "edit_threshold",
    "eos_early_stop": "stop_at_end",
    "eps": "time_epsilon",
    "gen_length": "max_new_tokens",
}
# Counted for one block there, for the whole response here.
PER_BLOCK = {
    "num_inference_steps": "the steps of a block",
    "num_to_transfer": "the least tokens that a step reveals",
    "steps_per_block": "the steps of a block",
}
# Dream's algorithms, and the names of LLaDA and ours.
ALGORITHMS = {"maskgit_plus": "low_confidence", "topk_margin": "margin"}


def sampler_config(options: Mapping[str, Any]) -> SamplerConfig:
    """Options by our names or those of other samplers.

    Dream takes its confidences from the tempered distribution, so `alg` sets `tempered_confidence`
    where there is a temperature and a confidence.

    Args:
        options: names of `SamplerConfig` or of `ALIASES` and `PER_BLOCK`, to values.

    Returns:
        The config.

    Raises:
        ValueError: an unknown name, two names of one option, a value outside its range, or an
            option that nothing would read.
    """
    known = {field.name for field in dataclasses.fields(SamplerConfig)}
    own: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    per_block: dict[str, Any] = {}
    for name, value in options.items():
        ours = "steps" if name in PER_BLOCK else ALIASES.get(name, name)
        if ours not in known:
            every = ", ".join(sorted([*known, *ALIASES, *PER_BLOCK]))
            raise ValueError(f"unknown option {name!r} of the sampler; it knows {every}")
        if ours in given_as:
            raise ValueError(
                f"{given_as[ours]} and {name} must not both be given: they are one option"
            )
        given_as[ours] = name
        (per_block if name in PER_BLOCK else own)[name] = value
    own = {ALIASES.get(name, name): value for name, value in own.items()}
    if "remasking" in own:
        own["remasking"] = ALGORITHMS.get(own["remasking"], own["remasking"])
    tempered = own.get("temperature", 0) and own.get("remasking") in BY_CONFIDENCE
    if given_as.get("remasking") == "alg" and tempered:
        own.setdefault("tempered_confidence", True)
    config = SamplerConfig(**own)
    for name, value in per_block.items():
        config = dataclasses.replace(config, steps=_all_steps(name, value, config))
    return config


def _all_steps(name: str, value: Any, config: SamplerConfig) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
    block = config.block_length
    if block is None:
        raise ValueError(f"{name} needs block_length: it is {PER_BLOCK[name]}")
    blocks = math.ceil(config.max_new_tokens / block)
    return blocks * (math.ceil(block / value) if name == "num_to_transfer" else value)
