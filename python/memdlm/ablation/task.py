"""What the runs of a grid train on and are measured on: the demo's task, or data of one's own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from memdlm.ablation.grid import Cell, Grid
from memdlm.data.dataset import load_examples, prepare_examples
from memdlm.demo.examples import BASE_FOLDER, build_examples, check_demo_tokenizer
from memdlm.demo.recall import recalls
from memdlm.evaluation.exposure_bias import exposure_bias
from memdlm.evaluation.held_out import Adapt
from memdlm.evaluation.nll import held_out_nll
from memdlm.inference import Checkpoint

# The demo's run, as keys of `memdlm train`; `sources` puts its model and data in the place of DEMO.
DEMO = "demo"
DEMO_LENGTH = 256
DEMO_RUN: dict[str, Any] = {
    "model": DEMO,
    "dataset": DEMO,
    "dtype": "float32",
    "loss_norm": "sequence",
    "max_steps": 300,
    "per_device_train_batch_size": 8,
    "learning_rate": 4e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 50,
}
DEMO_RECALL_LENGTHS = (256, 512)


def base_keys(grid: Grid) -> dict[str, Any]:
    """The keys that a grid's runs start from."""
    return dict(DEMO_RUN) if grid.on_demo else {"save_strategy": "no", "report_to": "none"}


def sources(cell: Cell, out: Path) -> dict[str, Any]:
    """Keys that say what a run trains, and on what; the demo's examples are written to a file.

    Args:
        cell: the run.
        out: the grid's folder.

    Returns:
        `model` and `dataset`, where they are the demo's.

    Raises:
        ValueError: the demo's examples for a model with another tokenizer.
    """
    found = {"model": str(BASE_FOLDER)} if cell.keys["model"] == DEMO else {}
    if cell.keys["dataset"] != DEMO:
        return found
    if not found:
        model = cell.keys["model"]
        check_demo_tokenizer(AutoTokenizer.from_pretrained(model), model)
    count = cell.keys["max_steps"] * cell.keys["per_device_train_batch_size"]
    count *= cell.keys.get("gradient_accumulation_steps", 1)
    path = out / "data" / f"train-{count}-{cell.seed}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        examples = build_examples("train", count, DEMO_LENGTH, cell.seed)
        rows = ({key: each[key] for key in ("input_ids", "labels")} for each in examples)
        written = path.with_suffix(".part")
        written.write_text("".join(json.dumps(row) + "\n" for row in rows))
        written.rename(path)
    return found | {"dataset": str(path)}


def held_out_examples(grid: Grid, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The examples that every run of a grid is measured on."""
    if grid.on_demo:
        return build_examples("validation", grid.examples, DEMO_LENGTH, 2)
    name = grid.run["eval_dataset"]
    loaded = load_examples(name, grid.run.get("dataset_split", "train"))
    prepared = prepare_examples(
        name,
        loaded.select(range(min(grid.examples, len(loaded)))),
        checkpoint.tokenizer,
        checkpoint.model.config.vocab_size,
        grid.run.get("max_length") or checkpoint.max_length,
    )
    return [dict(example) for example in prepared]


def measure(
    grid: Grid, checkpoint: Checkpoint, examples: Sequence[dict[str, Any]], adapt: Adapt
) -> dict[str, Any]:
    """All figures of one trained model, with a memory or without.

    Args:
        grid: says what is measured.
        checkpoint: the model.
        examples: from `held_out_examples`.
        adapt: `no_memory`, or `PromptMemory.adapt`.

    Returns:
        "nll" in nats per token, and `nll_of_examples` [n], whose mean it is; "R" and "R_exposure",
        the exposure bias, mean over the mask ratios below 1; "recall_256_one" and so on, shares.
    """
    ids: dict[str, Any] = {
        "mask_token_id": checkpoint.mask_token_id,
        "pad_token_id": checkpoint.pad_token_id,
    }
    block = checkpoint.diffusion.block_size
    nll = held_out_nll(checkpoint.model, examples, block_size=block, adapt=adapt, seed=1, **ids)
    figures = {"nll": nll.mean().item()}
    if grid.exposure_bias:
        curve = exposure_bias(checkpoint.model, examples, adapt=adapt, seed=1, **ids)
        for name, over in (("R", "static"), ("R_exposure", "remaining")):
            figures[name] = curve.ratio(over)[0][1:].mean().item()
    if grid.on_demo:
        lengths = DEMO_RECALL_LENGTHS if grid.recall_lengths is None else grid.recall_lengths
        figures |= recalls(
            checkpoint.model, checkpoint.mask_token_id, adapt, lengths, grid.recall_examples
        )
    rounded = {name: round(value, 6) for name, value in figures.items()}
    return rounded | {"nll_of_examples": [round(value, 6) for value in nll.tolist()]}
