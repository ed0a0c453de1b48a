"""The price of a step against the inner steps."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from bench.pictures.style import GREY, WIDTH, finish, look
from bench.ratios import SHOWN_K, Case, by_round, cost_cases, inner_steps, over, time_over
from bench.results import Row
from bench.table import span
from bench.timing import percentiles

_STANDARDS = {
    "mdlm_all_rows": "over what trainers run today:\nMDLM, logits and loss at all rows",
    "mdlm": "over our own MDLM:\nmasked rows only",
}


def cost_vs_k(rows: list[Row]) -> Any:
    """Step time of MemDLM over both standards, beside what its FLOPs ask for."""
    cases = {name: case for name, case in cost_cases(rows).items() if len(inner_steps(case)) > 1}
    if not cases:
        return None
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 5))
    for axes, (base, meaning) in zip(panels, _STANDARDS.items(), strict=True):
        for number, case in enumerate(cases.values()):
            shift = 0.06 * (number - (len(cases) - 1) / 2)
            _draw_ratios(axes, case, base, look(number), shift)
        axes.axhline(1, color=GREY, linewidth=1)
        axes.set(title=f"Step time of MemDLM {meaning}", xlabel="inner steps K")
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_xticks(sorted({k for case in cases.values() for k in inner_steps(case)}))
    panels[0].set_ylabel("geometric mean of the rounds; bars: p20 to p80")
    handles: list[Any] = [
        Line2D([], [], label=name, **look(number)) for number, name in enumerate(cases)
    ]
    handles.append(Line2D([], [], color=GREY, linestyle="--", label="ratio of the FLOPs alone"))
    ratio = span([over(case, "mdlm_all_rows") for case in cases.values()])
    message = f"MemDLM, K = {SHOWN_K}, takes {ratio} the time of the step that trainers run today"
    finish(figure, message, rows, handles, columns=2)
    return figure


def _draw_ratios(axes: Any, case: Case, base: str, look: dict[str, str], shift: float) -> None:
    standard = case[base, None]
    own = [case["memdlm", k] for k in inner_steps(case)]
    spread = [percentiles(by_round(row, standard)) for row in own]
    # Side by side, or the error bars of one case hide another's.
    places = [k + shift for k in inner_steps(case)]
    middle = [time_over(row, standard) for row in own]
    # A mean may lie a little outside of this.
    below = [max(0, at - each["p20_ms"]) for at, each in zip(middle, spread, strict=True)]
    above = [max(0, each["p80_ms"] - at) for at, each in zip(middle, spread, strict=True)]
    axes.errorbar(places, middle, (below, above), capsize=3, **look)
    flops = [row["flops"] / standard["flops"] for row in own]
    axes.plot(places, flops, color=look["color"], linestyle="--", linewidth=1.2)
