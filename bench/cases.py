"""Named shapes that the benchmarks run on, and which of them make up a suite."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

import memdlm.demo
from memdlm.models import LLaDAMoEConfig
from memdlm.models.published import PUBLISHED

_DEMO_BASE = Path(memdlm.demo.__file__).parent / "base"


@dataclass(frozen=True)
class StepCase:
    """A model's shape, a batch's, and what is trained.

    Attributes:
        model: a name in `MODELS`; weights are random.
        batch_size: B.
        length: L.
        prompt_share: share of each sequence that is prompt, never masked.
        outer: "full" trains every weight, "lora" a LoRA on attention and FFN, "lora_attention" one
            on the attention alone.
        gradient_checkpointing: recompute each layer in the outer backward.
    """

    model: str
    batch_size: int
    length: int
    prompt_share: float
    outer: str = "lora"
    gradient_checkpointing: bool = False

    @property
    def config(self) -> PretrainedConfig:
        """The model's Hugging Face config."""
        config = MODELS[self.model]()
        config.max_position_embeddings = max(config.max_position_embeddings, self.length)
        return config

    @property
    def name(self) -> str:
        """What tells it from every other case."""
        checkpointed = ", checkpointed" if self.gradient_checkpointing else ""
        return (
            f"{self.model}, {self.batch_size} x {self.length}, {self.prompt_share:.0%} prompt, "
            f"{self.outer}{checkpointed}"
        )


OUTER_LORA_RANK = 32


def _dense_small() -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=384,
        intermediate_size=1_024,
        num_hidden_layers=16,
        num_attention_heads=6,
        num_key_value_heads=6,
    )


def _smollm2_small() -> PretrainedConfig:
    config = PUBLISHED["SmolLM2-135M"]()
    config.num_hidden_layers = 4
    return config


def _llada_moe_small(layers: int = 16) -> PretrainedConfig:
    return LLaDAMoEConfig(
        vocab_size=32_000,
        hidden_size=256,
        expert_intermediate_size=128,
        num_hidden_layers=layers,
        moe_layer_freq=[1] * layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        pad_token_id=None,
        mask_token_id=31_999,
        eos_token_id=None,
    )


# Published shapes; the demo's model; a decoder of 60 M parameters; SmolLM2-135M's widths with few
# layers; an eighth of LLaDA-MoE in every width, and that with half of its layers, of which the
# adapted ones are the same share: an eighth.
MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    **PUBLISHED,
    "tiny": lambda: AutoConfig.from_pretrained(_DEMO_BASE),
    "dense_small": _dense_small,
    "smollm2_small": _smollm2_small,
    "llada_moe_small": _llada_moe_small,
    "llada_moe_half": lambda: _llada_moe_small(layers=8),
}

# One batch of each small model, as a trainer would take it.
SMALL = {
    "tiny": StepCase("tiny", 8, 256, 0.8, "full"),
    "dense_small": StepCase("dense_small", 2, 512, 0.8),
    "smollm2_small": StepCase("smollm2_small", 2, 512, 0.8),
    "llada_moe_small": StepCase("llada_moe_small", 2, 512, 0.8),
}


def _varied(case: StepCase, **values: list[object]) -> list[StepCase]:
    """The case with each of the values of each field, one field at a time."""
    return [
        dataclasses.replace(case, **{field: value})
        for field, choices in values.items()
        for value in choices
    ]


@dataclass(frozen=True)
class Suite:
    """What `python -m bench.run` measures.

    Attributes:
        device: type of the device that it is for.
        dtype: of the model and of the ops.
        costs: cases that are measured with every K.
        inner_steps: those K.
        sweeps: cases that are measured with K = 2 alone and without `memdlm_naive`: lengths, prompt
            shares, checkpointing.
        repeats: timed rounds of a step.
        naive_every: n: `memdlm_naive`, much slower than the rest, takes part in each nth alone.
        prompt_kv: whether `memdlm_prompt_kv` is measured.
        exact: whether `memdlm_exact` is, in the cost cases.
        graph: whether `memdlm_graph` is, likewise.
        sdpa_backends: with which `mdlm` and `memdlm` are measured once more, likewise.
        op_rounds: timed rounds of an op, at most.
        op_seconds: for about how long one is timed, with our default beside it.
        op_visits: over how many visits its rounds are spread; beyond one, all cases lie in memory.
    """

    device: str
    dtype: str
    costs: list[StepCase]
    inner_steps: list[int]
    sweeps: list[StepCase]
    repeats: int
    op_rounds: int
    op_seconds: float = 0.7
    op_visits: int = 1
    naive_every: int = 1
    prompt_kv: bool = True
    exact: bool = True
    graph: bool = False
    sdpa_backends: tuple[str, ...] = ()


_REAL = [
    StepCase("LLaDA-MoE-7B-A1B", 2, 4_096, 0.9, "lora_attention"),
    StepCase("LLaDA-8B", 1, 4_096, 0.9),
    StepCase("LLaDA2.x-mini", 1, 4_096, 0.9, "lora_attention"),
    StepCase("Dream-7B", 1, 4_096, 0.9),
    StepCase("SmolLM2-135M", 8, 2_048, 0.8, "full"),
]

# Of 8 x 256, all logits are 32 MiB, which the C library may map afresh or not: one run of the plain
# method takes a third more than another.
_QUICK_TINY = dataclasses.replace(SMALL["tiny"], batch_size=4)

SUITES = {
    "quick": Suite(
        device="cpu",
        dtype="float32",
        costs=[
            _QUICK_TINY,
            dataclasses.replace(SMALL["smollm2_small"], batch_size=1),
            dataclasses.replace(SMALL["llada_moe_small"], model="llada_moe_half", batch_size=1),
        ],
        inner_steps=[1, 2, 4],
        sweeps=_varied(_QUICK_TINY, length=[128]),
        repeats=12,
        op_rounds=201,
        op_seconds=2.0,
        op_visits=24,
        naive_every=2,
        prompt_kv=False,
        exact=False,
    ),
    "cpu": Suite(
        device="cpu",
        dtype="float32",
        costs=list(SMALL.values()),
        inner_steps=[1, 2, 3, 4],
        sweeps=[
            *_varied(SMALL["tiny"], length=[512, 1_024, 2_048], prompt_share=[0.5, 0.9, 0.95]),
            *_varied(
                SMALL["llada_moe_small"],
                length=[1_024, 2_048],
                prompt_share=[0.5, 0.9, 0.95],
                outer=["full", "lora_attention"],
                gradient_checkpointing=[True],
            ),
        ],
        repeats=9,
        op_rounds=201,
    ),
    "gpu": Suite(
        device="cuda",
        dtype="bfloat16",
        costs=_REAL,
        inner_steps=[1, 2, 3, 4],
        sweeps=_varied(
            _REAL[0],
            length=[1_024, 2_048, 8_192],
            prompt_share=[0.5, 0.8, 0.95],
            batch_size=[1],
            gradient_checkpointing=[True],
        )
        # Long inputs do not fit without recomputing.
        + [
            dataclasses.replace(_REAL[0], batch_size=1, length=length, gradient_checkpointing=True)
            for length in (16_384, 32_768)
        ],
        repeats=3,
        op_rounds=21,
        graph=True,
        # Which of the two is PyTorch's own order follows from its cuDNN: one of them shows nothing.
        sdpa_backends=("cudnn", "flash"),
    ),
}
