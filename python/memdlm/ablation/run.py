"""`memdlm ablate`: train and measure what a grid asks for; what is done already stays."""

import dataclasses
import gc
import json
import shutil
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from memdlm.ablation.grid import INFERENCE_KEYS, Cell, Grid, make_cells
from memdlm.ablation.report import write_report
from memdlm.ablation.task import base_keys, held_out_examples, measure, sources
from memdlm.evaluation.held_out import Adapt, no_memory
from memdlm.inference import load_checkpoint
from memdlm.options import make_run
from memdlm.prompt_memory import PromptMemory
from memdlm.training import train

ROWS_FILE = "rows.jsonl"
_DONE_FILE = "trained.json"
_MEASURES_FILE = "measures.json"


def run_grid(grid: Grid) -> str:
    """Run a grid, and write rows, tables and pictures into its folder.

    A run that is killed goes on where it was: models and rows that are there are not made again.

    Args:
        grid: what to run.

    Returns:
        The tables, Markdown.

    Raises:
        ValueError: before any training, a cell that `memdlm train` would refuse; a folder that
            cannot be written, or that holds the rows of a grid that measures otherwise.
    """
    cells = make_cells(grid, base_keys(grid))
    out = Path(grid.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {out} cannot be written: {error.strerror}") from error
    rows = read_rows(out)
    if rows:
        _check_same_measures(grid, out)
    (out / _MEASURES_FILE).write_text(json.dumps(_measures(grid), indent=2) + "\n")
    done = {(row["model"], row["prompt_ratio"]) for row in rows}
    try:
        with tqdm(total=len(cells), desc="cells") as bar:
            for cell in cells:
                key = (cell.model_name, cell.prompt_ratio)
                if key not in done:
                    bar.set_postfix_str(f"{cell.ablation} {cell.values}, seed {cell.seed}")
                    _train(cell, out)
                    rows += _measure(grid, cell, out)
                    done.add(key)
                bar.update()
    finally:
        # Of what there is, should a cell fail or somebody lose patience.
        report = write_report(out, grid, cells, rows)
    return report


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a grid's folder, whole ones: a kill may have cut the last."""
    path = out / ROWS_FILE
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _measures(grid: Grid) -> dict[str, Any]:
    names = ("examples", "exposure_bias", "recall_lengths", "recall_examples")
    return {name: getattr(grid, name) for name in names}


def _check_same_measures(grid: Grid, out: Path) -> None:
    """Rows of other measures beside these would be compared with them."""
    theirs = json.loads((out / _MEASURES_FILE).read_text())
    for name, value in _measures(grid).items():
        if theirs.get(name) != value:
            raise ValueError(
                f"out {out} holds rows that were measured with {name} {theirs.get(name)}, got "
                f"{value}: choose another folder"
            )


def _train(cell: Cell, out: Path) -> None:
    folder = out / "models" / cell.model_name
    if (folder / _DONE_FILE).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    keys = cell.training | sources(cell, out) | {"output_dir": str(folder)}
    start = time.monotonic()
    train(make_run(keys))
    seconds = round(time.monotonic() - start, 1)
    (folder / _DONE_FILE).write_text(json.dumps({"keys": keys, "seconds": seconds}) + "\n")
    gc.collect()


def _measure(grid: Grid, cell: Cell, out: Path) -> list[dict[str, Any]]:
    """Measure a trained model, memory off and, if it was trained with one, on."""
    folder = out / "models" / cell.model_name
    checkpoint = load_checkpoint(str(folder))
    examples = held_out_examples(grid, checkpoint)
    rows = []
    states: dict[str, Adapt] = {"off": no_memory}
    memory = None
    if checkpoint.memory is not None:
        asked = {key: cell.keys[key] for key in INFERENCE_KEYS if key in cell.keys}
        adapted = dataclasses.replace(checkpoint.memory, **asked)
        memory = PromptMemory.of(dataclasses.replace(checkpoint, memory=adapted), seed=cell.seed)
        states["on"] = memory.adapt
    for state, adapt in states.items():
        figures = measure(grid, checkpoint, examples, adapt)
        rows.append(
            {
                "model": cell.model_name,
                "prompt_ratio": cell.prompt_ratio,
                "seed": cell.seed,
                "memory": state,
                "keys": cell.keys,
                **figures,
            }
        )
    if memory is not None:
        memory.detach()
    # Together, so that a row says that its model was measured in full.
    path = out / ROWS_FILE
    kept = read_rows(out) if path.exists() else []
    written = path.with_suffix(".part")
    written.write_text("".join(json.dumps(row) + "\n" for row in kept + rows))
    written.rename(path)
    return rows
