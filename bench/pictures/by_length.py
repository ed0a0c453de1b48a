"""Time and memory of a step against the length of the sequences."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from bench.pictures.style import WIDTH, finish
from bench.ratios import SHOWN_K, Case, complete_cases, over
from bench.results import Row
from bench.table import span

_VARIANTS: dict[tuple[str, int | None], dict[str, str]] = {
    ("mdlm_all_rows", None): {"label": "MDLM, all rows", "color": "#000000", "marker": "s"},
    ("mdlm", None): {"label": "MDLM, ours", "color": "#D55E00", "marker": "^"},
    ("memdlm", SHOWN_K): {"label": f"MemDLM, K = {SHOWN_K}", "color": "#0072B2", "marker": "o"},
}
_PANELS = {"p50_ms": "time of a step, ms", "peak_mib": "peak memory, MiB"}


def by_length(rows: list[Row]) -> Any:
    """Time above, memory below, a column for each group of cases that differ in length alone."""
    groups = _groups(rows)
    if not groups:
        return None
    figure, panels = plt.subplots(
        2, len(groups), figsize=(WIDTH, 6.4), sharex="col", sharey="row", squeeze=False
    )
    for column, (title, cases) in enumerate(groups.items()):
        lengths = sorted(cases)
        for axes, key in zip(panels[:, column], _PANELS, strict=True):
            for variant, look in _VARIANTS.items():
                axes.plot(lengths, [cases[length][variant][key] for length in lengths], **look)
            axes.set_xscale("log", base=2)
            axes.margins(x=0.12)
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        panels[0, column].set_title(title)
        panels[1, column].set_xlabel("length L, tokens")
    for axes, label in zip(panels[:, 0], _PANELS.values(), strict=True):
        axes.set_ylabel(label)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    longest = [cases[max(cases)] for cases in groups.values()]
    time, memory = (span([over(case, "mdlm_all_rows", key) for case in longest]) for key in _PANELS)
    message = (
        f"At the longest inputs MemDLM takes {time} the time\n"
        f"and {memory} the memory of the step that trainers run today"
    )
    handles = [Line2D([], [], **look) for look in _VARIANTS.values()]
    finish(figure, message, rows, handles, columns=3)
    return figure


def _groups(rows: list[Row]) -> dict[str, dict[int, Case]]:
    """Cases that differ in nothing but their length: what they share, then length."""
    groups: dict[str, dict[int, Case]] = {}
    for case in complete_cases(rows).values():
        row = case["mdlm", None]
        checkpointed = ", checkpointed" if row["gradient_checkpointing"] else ""
        title = (
            f"{row['model']}, B = {row['batch_size']},\n{row['prompt_share']:.0%} prompt, "
            f"{row['outer']}{checkpointed}"
        )
        groups.setdefault(title, {})[row["length"]] = case
    return {title: cases for title, cases in groups.items() if len(cases) > 1}
