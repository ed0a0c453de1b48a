"""`memdlm train`: from a checked run to a trained model in its output folder."""

import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)

from memdlm.backbone import ATTENTION_PROJECTIONS, FAMILIES, FFN_PROJECTIONS, check_blocks
from memdlm.checkpoint import check_resumable, last_checkpoint
from memdlm.data.collator import MaskCollator
from memdlm.data.dataset import load_examples, prepare_examples
from memdlm.evaluation.callback import ExposureBiasCallback
from memdlm.evaluation.exposure_bias import check_canvas
from memdlm.evaluation.held_out import check_prompts
from memdlm.experts import PROJECTIONS as STACKED
from memdlm.four_bit import four_bit_config, prepare_four_bit
from memdlm.inference import first_line, known_mask_token
from memdlm.objective import MDLMObjective, MemDLMObjective
from memdlm.options import Run, RunOptions
from memdlm.sdpa import check_sdpa_backend, set_sdpa_backend
from memdlm.trainer import MemDLMTrainer


def train(run: Run) -> dict[str, float]:
    """Train, evaluate and save. Everything that can be wrong is looked at before the model loads.

    Args:
        run: from `make_run`.

    Returns:
        The last evaluation's metrics; empty without evaluation data.

    Raises:
        ValueError: an output folder that cannot be written or holds another run, a model, tokenizer
            or data set that cannot be used, a checkpoint that is not this run's.
    """
    options, arguments = run.options, run.arguments
    check_sdpa_backend(options.sdpa_backend, arguments.device)
    output_dir = str(arguments.output_dir)
    resume_from = _resume_folder(options, output_dir)
    _check_output(output_dir, resume_from)
    config, tokenizer = _load_description(options)
    collator = _collator(run, config, tokenizer)
    lora = _lora_config(options, config)
    if resume_from is not None:
        check_resumable(resume_from, collator, config, lora)
    train_examples, eval_examples = _load_data(run, config, tokenizer)

    measured = _measured_examples(run, eval_examples)

    set_seed(arguments.seed)  # the outer LoRA is drawn before the Trainer seeds
    model = _load_model(options, config, lora)
    if run.memory is None:
        objective = MDLMObjective(model, run.diffusion)
    else:
        objective = MemDLMObjective(model, run.diffusion, run.memory)
    trainer = MemDLMTrainer(
        objective,
        arguments,
        collator,
        train_examples,
        eval_examples,
        memory_gap_steps=options.memory_gap_steps,
        processing_class=tokenizer,
    )
    if measured:
        batch_size = arguments.per_device_eval_batch_size
        trainer.add_callback(ExposureBiasCallback(trainer, collator, measured, batch_size))
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model()
    trainer.save_state()
    return {} if eval_examples is None else trainer.evaluate()


def _measured_examples(run: Run, examples: datasets.Dataset | None) -> list[dict[str, Any]]:
    """The examples whose exposure bias is measured at each evaluation."""
    count = run.options.exposure_bias_examples
    if examples is None or count == 0:
        return []
    check_canvas(run.diffusion.block_size)
    measured = [dict(example) for example in examples.select(range(min(count, len(examples))))]
    if run.memory is not None:
        check_prompts(measured)
    return measured


def _resume_folder(options: RunOptions, output_dir: str) -> str | None:
    wanted = options.resume_from_checkpoint
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        return last_checkpoint(output_dir)
    return wanted


def _check_output(output_dir: str, resume_from: str | None) -> None:
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {output_dir} cannot be written: {error.strerror}") from error
    if resume_from is None and any(folder.glob("checkpoint-*")):
        raise ValueError(
            f"output_dir {output_dir} holds checkpoints of an earlier run: choose another folder, "
            "or set resume_from_checkpoint"
        )


def _load_description(options: RunOptions) -> tuple[Any, PreTrainedTokenizerBase]:
    try:
        config = AutoConfig.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {options.model} cannot be read: {first_line(error)}") from error
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model must be one of {', '.join(FAMILIES)}, got {options.model}, whose model_type is "
            f"{config.model_type!r}"
        )
    return config, tokenizer


