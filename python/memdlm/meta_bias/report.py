"""Tables of the rows of `memdlm meta-bias`."""

import statistics
from collections.abc import Sequence
from typing import Any

from memdlm.meta_bias.groups import ALL, GROUPS
from memdlm.meta_bias.measure import EXACT, MEAN, Row
from memdlm.meta_bias.options import CENTRE

COSINE, NORM_RATIO, DIFFERENCE = range(3)
_NAMES = {"inner_steps": "K", "inner_lr": "lr", "inner_max_norm": "clip"}


def meta_bias_report(rows: Sequence[Row]) -> str:
    """Markdown: each model's own setting, then all settings and groups of the last model.

    Args:
        rows: of `memdlm meta-bias`, of at least one model.

    Returns:
        The tables.
    """
    parts = ["## Along the training", "", *_of_models(rows), ""]
    last = [row for row in rows if row["model"] == rows[-1]["model"]]
    parts += [f"## Inner loops, at {last[0]['model']}", "", *_of_settings(last), ""]
    parts += ["## Cosine by group", "", *_of_groups(last)]
    return "\n".join(parts)


def models_of(rows: Sequence[Row]) -> list[str]:
    """The models, in the order of the rows."""
    return list(dict.fromkeys(row["model"] for row in rows))


def by_setting(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Name of each setting, the model's own first, to its rows; of one model."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(setting_name(row), []).append(row)
    return found


def setting_name(row: Row) -> str:
    """What a setting differs in, or "K 2, lr 0.1, clip 1" of the model's own."""
    if row["varied"] == CENTRE:
        return ", ".join(_named(row, name) for name in _NAMES)
    return _named(row, row["varied"])


def _named(row: Row, name: str) -> str:
    value = row[name]
    return f"{_NAMES[name]} none" if value is None else f"{_NAMES[name]} {value:g}"


def of_batches(rows: Sequence[Row]) -> list[Row]:
    """The rows of single batches."""
    return [row for row in rows if row["batch"] != MEAN]


def of_mean(rows: Sequence[Row]) -> Row:
    """The row of the mean gradients, of one model and setting."""
    return next(row for row in rows if row["batch"] == MEAN)


def values(
    rows: Sequence[Row], column: int, kind: str = "first_order", group: str = ALL
) -> list[float]:
    """One figure of every row that has it.

    Args:
        rows: of one setting.
        column: `COSINE`, `NORM_RATIO` or `DIFFERENCE`.
        kind: of gradient.
        group: of parameters.
    """
    found = [row[kind][group][column] for row in rows if group in row[kind]]
    return [value for value in found if value is not None]


def _of_models(rows: Sequence[Row]) -> list[str]:
    head = ["model", *_HEADS]
    lines = []
    for model in models_of(rows):
        own = next(iter(by_setting([row for row in rows if row["model"] == model]).values()))
        lines.append([model, *_cells(own)])
    return _table(head, lines)


def _of_settings(rows: Sequence[Row]) -> list[str]:
    lines = [[name, *_cells(own)] for name, own in by_setting(rows).items()]
    return _table(["inner loop", *_HEADS], lines)


def _of_groups(rows: Sequence[Row]) -> list[str]:
    groups = [group for group in GROUPS if group in rows[0]["first_order"]]
    lines = []
    for name, own in by_setting(rows).items():
        cells = [_mean(values(of_batches(own), COSINE, group=group), ".4f") for group in groups]
        lines.append([name, *cells])
    return _table(["inner loop", *groups], lines)


_HEADS = (
    "outer loss",
    "clipped",
    "cosine (least)",
    "norm ratio",
    "difference",
    "cosine of the mean",
    "difference of the mean",
    "noise of a batch",
    "cosine of two batches",
    "exact_suffix: cosine",
    "time, exact",
    "time, exact_suffix",
)


def _cells(rows: Sequence[Row]) -> list[str]:
    """What `_HEADS` names, of the rows of one model and setting."""
    batches, mean = of_batches(rows), of_mean(rows)
    cosines = values(batches, COSINE)
    neighbours = [row["neighbour"][ALL] for row in batches if "neighbour" in row]
    return [
        _mean([row["loss"] for row in batches], ".3f"),
        _mean([row["clipped_share"] for row in batches], ".0%"),
        f"{_mean(cosines, '.4f')} ({min(cosines):.4f})" if cosines else "",
        _mean(values(batches, NORM_RATIO), ".3f"),
        _mean(values(batches, DIFFERENCE), ".3f"),
        _mean(values([mean], COSINE), ".4f"),
        _mean(values([mean], DIFFERENCE), ".3f"),
        _mean([mean["noise"][ALL]], ".3f"),
        _mean(neighbours, ".3f"),
        _mean(values(batches, COSINE, "exact_suffix"), ".4f"),
        *(f"{_times(batches, kind):.2f}x" for kind in (EXACT, "exact_suffix")),
    ]


def _times(rows: Sequence[Row], kind: str) -> float:
    """Median over batches of a kind's time over the first-order one's."""
    ratios = [row["time_ms"][kind] / row["time_ms"]["first_order"] for row in rows]
    return statistics.median(ratios)


def _mean(found: Sequence[Any], form: str) -> str:
    known = [value for value in found if value is not None]
    return format(statistics.fmean(known), form) if known else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = "|" + "---|" * len(head)
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(x) + " |" for x in lines)]
