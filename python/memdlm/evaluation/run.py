"""`memdlm eval`: arms of one model side by side on long-context probes."""

import contextlib
import dataclasses
import datetime
import gc
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from memdlm.checkpoint import METHOD_FILE
from memdlm.evaluation.arm import Arm, read_positions
from memdlm.evaluation.harness import check_harness, run_harness
from memdlm.evaluation.held_out import Adapt, no_memory
from memdlm.evaluation.options import EvalOptions
from memdlm.evaluation.records import Records, settings_hash
from memdlm.evaluation.report import write_report
from memdlm.evaluation.scoring import score
from memdlm.evaluation.tasks import ANSWER_TOKENS, Example, build
from memdlm.inference import Checkpoint, load_checkpoint, read_tokenizer
from memdlm.prompt_memory import PromptMemory
from memdlm.sampler import Sampler, SamplerConfig, sampler_config


def run_eval(options: EvalOptions) -> str:
    """Ask every arm, and write answers, table, summary and heat map.

    A run that is killed goes on where it was: answers that are there are not made again. A length
    that a model has no positions for is left out, with the reason in the table.

    Args:
        options: see `EvalOptions`.

    Returns:
        The table, Markdown.

    Raises:
        ValueError: before any answer, a folder without a readable model, a `model` that was trained
            without a memory, arms of which only some have a chat template while `chat` is not
            given, sampler options that do not go together, a length that cannot hold a task or that
            its words cannot fill, `lm_eval` without the harness or with a task that it does not
            have, or an `out` with answers of other settings.
    """
    arms = make_arms(options)
    configs = {task: _config(options, task) for task in options.task_names}
    folders = list(dict.fromkeys(arm.folder for arm in arms))
    positions = {folder: read_positions(folder) for folder in folders}
    tokenizers = {folder: read_tokenizer(folder) for folder in folders}
    options = dataclasses.replace(options, chat=_resolve_chat(options, tokenizers))
    for folder in folders:
        _check_lengths(options, tokenizers[folder], positions[folder], configs)
    check_harness(options, arms)
    records = Records(options.out, _settings(options), arms)
    try:
        for folder in folders if options.task_names else []:
            own = [arm for arm in arms if arm.folder == folder]
            _ask_arms(options, own, positions[folder], configs, records)
            gc.collect()
        for arm in arms if options.harness_tasks else []:
            # A task may take hours: a kill leaves what there is.
            write_report(records)
            run_harness(options, arm)
            gc.collect()
    finally:
        # What was measured before an error or an interrupt is in the table too.
        table = write_report(records)
    return table


def make_arms(options: EvalOptions) -> list[Arm]:
    """The arms that are asked for.

    Raises:
        ValueError: `model` was trained without a memory.
    """
    arms = []
    if options.base is not None:
        arms.append(Arm("base", options.base))
    if options.plain is not None:
        arms.append(Arm("MDLM", options.plain))
    if options.model is not None:
        path = Path(options.model) / METHOD_FILE
        method = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if method.get("memory") is None:
            raise ValueError(
                f"model must have been trained with a memory, which its {METHOD_FILE} says, got "
                f"{options.model}: give it as plain or as base"
            )
        arms.append(Arm("train-only", options.model))
        arms.append(Arm("train & inference", options.model, memory=True))
    return arms


def _config(options: EvalOptions, task: str) -> SamplerConfig:
    """The sampler's options for a task."""
    room = ANSWER_TOKENS[task] if options.max_new_tokens is None else options.max_new_tokens
    own = {"max_new_tokens": room, "seed": options.seed}
    config = sampler_config({**options.sampler, **own})
    config.steps_of_block(config.block_length)
    return config


def _resolve_chat(options: EvalOptions, tokenizers: dict[str, PreTrainedTokenizerBase]) -> bool:
    """Whether all the arms are asked through their chat template: all in one way."""
    have = {folder: t.chat_template is not None for folder, t in tokenizers.items()}
    without = [folder for folder, has_template in have.items() if not has_template]
    if options.chat and without:
        raise ValueError(
            f"chat must be false: the tokenizer of {without[0]} has no chat template, got true"
        )
    if options.chat is None and len(set(have.values())) > 1:
        raise ValueError(
            "chat must be given as false, or arms would be asked in different ways: the tokenizer "
            f"of {without[0]} has no chat template, another arm's has one"
        )
    return not without if options.chat is None else options.chat


