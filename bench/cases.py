"""Named shapes that the benchmarks run on."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

import memdlm.demo
from memdlm.models import LLaDAMoEConfig

_DEMO_BASE = Path(memdlm.demo.__file__).parent / "base"


@dataclass(frozen=True)
class StepCase:
    """A model's shape and a batch's.

    Attributes:
        config: the model's Hugging Face config; weights are random.
        batch_size: B.
        length: L.
        prompt_share: share of each sequence that is prompt, never masked.
        outer_lora_rank: rank of the outer LoRA on attention and FFN; None for full fine-tuning.
    """

    config: PretrainedConfig
    batch_size: int
    length: int
    prompt_share: float
    outer_lora_rank: int | None


PRESETS = ("tiny", "dense_small", "llada_moe_small", "llada_moe")


def step_case(name: str) -> StepCase:
    """The case of a preset.

    "tiny" is the demo's model and batch, "dense_small" a decoder of 60 M parameters,
    "llada_moe_small" one of 64 experts, an eighth of LLaDA-MoE in every width, "llada_moe" that
    model itself (7.4 B parameters) on two sequences of 4,096 tokens, for a GPU.
    """
    if name == "tiny":
        return StepCase(AutoConfig.from_pretrained(_DEMO_BASE), 8, 256, 0.8, None)
    if name == "dense_small":
        config = LlamaConfig(
            vocab_size=32_000,
            hidden_size=384,
            intermediate_size=1_024,
            num_hidden_layers=16,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=512,
        )
        return StepCase(config, 2, 512, 0.8, 32)
    if name == "llada_moe_small":
        sparse = LLaDAMoEConfig(
            vocab_size=32_000,
            hidden_size=256,
            expert_intermediate_size=128,
            num_hidden_layers=16,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=64,
            num_experts_per_tok=8,
            max_position_embeddings=512,
            pad_token_id=None,
            mask_token_id=31_999,
            eos_token_id=None,
        )
        return StepCase(sparse, 2, 512, 0.8, 32)
    if name == "llada_moe":
        return StepCase(LLaDAMoEConfig(), 2, 4_096, 0.9, 32)
    raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
