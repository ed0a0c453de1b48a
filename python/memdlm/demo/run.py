"""`memdlm demo`: MDLM and MemDLM fine-tuned on the same batches of real English, side by side.

Both arms start from the base that ships with the package, which has learned to copy. Long prompts
hide facts in real text and ask for them; the response is what the text says.
"""

import copy
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator
from memdlm.demo.examples import BASE_FOLDER, build_examples, load_tokenizer
from memdlm.demo.options import DemoOptions
from memdlm.demo.recall import recalls
from memdlm.evaluation.held_out import Adapt, no_memory
from memdlm.evaluation.nll import held_out_nll
from memdlm.objective import MDLMObjective, MemDLMObjective
from memdlm.prompt_memory import PromptMemory
from memdlm.report import write_report

BATCH_SIZE = 8
LENGTH = 256
LEARNING_RATE = 4e-4
WARMUP_STEPS = 10
MAX_GRAD_NORM = 1.0
RECALL_LENGTHS = (256, 512)
RECALL_EXAMPLES = 64
NLL_EXAMPLES = 64
# Each sequence counts the same: by tokens, the long continuations would drown the short answers.
DIFFUSION = DiffusionConfig(loss_norm="sequence")


@dataclass
class Arm:
    """One model in training.

    Attributes:
        objective: with the model inside.
        collator: makes its batches; the same masks for every arm.
        optimizer: over the model's parameters.
        step_ms: time of each training step, forward to optimiser.
    """

    objective: MDLMObjective
    collator: MaskCollator
    optimizer: torch.optim.Optimizer
    step_ms: list[float]


def run_demo(options: DemoOptions) -> dict[str, Any]:
    """Train both arms, evaluate, and write the report.

    Args:
        options: see `DemoOptions`.

    Returns:
        The summary that `summary.json` holds.

    Raises:
        ValueError: the folder cannot be written.
    """
    start = time.monotonic()
    out = Path(options.out)
    metrics = _open_metrics(out)
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer()
    base = AutoModelForCausalLM.from_pretrained(BASE_FOLDER, dtype=torch.float32)
    arms = _make_arms(base, tokenizer, options.seed)
    with metrics, tqdm(total=options.steps, desc="training both arms") as bar:
        results = {"base": _evaluate(base, tokenizer, "base")}
        for number, features in enumerate(_batches(options)):
            rate = _learning_rate(number, options.steps)
            losses = {name: _train_step(arm, features, rate) for name, arm in arms.items()}
            for name, loss in losses.items():
                row = {"step": number + 1, "arm": name, "loss": loss}
                row["step_ms"] = round(arms[name].step_ms[-1], 2)
                metrics.write(json.dumps(row) + "\n")
            bar.update()
            bar.set_postfix({name: f"{loss:.2f}" for name, loss in losses.items()})
    for name, arm in arms.items():
        results[name] = _evaluate(arm.objective.model, tokenizer, name)
    summary = {
        **dataclasses.asdict(options),
        "parameters": base.num_parameters(),
        "batch_size": BATCH_SIZE,
        "length": LENGTH,
        "recall_examples": RECALL_EXAMPLES,
        "inner_steps": MemoryConfig().inner_steps,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "results": results,
        "cost": _cost(arms),
        "seconds": round(time.monotonic() - start, 1),
    }
    write_report(out, summary)
    return summary


def _open_metrics(out: Path) -> TextIO:
    try:
        out.mkdir(parents=True, exist_ok=True)
        return (out / "metrics.jsonl").open("w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"out {out} cannot be written: {error.strerror}") from error


def _make_arms(base: nn.Module, tokenizer: PreTrainedTokenizerBase, seed: int) -> dict[str, Arm]:
    memory = MemoryConfig()
    mdlm, memdlm = copy.deepcopy(base), copy.deepcopy(base)
    return {
        "MDLM": _arm(MDLMObjective(mdlm, DIFFUSION), _collator(tokenizer, None, seed)),
        "MemDLM": _arm(
            MemDLMObjective(memdlm, DIFFUSION, memory), _collator(tokenizer, memory, seed)
        ),
    }


def _arm(objective: MDLMObjective, collator: MaskCollator) -> Arm:
    objective.train()
    optimizer = torch.optim.AdamW(objective.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    return Arm(objective, collator, optimizer, [])


def _collator(
    tokenizer: PreTrainedTokenizerBase, memory: MemoryConfig | None, seed: int
) -> MaskCollator:
    return MaskCollator(
        tokenizer.mask_token_id,
        tokenizer.pad_token_id,
        len(tokenizer),
        DIFFUSION,
        memory,
        seed=seed,
    )


def _batches(options: DemoOptions) -> Iterator[list[dict[str, Any]]]:
    """Features of each step; every example is seen once."""
    count = options.steps * BATCH_SIZE
    examples = build_examples("train", count, LENGTH, options.seed)
    for number, example in enumerate(examples):
        example.update(example=number, epoch=0)
    for first in range(0, count, BATCH_SIZE):
        yield examples[first : first + BATCH_SIZE]


def _learning_rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return LEARNING_RATE * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def _train_step(arm: Arm, features: Sequence[dict[str, Any]], rate: float) -> float:
    batch = arm.collator(features)
    start = time.perf_counter()
    for group in arm.optimizer.param_groups:
        group["lr"] = rate
    loss = arm.objective(batch).loss
    loss.backward()
    nn.utils.clip_grad_norm_(arm.objective.parameters(), MAX_GRAD_NORM)
    arm.optimizer.step()
    arm.optimizer.zero_grad()
    arm.step_ms.append(1e3 * (time.perf_counter() - start))
    return loss.item()


def _cost(arms: dict[str, Arm]) -> dict[str, Any]:
    """Step times and their ratio, step by step: the arms take turns on the same machine."""
    times = {name: arm.step_ms[1:] or arm.step_ms for name, arm in arms.items()}
    pairs = zip(times["MemDLM"], times["MDLM"], strict=True)
    return {
        "step_ms_p50": {name: round(statistics.median(own), 2) for name, own in times.items()},
        "ratio_p50": round(statistics.median(ours / plain for ours, plain in pairs), 3),
        "step_ms": {name: [round(ms, 2) for ms in own] for name, own in times.items()},
    }


def _evaluate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str
) -> dict[str, dict[str, float]]:
    """Held-out NLL and recall, without a memory and with one that each prompt writes."""
    training = model.training
    model.eval()
    ids: dict[str, Any] = {
        "mask_token_id": tokenizer.mask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    memory = PromptMemory(model, DIFFUSION, MemoryConfig(), vocab_size=len(tokenizer), **ids)
    examples = build_examples("validation", NLL_EXAMPLES, LENGTH, 2)
    figures: dict[str, dict[str, float]] = {}
    states: dict[str, Adapt] = {"memory off": no_memory, "memory on": memory.adapt}
    for state, adapt in tqdm(states.items(), desc=f"measuring {name}", leave=False):
        nll = held_out_nll(model, examples, adapt=adapt, batch_size=BATCH_SIZE, seed=1, **ids)
        own = {"nll": nll.mean().item()}
        own |= recalls(model, ids["mask_token_id"], adapt, RECALL_LENGTHS, RECALL_EXAMPLES)
        figures[state] = {measure: round(value, 4) for measure, value in own.items()}
    memory.detach()
    model.train(training)
    return figures
