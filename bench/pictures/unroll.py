"""Time and memory of the gradient through the inner loop, against the inner steps."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from bench.pictures.style import WIDTH, finish, look
from bench.results import Row
from bench.table import span
from bench.unroll_table import GRADIENTS, Case, by_case, by_k, grown

_PANELS = {"peak_mib": "peak memory, MiB", "p50_ms": "time, ms"}


def unroll(rows: list[Row]) -> Any:
    """Memory above, time below, a column for each case."""
    cases = {
        name: case
        for name, case in by_case(rows).items()
        if max(by_k(case, "exact"), default=1) > 1
    }
    if not cases:
        return None
    figure, panels = plt.subplots(2, len(cases), figsize=(WIDTH, 6.4), sharex="col", squeeze=False)
    for column, (name, case) in enumerate(cases.items()):
        for axes, key in zip(panels[:, column], _PANELS, strict=True):
            _draw(axes, case, key)
        model, _, rest = name.partition(", ")
        panels[0, column].set_title(f"{model},\n{rest}")
        panels[1, column].set_xlabel("inner steps K")
    for axes, label in zip(panels[:, 0], _PANELS.values(), strict=True):
        axes.set_ylabel(label)
    (least, most, _), *_ = (grown(case, "exact") for case in cases.values())
    again, kept = (
        span([grown(case, variant)[2] for case in cases.values()])
        for variant in ("exact", "kept_graph")
    )
    message = (
        f"K = {most} takes {again} the memory of K = {least} for the exact gradient,\n"
        f"and {kept} where all graphs are kept"
    )
    handles = [
        Line2D([], [], label=label, **look(number))
        for number, label in enumerate(GRADIENTS.values())
    ]
    finish(figure, message, rows, handles, columns=len(handles))
    return figure


def _draw(axes: Any, case: Case, key: str) -> None:
    for number, variant in enumerate(GRADIENTS):
        own = by_k(case, variant)
        axes.plot(list(own), [row[key] for row in own.values()], **look(number))
    axes.margins(x=0.08)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_xticks(list(by_k(case, "exact")))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
