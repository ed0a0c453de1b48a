"""The shapes of published models by name, for estimates and benchmarks without their weights."""

from collections.abc import Callable

from transformers import LlamaConfig, PreTrainedConfig

from memdlm.models.dream import DreamConfig
from memdlm.models.llada import LLaDAConfig
from memdlm.models.llada2 import LLaDA2MoeConfig
from memdlm.models.llada_moe import LLaDAMoEConfig


def _smollm2_135m() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8_192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )


PUBLISHED: dict[str, Callable[[], PreTrainedConfig]] = {
    "LLaDA-8B": LLaDAConfig,
    "LLaDA-MoE-7B-A1B": LLaDAMoEConfig,
    "LLaDA2.x-mini": LLaDA2MoeConfig,
    "Dream-7B": DreamConfig,
    "SmolLM2-135M": _smollm2_135m,
}