def _check_lengths(
    options: EvalOptions,
    tokenizer: PreTrainedTokenizerBase,
    positions: int,
    configs: dict[str, SamplerConfig],
) -> None:
    """Make examples of every length that fits: fails where one cannot hold or fill its task."""
    lengths = [length for length in options.token_lengths if length <= positions]
    for task, config in configs.items():
        for length in lengths:
            # The shortest is where one of many examples may not fit.
            count = options.count if length == lengths[0] else 1
            _build(options, tokenizer, task, length, count, config)


def _build(
    options: EvalOptions,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    length: int,
    count: int,
    config: SamplerConfig,
) -> list[Example]:
    return build(
        task,
        tokenizer,
        length,
        count,
        options.seed,
        answer_tokens=config.max_new_tokens,
        chat=bool(options.chat),
    )


def _settings(options: EvalOptions) -> dict[str, Any]:
    """What answers depend on, besides model, task, length and number."""
    names = "seed chat dtype load_in_4bit budget_gib max_new_tokens sampler".split()
    return {name: getattr(options, name) for name in names}


def _ask_arms(
    options: EvalOptions,
    arms: Sequence[Arm],
    positions: int,
    configs: dict[str, SamplerConfig],
    records: Records,
) -> None:
    """Ask the arms of one checkpoint everything that has no answer yet."""
    cells = [(task, length) for task in options.task_names for length in options.token_lengths]
    fitting = []
    for task, length in cells:
        if length <= positions:
            fitting.append((task, length))
            continue
        for arm in arms:
            records.skip(arm, length, f"does not fit: the model has {positions:,} positions")
    missing = {
        (arm, cell): records.missing(arm, *cell, options.count) for arm in arms for cell in fitting
    }
    if not any(missing.values()):
        return
    checkpoint = load_checkpoint(
        arms[0].folder,
        dtype=options.dtype,
        device=options.device,
        load_in_4bit=options.load_in_4bit,
    )
    with contextlib.ExitStack() as stack:
        adapts: dict[Arm, Adapt] = {}
        for arm in arms:
            adapts[arm] = no_memory
            if arm.memory:
                memory = PromptMemory.of(
                    checkpoint, seed=options.seed, budget_gib=options.budget_gib
                )
                stack.callback(memory.detach)
                adapts[arm] = memory.adapt
        bar = stack.enter_context(tqdm(total=sum(map(len, missing.values())), desc="answers"))
        for task, length in fitting:
            examples: list[Example] = []
            for arm in arms:
                wanted = missing[arm, (task, length)]
                if not wanted:
                    continue
                bar.set_postfix_str(f"{arm.name}, {task}, {length:,} tokens")
                examples = examples or _build(
                    options, checkpoint.tokenizer, task, length, options.count, configs[task]
                )
                asked = [examples[index] for index in wanted]
                for rows in _answers(options, checkpoint, adapts[arm], asked, configs[task]):
                    arm_keys = {"arm": arm.name, "model": arm.folder}
                    records.add([arm_keys | row for row in rows])
                    bar.update(len(rows))


def _answers(
    options: EvalOptions,
    checkpoint: Checkpoint,
    adapt: Adapt,
    examples: Sequence[Example],
    config: SamplerConfig,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each batch, as soon as it is answered."""
    sampler = Sampler.of(checkpoint)
    for first in range(0, len(examples), options.batch_size):
        batch = examples[first : first + options.batch_size]
        prompts = [example.prompt_ids for example in batch]
        start = time.perf_counter()
        with adapt(prompts):
            written = sampler.generate(prompts, config, seeds=[_seed(options, e) for e in batch])
        seconds = (time.perf_counter() - start) / len(batch)
        texts: list[Any] = [
            checkpoint.tokenizer.decode(response, skip_special_tokens=True)
            for response in written.responses
        ]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        yield [
            {
                "task": example.task,
                "length": example.length,
                "index": example.index,
                "seed": options.seed,
                "prompt_tokens": len(example.prompt_ids),
                "prediction": text,
                "references": example.references,
                "score": score(example, text),
                "seconds": round(seconds, 4),
                "sampler": settings_hash(dataclasses.asdict(config)),
                "time": now,
            }
            for example, text in zip(batch, texts, strict=True)
        ]


def _seed(options: EvalOptions, example: Example) -> int:
    """An example's own draws, whatever batch it is in."""
    return zlib.crc32(f"{options.seed}/{example.task}/{example.length}/{example.index}".encode())
