"""Tables and pictures of a grid: one of each for every ablation."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from memdlm.ablation.grid import Cell, Grid

_COLOURS = {"off": "#d08a2e", "on": "#2e6fd0"}
_NOT_MEASURES = ("model", "prompt_ratio", "seed", "memory", "keys", "nll_of_examples")

Row = dict[str, Any]


def write_report(out: Path, grid: Grid, cells: Sequence[Cell], rows: Sequence[Row]) -> str:
    """Write `report.md` and a picture of each ablation, from the rows that are there.

    Args:
        out: the grid's folder.
        grid: what was run.
        cells: all of its cells.
        rows: what was measured.

    Returns:
        The tables.
    """
    parts = []
    for name in grid.ablations:
        own = _collect(name, cells, rows)
        if not own:
            continue
        table = ablation_table(name, cells, rows)
        parts += [f"## {name}", "", *table, "", f"![{name}]({name}.png)", ""]
        _plot(out / f"{name}.png", name, own)
    seeds = ", ".join(map(str, grid.seeds))
    several = " ± their standard deviation, which is that of training alone" * (len(grid.seeds) > 1)
    head = [
        f"Means over seeds {seeds}{several}. NLL in nats per token, lower is better, of "
        f"{grid.examples} held-out examples, the same with the same masks for every run; in the "
        "last column the difference is paired by example, ± its standard error over them. R is "
        "the exposure bias, sequential over static loss, and R_exposure the part of it that the "
        "choice of tokens does not explain: means over mask ratios, 1 is none. Recall in %.",
        "",
    ]
    text = "\n".join(head + parts)
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def ablation_table(name: str, cells: Sequence[Cell], rows: Sequence[Row]) -> list[str]:
    """Lines of Markdown: a row for each choice of options, with the memory off and on.

    Args:
        name: the ablation.
        cells: of its grid.
        rows: what was measured, at least one of them.
    """
    own = _collect(name, cells, rows)
    seeds = len({cell.seed for cell in cells})
    measures = measures_of(next(iter(own.values())))
    head = ["", "memory", *map(shown_name, measures), "NLL minus the first row's"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    first = next(iter(own.values()))
    for (shown, state), found in own.items():
        texts = [spread(measure, [row[measure] for row in found]) for measure in measures]
        texts.append(_gain(found, first) if found is not first else "")
        left = "" if len(found) == seeds else f" ({len(found)} of {seeds} seeds)"
        lines.append("| " + " | ".join([shown + left, state, *texts]) + " |")
    return lines


def _gain(rows: Sequence[Row], first: Sequence[Row]) -> str:
    """Mean difference of the NLL and its standard error, paired by seed and example."""
    seeds = [row["seed"] for row in rows if row["seed"] in {each["seed"] for each in first}]
    if not seeds:
        return ""
    pairs = [
        [next(r["nll_of_examples"] for r in side if r["seed"] == seed) for seed in seeds]
        for side in (rows, first)
    ]
    own, base = ([statistics.fmean(each) for each in zip(*side, strict=True)] for side in pairs)
    gaps = [ours - theirs for ours, theirs in zip(own, base, strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    return f"{statistics.fmean(gaps):+.4f} ± {error:.4f}"


def _collect(
    name: str, cells: Sequence[Cell], rows: Sequence[Row]
) -> dict[tuple[str, str], list[Row]]:
    """(option values, memory off or on) to the rows of all seeds."""
    found = {(row["model"], row["prompt_ratio"], row["memory"]): row for row in rows}
    own: dict[tuple[str, str], list[Row]] = {}
    for cell in cells:
        if cell.ablation != name:
            continue
        shown = ", ".join(f"{key} {_plain(value)}" for key, value in cell.values.items())
        for state in ("off", "on"):
            row = found.get((cell.model_name, cell.prompt_ratio, state))
            if row is not None:
                own.setdefault((shown, state), []).append(row)
    return own


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def measures_of(rows: Sequence[Row]) -> list[str]:
    """The names of the figures that rows hold."""
    return [name for name in rows[0] if name not in _NOT_MEASURES]


def shown_name(measure: str) -> str:
    """A measure as a table's head says it."""
    if measure.startswith("recall_"):
        _, length, kind = measure.split("_")
        return f"recall {length}, {kind}"
    return {"nll": "NLL"}.get(measure, measure)


def spread(measure: str, values: Sequence[float]) -> str:
    """Mean, and with several seeds the standard deviation, as text."""
    percent = measure.startswith("recall_")
    scaled = [100 * value if percent else value for value in values]
    digits = 1 if percent else 3
    mean = f"{statistics.fmean(scaled):.{digits}f}"
    return mean if len(scaled) == 1 else f"{mean} ± {statistics.stdev(scaled):.{digits}f}"


def _plot(path: Path, title: str, own: dict[tuple[str, str], list[Row]]) -> None:
    """A panel for each measure: every seed a dot, the mean a bar, memory off and on."""
    measures = measures_of(next(iter(own.values())))
    choices = list(dict.fromkeys(shown for shown, _ in own))
    columns = min(4, len(measures))
    lines = -(-len(measures) // columns)
    size = (3.6 * columns, 1.4 + (0.7 + 0.34 * len(choices)) * lines)
    figure, panels = plt.subplots(lines, columns, figsize=size, sharey=True, squeeze=False)
    for panel, measure in zip(panels.flat, measures, strict=False):
        scale = 100 if measure.startswith("recall_") else 1
        for (shown, state), rows in own.items():
            values = [scale * row[measure] for row in rows]
            height = choices.index(shown) + (0.16 if state == "on" else -0.16)
            mean = statistics.fmean(values)
            panel.plot([mean, mean], [height - 0.14, height + 0.14], color=_COLOURS[state], lw=2.5)
            panel.plot(values, [height] * len(values), ".", color=_COLOURS[state], alpha=0.6)
        panel.set(title=shown_name(measure) + (", %" if scale == 100 else ""))
        panel.set_yticks(range(len(choices)), choices)
        panel.grid(axis="x", alpha=0.25)
    panels[0, 0].invert_yaxis()
    for panel in panels.flat[len(measures) :]:
        panel.axis("off")
    marks = [Line2D([], [], color=colour, lw=2.5) for colour in _COLOURS.values()]
    figure.legend(marks, [f"memory {state}" for state in _COLOURS], loc="upper right", fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