def _collator(run: Run, config: Any, tokenizer: PreTrainedTokenizerBase) -> MaskCollator:
    options = run.options
    check_blocks(config, run.diffusion.block_size)
    mask = _mask_token_id(options, config, tokenizer)
    pad = tokenizer.pad_token_id
    return MaskCollator(
        mask_token_id=mask,
        # Padding is neither seen nor masked, so any token serves.
        pad_token_id=mask if pad is None else pad,
        vocab_size=config.vocab_size,
        diffusion=run.diffusion,
        memory=run.memory,
        seed=run.arguments.seed,
        pad_to_multiple_of=options.pad_to_multiple_of if options.padding == "multiple" else 1,
        max_padding=_max_length(options, config) if options.padding == "max_length" else None,
        right_shift_logits=bool(getattr(config, "right_shift_logits", False)),
    )


def _mask_token_id(options: RunOptions, config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    if options.mask_token_id is not None:
        return options.mask_token_id
    if options.mask_token is not None:
        vocabulary = tokenizer.get_vocab()
        if options.mask_token not in vocabulary:
            raise ValueError(f"mask_token {options.mask_token!r} is not a token of {options.model}")
        return vocabulary[options.mask_token]
    known = known_mask_token(config, tokenizer)
    if known is not None:
        return known
    raise ValueError(
        f"{options.model} has no mask token, in its config or its tokenizer: set mask_token or "
        "mask_token_id"
    )


def _max_length(options: RunOptions, config: Any) -> int:
    return options.max_length or config.max_position_embeddings


def _load_data(
    run: Run, config: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    options = run.options

    def prepare(name: str, examples: datasets.Dataset, most: int | None) -> datasets.Dataset:
        if most is not None:
            examples = examples.select(range(min(most, len(examples))))
        return prepare_examples(
            name,
            examples,
            tokenizer,
            config.vocab_size,
            _max_length(options, config),
            options.truncation,
        )

    training = load_examples(options.dataset, options.dataset_split)
    evaluation = None
    evaluation_name = options.eval_dataset or options.dataset
    if options.eval_dataset is not None:
        evaluation = load_examples(options.eval_dataset, options.dataset_split)
    elif options.eval_fraction is not None:
        if len(training) < 2:
            raise ValueError("eval_fraction needs a dataset of at least 2 examples, got 1")
        held_out = min(max(1, round(options.eval_fraction * len(training))), len(training) - 1)
        parts = training.train_test_split(test_size=held_out, seed=run.arguments.seed)
        training, evaluation = parts["train"], parts["test"]
    if evaluation is not None:
        evaluation = prepare(evaluation_name, evaluation, options.max_eval_examples)
    return prepare(options.dataset, training, options.max_train_examples), evaluation


def _load_model(options: RunOptions, config: Any, lora: LoraConfig | None) -> nn.Module:
    placed: dict[str, Any] = {}
    if options.load_in_4bit:
        own = config.dtype or torch.float32
        dtype = own if options.dtype == "auto" else getattr(torch, options.dtype)
        # Weights are quantised on the device that they stay on.
        placed["device_map"] = {"": PartialState().device}
        placed["quantization_config"] = four_bit_config(dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.model,
            dtype=options.dtype,
            attn_implementation=options.attn_implementation,
            **placed,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model {options.model} cannot be loaded: {first_line(error)}") from error
    if lora is not None:
        model = get_peft_model(model, lora)
    if options.load_in_4bit:
        prepare_four_bit(model)
    set_sdpa_backend(model, options.sdpa_backend)
    return model


def _lora_config(options: RunOptions, config: Any) -> LoraConfig | None:
    if not options.lora:
        return None
    modules, stacked = options.lora_targets, options.lora_target_parameters
    if modules is None:
        modules = [*ATTENTION_PROJECTIONS, *FFN_PROJECTIONS]
    if stacked is None and not options.load_in_4bit and getattr(config, "num_experts", None):
        stacked = [f"experts.{name}" for name in STACKED]
    if not modules and not stacked:
        raise ValueError(
            "lora_targets must name a layer where no stacked parameter gets the LoRA, got []"
        )
    if stacked and options.lora_dropout:
        raise ValueError(
            "lora_dropout must be 0 where stacked experts get a LoRA, got "
            f"{options.lora_dropout}: an empty lora_target_parameters leaves them out"
        )
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_scaling * options.lora_rank,  # type: ignore[arg-type]
        lora_dropout=options.lora_dropout,
        target_modules=modules,
        target_parameters=stacked or None,
        base_model_name_or_path=options.model,
        task_type="CAUSAL_LM",
    )
