"""docs/first_order.md says what its rows say: tables are made again from what is committed."""

import json
import re
import statistics
from pathlib import Path

from memdlm.ablation.grid import make_cells, read_grid
from memdlm.ablation.report import ablation_table
from memdlm.ablation.task import base_keys
from memdlm.meta_bias.report import meta_bias_report

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "first_order.md").read_text(encoding="utf-8")


def rows_of(name):
    lines = (DOCS / "first_order" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_tables_of_the_bias_are_those_of_the_command():
    report = meta_bias_report(rows_of("meta_bias"))
    tables = re.findall(r"(?:^\|.*\n?)+", report, flags=re.MULTILINE)
    assert len(tables) == 3
    for table in tables:
        assert table.strip() in PAGE


def test_the_tables_of_the_runs_are_made_of_committed_rows():
    grid = read_grid(str(DOCS / "first_order.yaml"), {})
    cells = make_cells(grid, base_keys(grid))
    for ablation in grid.ablations:
        assert "\n".join(ablation_table(ablation, cells, rows_of("runs"))) in PAGE
        assert f"(first_order/{ablation}.png)" in PAGE


def training_table(rows):
    """The Trainer's losses, means over seeds and over the steps since the one before."""
    steps = list(dict.fromkeys(row["step"] for row in rows))
    head = ["training loss", *(f"to step {step}" for step in steps)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for run in dict.fromkeys((row["inner_lr"], row["meta_gradient"]) for row in rows):
        own = [row for row in rows if (row["inner_lr"], row["meta_gradient"]) == run]
        means = [statistics.fmean(r["loss"] for r in own if r["step"] == step) for step in steps]
        name = f"inner_lr {run[0]}, meta_gradient {run[1]}"
        lines.append("| " + " | ".join([name, *(f"{mean:.3f}" for mean in means)]) + " |")
    return "\n".join(lines)


def test_the_training_losses_are_those_of_committed_rows():
    assert training_table(rows_of("training")) in PAGE


def test_the_checkpoints_are_of_a_run_that_a_file_describes():
    grid = read_grid(str(DOCS / "first_order_run.yaml"), {})
    (cell,) = make_cells(grid, base_keys(grid))
    assert cell.model_name in PAGE
    assert grid.out in PAGE


def test_every_picture_is_there():
    pictures = re.findall(r"!\[[^]]*\]\(first_order/(\S+)\)", PAGE)
    assert len(pictures) == 4
    for picture in pictures:
        assert (DOCS / "first_order" / picture).is_file()
