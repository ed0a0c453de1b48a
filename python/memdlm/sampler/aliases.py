"""What other samplers call the same options: LLaDA, dllm, Dream, LLaDA2.x, diffusers."""

import dataclasses
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
    # Of LLaDA2.x and diffusers, which count for each block.
    "num_inference_steps": "steps_per_block",
    "num_to_transfer": "min_reveal",
}
# Dream's algorithms that choose by confidence.
DREAM_ALGORITHMS = {
    "entropy": "entropy",
    "maskgit_plus": "low_confidence",
    "topk_margin": "margin",
}


def sampler_config(options: Mapping[str, Any]) -> SamplerConfig:
    """Options by our names or those of other samplers.

    An algorithm of Dream by the name `alg` brings Dream's ways along, unless others are given: its
    confidences are of the tempered distribution (`tempered_confidence`), and its steps reveal
    tokens on its time grid (`reveal`), where no threshold or least number chooses them. An
    `alg_temp` of 0 is none.

    Args:
        options: names of `SamplerConfig` or of `ALIASES`, to values.

    Returns:
        The config.

    Raises:
        ValueError: an unknown name, two names of one option, a value outside its range, or an
            option that nothing would read.
    """
    known = {field.name for field in dataclasses.fields(SamplerConfig)}
    own: dict[str, Any] = {}
    given_as: dict[str, str] = {}
    for name, value in options.items():
        ours = ALIASES.get(name, name)
        if ours not in known:
            every = ", ".join(sorted([*known, *ALIASES]))
            raise ValueError(f"unknown option {name!r} of the sampler; it knows {every}")
        if ours in given_as:
            raise ValueError(
                f"{given_as[ours]} and {name} must not both be given: they are one option"
            )
        given_as[ours] = name
        if name == "alg_temp" and value == 0:
            value = None
        own[ours] = value
    algorithm = own.get("remasking")
    if isinstance(algorithm, str) and algorithm in DREAM_ALGORITHMS:
        own["remasking"] = DREAM_ALGORITHMS[algorithm]
        chosen = any(own.get(name) is not None for name in ("threshold", "min_reveal"))
        if given_as["remasking"] == "alg" and not chosen:
            own.setdefault("reveal", "time_grid")
    tempered = own.get("temperature", 0) and own.get("remasking") in BY_CONFIDENCE
    if given_as.get("remasking") == "alg" and tempered:
        own.setdefault("tempered_confidence", True)
    return SamplerConfig(**own)
