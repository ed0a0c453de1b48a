"""Tables, summary and heat map of an evaluation, from its answers."""

import collections
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from memdlm.evaluation.harness import read_harness
from memdlm.evaluation.records import Records
from memdlm.evaluation.tasks import TASKS

ARMS = ("base", "MDLM", "train-only", "train & inference")
_GAIN = ("train & inference", "train-only")
_DARK = 0.55
_COLUMNS = 2


class Cell(NamedTuple):
    """The scores of an arm in a task at a length, in percent.

    Attributes:
        mean: of the scores.
        error: the standard error of the mean; None where all scores are the same: they do not say
            how far others may be.
        examples: how many scores there are.
        seconds: that an example took, on average.
    """

    mean: float
    error: float | None
    examples: int
    seconds: float


Cells = dict[tuple[str, str, int], Cell]


def make_cells(rows: Sequence[dict[str, Any]]) -> Cells:
    """Mean scores, by (arm, task, length).

    The standard error is the normal one, s / sqrt(n); for right or wrong, s is the binomial's
    sqrt(p (1 - p) n / (n - 1)).

    Args:
        rows: of examples.jsonl.

    Returns:
        dict to Cell.
    """
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["arm"], row["task"], row["length"]].append(row)
    cells = {}
    for key, group in groups.items():
        scores = [100 * row["score"] for row in group]
        seconds = statistics.fmean(row["seconds"] for row in group)
        cells[key] = Cell(statistics.fmean(scores), _error(scores), len(scores), seconds)
    return cells


def _error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(set(values)) > 1 else None


def _figure(mean: float, error: float | None, sign: str = "") -> str:
    return f"{mean:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")


