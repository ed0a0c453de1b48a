"""What a request of the harness says about its answer, as options of the sampler, and back."""

from collections.abc import Mapping
from typing import Any

from memdlm.sampler import SamplerConfig, sampler_config

# The name that most tasks give to it, and others that some do; the first that is given counts.
MAX_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# What these say is what happens anyway.
NEUTRAL = {"num_beams": 1, "top_k": 0, "top_p": 1}


def request_config(
    arguments: Mapping[str, Any], options: Mapping[str, Any], max_new_tokens: int
) -> SamplerConfig:
    """The sampler's options of a request.

    Args:
        arguments: the generation arguments of the request, which come first.
        options: those of the model.
        max_new_tokens: where the request does not say.

    Returns:
        The config.

    Raises:
        ValueError: as `sampler_config`.
    """
    own = {name: value for name, value in arguments.items() if NEUTRAL.get(name) != value}
    own.pop("until", None)
    given = [own.pop(name) for name in MAX_NEW_TOKENS if name in own]
    if given:
        own["max_new_tokens"] = int(given[0])
    elif "gen_length" not in own:
        own["max_new_tokens"] = max_new_tokens
    # Greedy whatever the temperature, where a task says so; else 1 is the harness's own default.
    do_sample = own.pop("do_sample", own.get("temperature", 0) > 0)
    own["temperature"] = float(own.get("temperature", 1.0)) if do_sample else 0.0
    return sampler_config({**options, **own})


def generation_arguments(sampler: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the sampler as generation arguments, which replace a task's own.

    Args:
        sampler: names that `sampler_config` knows, to values.

    Returns:
        Name to value.
    """
    arguments = dict(sampler)
    lengths = [
        arguments.pop(name) for name in ("max_new_tokens", "gen_length") if name in arguments
    ]
    if lengths:
        arguments["max_gen_toks"] = lengths[0]
    if "temperature" in arguments:
        arguments["do_sample"] = arguments["temperature"] > 0
    return arguments
