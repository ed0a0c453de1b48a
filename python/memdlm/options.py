"""Every option of a training run: one flat set of keys, each of which something reads."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from transformers import TrainingArguments

from memdlm.config import DiffusionConfig, MemoryConfig, from_options
from memdlm.key_values import suggest, typed
from memdlm.sdpa import SdpaBackend
from memdlm.trainer import UNSUPPORTED_ARGUMENTS


@dataclass(frozen=True)
class RunOptions:
    """The model, the data and the outer adapter of a run.

    Attributes:
        model: local folder or hub name of a causal language model.
        dataset: what is trained on: a .json or .jsonl file, a folder written by `save_to_disk`, or
            a hub name. Columns: `messages`, or `prompt` and `response`, or `text`, or `input_ids`
            and `labels`; optionally `weight`, which multiplies an example's loss.
        dataset_split: which split of a dataset that has several.
        eval_dataset: what is evaluated on, in the forms of `dataset`.
        eval_fraction: instead, hold out this share of `dataset`, in (0, 1).
        max_train_examples: use the first so many examples.
        max_eval_examples: evaluate on the first so many examples.
        max_length: most tokens of an example; the model's own limit if not given.
        truncation: what becomes of a longer example: "drop" leaves it out, "left" cuts its
            beginning, "right" its end.
        padding: "longest" pads to the longest example of a batch, "multiple" that rounded up to
            `pad_to_multiple_of`, "max_length" always to `max_length`.
        pad_to_multiple_of: see `padding`.
        mask_token: the mask token; the model's or the tokenizer's own if not given.
        mask_token_id: instead, its id.
        objective: "memdlm" writes the memory for every batch, "mdlm" is plain masked diffusion.
        dtype: of the model's weights; "auto" is what they were saved in.
        load_in_4bit: keep the frozen weights in 4-bit NF4 (bitsandbytes), as QLoRA does; needs
            `lora`. The matrix products are in `dtype`.
        attn_implementation: attention of transformers, say "sdpa", "eager", "flash_attention_2".
        sdpa_backend: which backend PyTorch's `scaled_dot_product_attention` tries first: "auto"
            leaves the order to PyTorch, "cudnn", "flash", "efficient" or "math"; what that one
            cannot take (a mask, heads that share keys, a dtype) goes to the next of flash,
            efficient, math. "cudnn" and "efficient" are for CUDA. With another
            `attn_implementation` the last layer alone reads it.
        lora: train a LoRA (PEFT) instead of all weights.
        lora_rank: rank of that LoRA.
        lora_scaling: its scale, PEFT's lora_alpha / r. (`lora_alpha` is the memory's.)
        lora_dropout: its dropout, in [0, 1); 0 where stacked experts get a LoRA.
        lora_targets: names of the linear layers that get it, never the head; attention and FFN if
            not given, none if empty.
        lora_target_parameters: names of the stacked parameters that get it; those of the experts if
            not given, none if empty. With `load_in_4bit` always none.
        memory_gap_steps: every so many steps, log the loss of one batch with and without memory;
            0 is never.
        exposure_bias_examples: at each evaluation, measure the exposure bias (see `memdlm bias`)
            on the first so many of its examples; 0 is never.
        resume_from_checkpoint: a checkpoint folder, or true for the last one in `output_dir`.

    Raises:
        ValueError: an option outside its range.
    """

    model: str
    dataset: str
    dataset_split: str = "train"
    eval_dataset: str | None = None
    eval_fraction: float | None = None
    max_train_examples: int | None = None
    max_eval_examples: int | None = None
    max_length: int | None = None
    truncation: Literal["drop", "left", "right"] = "drop"
    padding: Literal["longest", "multiple", "max_length"] = "longest"
    pad_to_multiple_of: int = 64
    mask_token: str | None = None
    mask_token_id: int | None = None
    objective: Literal["memdlm", "mdlm"] = "memdlm"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    load_in_4bit: bool = False
    attn_implementation: str = "sdpa"
    sdpa_backend: SdpaBackend = "auto"
    lora: bool = False
    lora_rank: int = 32
    lora_scaling: float = 2.0
    lora_dropout: float = 0.0
    lora_targets: list[str] | None = None
    lora_target_parameters: list[str] | None = None
    memory_gap_steps: int = 0
    exposure_bias_examples: int = 0
    resume_from_checkpoint: str | bool | None = None

    def __post_init__(self) -> None:
        at_least_one = ("max_train_examples", "max_eval_examples", "max_length")
        for name in (*at_least_one, "pad_to_multiple_of", "lora_rank"):
            _check(self, name, "at least 1", lambda value: value >= 1)
        _check(self, "eval_fraction", "in (0, 1)", lambda value: 0 < value < 1)
        _check(self, "lora_dropout", "in [0, 1)", lambda value: 0 <= value < 1)
        _check(self, "lora_scaling", "above 0", lambda value: value > 0)
        for name in ("memory_gap_steps", "exposure_bias_examples"):
            _check(self, name, "at least 0", lambda value: value >= 0)


@dataclass(frozen=True)
class Run:
    """A checked run.

    Attributes:
        options: model, data and adapter.
        diffusion: noise and outer loss.
        memory: the inner loop, None for plain MDLM.
        arguments: the Trainer's.
    """

    options: RunOptions
    diffusion: DiffusionConfig
    memory: MemoryConfig | None
    arguments: TrainingArguments


# Where ours differ from the Trainer's own. Its filter of NaN losses waits for the device at every
# micro-batch, and hides what a log should show.
ARGUMENT_DEFAULTS: dict[str, Any] = {"logging_steps": 10, "logging_nan_inf_filter": False}

# Arguments of the Trainer that nothing would read here, or that are not ours to set.
REJECTED_ARGUMENTS = UNSUPPORTED_ARGUMENTS | {
    "activation_checkpointing_kwargs": "layers are always recomputed without re-entering autograd",
    "batch_eval_metrics": "an evaluation makes losses only",
    "do_eval": "the run evaluates where there is evaluation data",
    "do_predict": "there is nothing to predict",
    "do_train": "this command trains",
    "eval_do_concat_batches": "an evaluation makes losses only",
    "fsdp_config": "not supported yet",
    "gradient_checkpointing_kwargs": "layers are always recomputed without re-entering autograd",
    "include_for_metrics": "an evaluation makes losses only",
    "label_names": "they are fixed",
    "length_column_name": "batches are drawn at random",
    "liger_kernel_config": "the loss is fused already",
    "local_rank": "the launcher sets it",
    "parallelism_config": "not supported yet",
    "prediction_loss_only": "an evaluation makes losses only",
    "push_to_hub": "upload the output folder instead",
    "remove_unused_columns": "every column is read",
    "torch_compile": "not supported yet",
    "torch_compile_backend": "not supported yet",
    "torch_compile_mode": "not supported yet",
    "train_sampling_strategy": "batches are drawn at random",
    "use_cache": "a bidirectional model has no cache",
}

_NEEDS_EVALUATION = (
    "max_eval_examples exposure_bias_examples eval_strategy eval_steps eval_delay eval_on_start "
    "per_device_eval_batch_size load_best_model_at_end"
).split()

# Keys that nothing reads under a condition on the whole run: (keys, condition, reason).
_UNREAD: list[tuple[list[str], Callable[[Mapping[str, Any]], bool], str]] = [
    (
        [field.name for field in dataclasses.fields(MemoryConfig)] + ["memory_gap_steps"],
        lambda run: run["objective"] == "mdlm",
        "objective is 'mdlm'",
    ),
    (
        ["lora_rank", "lora_scaling", "lora_dropout", "lora_targets", "lora_target_parameters"],
        lambda run: not run["lora"],
        "lora is false",
    ),
    (["rank", "lora_alpha"], lambda run: run["adapter"] == "full", "adapter is 'full'"),
    (
        ["pre_anchor_scale"],
        lambda run: run["strategy"] in ("anchor_only", "progressive"),
        "the strategy has no pre-anchor state",
    ),
    (
        ["pre_anchor_scale"],
        lambda run: run["strategy"] == "anchor_consistent" and run["inner_steps"] == 1,
        "with inner_steps 1 the anchor is the only state",
    ),
    (
        ["prefix_reuse"],
        lambda run: (
            run["strategy"] == "anchor_only"
            or (run["strategy"] == "anchor_consistent" and run["inner_steps"] == 1)
        ),
        "the anchor is the only state",
    ),
    (
        ["inner_temperature"],
        lambda run: run["inner_loss"] not in ("kl", "reverse_kl"),
        "inner_loss is neither 'kl' nor 'reverse_kl'",
    ),
    (["inner_max_norm"], lambda run: run["inner_clip"] == "none", "inner_clip is 'none'"),
    (["pad_to_multiple_of"], lambda run: run["padding"] != "multiple", "padding is not 'multiple'"),
    (["eval_fraction"], lambda run: run["eval_dataset"] is not None, "eval_dataset is given"),
    (
        _NEEDS_EVALUATION,
        lambda run: run["eval_dataset"] is None and run["eval_fraction"] is None,
        "there is no evaluation data: set eval_dataset or eval_fraction",
    ),
    (["mask_token"], lambda run: run["mask_token_id"] is not None, "mask_token_id is given"),
    (
        ["dataset_split"],
        lambda run: run["dataset"].endswith((".json", ".jsonl")),
        "a JSON file has no splits",
    ),
    (["num_train_epochs"], lambda run: run["max_steps"] > 0, "max_steps is given"),
    (["eval_steps"], lambda run: run["eval_strategy"] != "steps", "eval_strategy is not 'steps'"),
    (["save_steps"], lambda run: run["save_strategy"] != "steps", "save_strategy is not 'steps'"),
    (["save_total_limit"], lambda run: run["save_strategy"] == "no", "save_strategy is 'no'"),
    (
        ["logging_steps"],
        lambda run: run["logging_strategy"] != "steps",
        "logging_strategy is not 'steps'",
    ),
]


def key_hints() -> dict[str, Any]:
    """Every key of a run to its type."""
    hints: dict[str, Any] = {}
    for kind in (RunOptions, DiffusionConfig, MemoryConfig):
        hints |= get_type_hints(kind)
    for name, hint in get_type_hints(TrainingArguments).items():
        if _is_argument(name) and name not in REJECTED_ARGUMENTS:
            hints.setdefault(name, hint)
    return hints


def key_defaults() -> dict[str, Any]:
    """Every key of a run that may be left out to its default."""
    defaults: dict[str, Any] = {}
    for kind in (TrainingArguments, MemoryConfig, DiffusionConfig, RunOptions):
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING:
                defaults[field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                defaults[field.name] = field.default_factory()
    names = set(key_hints()) - {"output_dir"}
    return {name: value for name, value in (defaults | ARGUMENT_DEFAULTS).items() if name in names}


def _is_argument(name: str) -> bool:
    return any(field.name == name and field.init for field in dataclasses.fields(TrainingArguments))


def make_run(given: Mapping[str, Any]) -> Run:
    """Check a run's keys and values.

    Args:
        given: the keys that are set, to values that YAML can hold.

    Returns:
        The run.

    Raises:
        ValueError: a key that does not exist or that nothing would read, a required one that is
            missing, a value of the wrong type or outside its range.
    """
    hints = key_hints()
    for key in given:
        if key in REJECTED_ARGUMENTS:
            raise ValueError(f"{key} cannot be set: {REJECTED_ARGUMENTS[key]}")
        if key not in hints:
            raise ValueError(f"unknown key {key!r}{suggest(key, hints)}")
    values = {key: typed(key, value, hints[key]) for key, value in given.items()}
    for key in ("model", "dataset", "output_dir"):
        if not values.get(key):
            raise ValueError(f"{key} must be given")
    whole = key_defaults() | values
    for keys, unread, reason in _UNREAD:
        for key in keys:
            if key in values and unread(whole):
                raise ValueError(f"{key} would not be read: {reason}")
    rest = dict(values)
    diffusion = from_options(DiffusionConfig, rest)
    memory = from_options(MemoryConfig, rest)
    options = from_options(RunOptions, rest)
    _check_four_bit(options)
    arguments = TrainingArguments(
        **(ARGUMENT_DEFAULTS | rest), remove_unused_columns=False, label_names=["labels"]
    )
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        _check(arguments, name, "at least 1", lambda value: value >= 1)
    _check(arguments, "seed", "at least 0", lambda value: value >= 0)
    _check_block_size(options, diffusion)
    return Run(options, diffusion, memory if options.objective == "memdlm" else None, arguments)


def _check_four_bit(options: RunOptions) -> None:
    if not options.load_in_4bit:
        return
    if not options.lora:
        raise ValueError(
            "lora must be true with load_in_4bit: 4-bit weights cannot be trained, got false"
        )
    if options.lora_target_parameters:
        raise ValueError(
            "lora_target_parameters must be left out with load_in_4bit: PEFT adapts no 4-bit "
            f"parameter, got {options.lora_target_parameters}"
        )


def _check_block_size(options: RunOptions, diffusion: DiffusionConfig) -> None:
    """Every batch's length must be whole blocks."""
    block = diffusion.block_size
    if block is None:
        return
    lengths = {"multiple": options.pad_to_multiple_of, "max_length": options.max_length}
    length = lengths.get(options.padding)
    if length is None or length % block:
        raise ValueError(
            f"block_size must divide every batch's length, got block_size {block} and padding "
            f"{options.padding!r} to {length}: set padding to 'multiple' and pad_to_multiple_of to "
            "a multiple of block_size, or padding to 'max_length' and max_length likewise"
        )


def _check(config: Any, name: str, must: str, ok: Callable[[Any], bool]) -> None:
    value = getattr(config, name)
    if value is not None and not ok(value):
        raise ValueError(f"{name} must be {must}, got {value!r}")