def write_report(records: Records) -> str:
    """Write table.md, summary.json and heatmap.png of all the answers that a folder holds.

    Args:
        records: the answers.

    Returns:
        The table, Markdown.
    """
    cells = make_cells(records.rows)
    harness = read_harness(records.folder)
    reasons = {(skip["arm"], skip["length"]): skip["reason"] for skip in records.skipped}
    arms = [arm for arm in ARMS if arm in {key[0] for key in [*cells, *reasons]}]
    lengths = sorted({key[-1] for key in [*cells, *reasons]})
    tasks = [task for task in TASKS if task in {key[1] for key in cells}]
    parts = ["# Long-context probes"]
    for task in tasks:
        parts.append(_task_table(task, arms, lengths, cells, reasons))
    if not tasks and reasons:
        parts.append(
            "\n".join(f"{arm}, {length:,}: {why}" for (arm, length), why in reasons.items())
        )
    gain = _gain_table(records.rows, tasks, lengths)
    parts += [gain] if gain else []
    if reasons:
        lines = [f"- {arm}, {length:,} tokens: {why}." for (arm, length), why in reasons.items()]
        parts.append("## What was left out\n\n" + "\n".join(lines))
    parts += [_runs_table(records, arms)] if cells else []
    if harness:
        parts.append(_harness_table(harness))
    table = "\n\n".join(parts)
    (records.folder / "table.md").write_text(table + "\n", encoding="utf-8")
    summary = {
        "settings": records.settings,
        "cells": [
            {"arm": arm, "task": task, "length": length, **cell._asdict()}
            for (arm, task, length), cell in cells.items()
        ],
        "skipped": records.skipped,
        "lm_eval": harness,
    }
    text = json.dumps(summary, indent=2)
    (records.folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    if cells:
        _draw(records.folder / "heatmap.png", arms, tasks, lengths, cells, reasons)
    return table


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _task_table(
    task: str,
    arms: Sequence[str],
    lengths: Sequence[int],
    cells: Cells,
    reasons: dict[tuple[str, int], str],
) -> str:
    lines = []
    for arm in arms:
        counts = [cells[arm, task, n].examples for n in lengths if (arm, task, n) in cells]
        line = [arm, _counts(counts)]
        for length in lengths:
            cell = cells.get((arm, task, length))
            missing = reasons.get((arm, length), "").partition(":")[0]
            line.append(_figure(cell.mean, cell.error) if cell else missing)
        lines.append(line)
    title = f"## {task}: percent right, ± standard error"
    return f"{title}\n\n{_markdown(_head(lengths), lines)}"


def _head(lengths: Sequence[int]) -> list[str]:
    return ["", "examples", *(f"{length:,}" for length in lengths)]


def _counts(counts: Sequence[int]) -> str:
    """How many examples a row has, one number where all its lengths have as many."""
    return ", ".join(map(str, counts if len(set(counts)) > 1 else counts[:1]))


def _gain_table(
    rows: Sequence[dict[str, Any]], tasks: Sequence[str], lengths: Sequence[int]
) -> str | None:
    """What the memory adds at inference, example by example."""
    scores = {
        (row["arm"], row["task"], row["length"], row["index"]): 100 * row["score"] for row in rows
    }
    on, off = _GAIN
    gains = collections.defaultdict(list)
    for (arm, *where), value in scores.items():
        beside = scores.get((off, *where))
        if arm == on and beside is not None:
            gains[where[0], where[1]].append(value - beside)
    if not gains:
        return None
    lines = []
    for task in tasks:
        line = [task, _counts([len(gains[task, n]) for n in lengths if (task, n) in gains])]
        for length in lengths:
            values = gains.get((task, length))
            mean_gain = statistics.fmean(values) if values else 0.0
            line.append(_figure(mean_gain, _error(values), "+") if values else "")
        lines.append(line)
    title = f"## {on} minus {off}: the same examples, paired"
    return f"{title}\n\n{_markdown(_head(lengths), lines)}"


def _runs_table(records: Records, arms: Sequence[str]) -> str:
    """Which model made which answers, and when."""
    lines = []
    for arm in arms:
        own = [row for row in records.rows if row["arm"] == arm]
        if own:
            times = sorted(row["time"] for row in own)
            seconds = statistics.fmean(row["seconds"] for row in own)
            lines.append(
                [arm, own[0]["model"], str(len(own)), f"{seconds:.2f}", times[0], times[-1]]
            )
    head = ["", "model", "examples", "seconds each", "first", "last"]
    given = {key: value for key, value in records.settings.items() if value not in (None, {})}
    settings = ", ".join(f"{key} {value}" for key, value in given.items())
    return f"## What ran\n\n{_markdown(head, lines)}\n\nWith {settings}."


def _draw(
    path: Path,
    arms: Sequence[str],
    tasks: Sequence[str],
    lengths: Sequence[int],
    cells: Cells,
    reasons: dict[tuple[str, int], str],
) -> None:
    """One panel for each arm, tasks by lengths, all on one scale of colours from 0 to 100."""
    columns = min(len(arms), _COLUMNS)
    rows = math.ceil(len(arms) / columns)
    width, height = max(2.6, 0.75 * len(lengths)), max(1.8, 0.5 * len(tasks) + 1)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width * columns + 1.6, height * rows),
        squeeze=False,
        layout="constrained",
    )
    colours = plt.get_cmap("viridis").with_extremes(bad="#e4e4e4")
    images = []
    for panel in axes.flat[len(arms) :]:
        panel.set_axis_off()
    for panel, arm in zip(axes.flat, arms, strict=False):
        found = [[cells.get((arm, task, length)) for length in lengths] for task in tasks]
        means = [[cell.mean if cell else math.nan for cell in row] for row in found]
        images.append(panel.imshow(means, vmin=0, vmax=100, cmap=colours, aspect="auto"))
        for y, row in enumerate(found):
            for x, cell in enumerate(row):
                missing = reasons.get((arm, lengths[x]), "").partition(":")[0].replace(" ", "\n")
                panel.text(
                    x,
                    y,
                    f"{cell.mean:.0f}" if cell else missing,
                    ha="center",
                    va="center",
                    fontsize=9 if cell else 6,
                    color="white" if cell and cell.mean < 100 * _DARK else "black",
                )
        panel.set_title(arm)
        panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
        panel.set_yticks(range(len(tasks)), tasks)
        panel.set_xlabel("tokens")
    figure.colorbar(images[0], ax=axes.ravel().tolist(), label="percent right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def _harness_table(harness: Sequence[dict[str, Any]]) -> str:
    """Every metric that lm-evaluation-harness gave, arm by arm; other numbers of examples apart."""
    found: dict[tuple[str, str, str], dict[str, str]] = collections.defaultdict(dict)
    notes = []
    for run in harness:
        arm, asked = run["arm"], run["asked"]
        if "left_out" in run:
            notes.append(f"- {arm}, {asked['task']}: left out, {run['left_out']}.")
        for task, metrics in run["results"].items():
            # A group has tasks, not examples.
            count = str(metrics.get("sample_len", f"{asked['limit']} each"))
            for name, value in metrics.items():
                metric, _, rule = name.partition(",")
                error = metrics.get(f"{metric}_stderr,{rule}")
                # -1 is what the harness gives where it has no score, for one of RULER's lengths.
                measured = rule and isinstance(value, int | float) and value != -1
                if metric.endswith("_stderr") or not measured:
                    continue
                known = isinstance(error, int | float)
                figure = f"{value:.4f}" + (f" ± {error:.4f}" if known else "")
                found[task, metric, count][arm] = figure
    arms = [arm for arm in ARMS if arm in {run["arm"] for run in harness}]
    lines = [
        [*key, *(by_arm.get(arm, "") for arm in arms)] for key, by_arm in sorted(found.items())
    ]
    parts = ["## lm-evaluation-harness"]
    parts += [_markdown(["task", "metric", "examples", *arms], lines)] if lines else []
    return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])
