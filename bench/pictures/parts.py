"""Where the time of a step goes."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from bench.pictures.style import WIDTH, finish
from bench.ratios import SHOWN_K, cost_cases
from bench.results import Row

# In the order in which they run: label and colour, a hue for each loop.
_PARTS = {
    "noisier_prefix": ("prefix, noisier states", "#0b4f7d"),
    "anchor_prefix": ("prefix, anchor", "#56B4E9"),
    "reset": ("reset", "#5c3a00"),
    "inner_suffix": ("inner: suffix", "#E69F00"),
    "inner_loss": ("inner: loss", "#f7d488"),
    "inner_backward": ("inner: backward", "#D55E00"),
    "update": ("inner: update", "#8c3b00"),
    "outer_suffix": ("outer: suffix", "#009E73"),
    "outer_loss": ("outer: loss", "#9edcc8"),
    "outer_backward": ("outer: backward", "#00543d"),
    "optimizer": ("AdamW", "#CC79A7"),
}
_OTHER = ("everything else", "#d9d9d9")
_OF_THE_MEMORY = (
    "noisier_prefix", "reset", "inner_suffix", "inner_loss", "inner_backward", "update",
)  # fmt: skip
_BARS = {("mdlm", None): "MDLM, ours", ("memdlm", SHOWN_K): f"MemDLM, K = {SHOWN_K}"}


def parts(rows: list[Row]) -> Any:
    """Two bars for each cost case, over the time of MDLM."""
    cases = cost_cases(rows)
    if not cases:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 1.8 + 0.9 * len(cases)))
    ticks: dict[float, str] = {}
    used = set()
    for number, (name, case) in enumerate(cases.items()):
        whole_ms = sum(_of_the_step(case["mdlm", None]).values())
        axes.text(0, 3 * number - 0.8, name, fontsize=10, fontweight="bold", va="center")
        for line, (variant, label) in enumerate(_BARS.items()):
            place = 3 * number + line
            ticks[place] = label
            parts_ms = _of_the_step(case[variant])
            left = 0.0
            for part, time_ms in _coloured(parts_ms):
                share = time_ms / whole_ms
                axes.barh(place, share, left=left, color=part[1], edgecolor="white", lw=0.5)
                left += share
                used.add(part)
            total_ms = sum(parts_ms.values())
            axes.text(left + 0.02, place, f"{total_ms:,.0f} ms", fontsize=10, va="center")
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set(xlabel="time over that of our MDLM", ylim=(3 * len(cases) - 1.3, -1.4))
    axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
    axes.grid(visible=False, axis="y")
    handles = [
        Patch(color=part[1], label=part[0]) for part in (*_PARTS.values(), _OTHER) if part in used
    ]
    shares = [_share_of_memory(_of_the_step(case["memdlm", SHOWN_K])) for case in cases.values()]
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    share = low if low == high else f"{low} to {high}"
    message = f"Writing the memory takes {share} of a step of MemDLM"
    finish(figure, message, rows, handles, columns=5)
    return figure


def _of_the_step(row: Row) -> dict[str, float]:
    """The profile's shares of the measured time: one profiled step is not a median of many.

    Without the collator's: a data loader makes batches beside the step.
    """
    parts_ms = {part: ms for part, ms in row["parts_ms"].items() if part != "host_masks"}
    scale = row["p50_ms"] / sum(parts_ms.values())
    return {part: scale * ms for part, ms in parts_ms.items()}


def _coloured(parts_ms: dict[str, float]) -> list[tuple[tuple[str, str], float]]:
    """Label, colour and time of each part; those that are not named here are one."""
    named = [(look, parts_ms[name]) for name, look in _PARTS.items() if name in parts_ms]
    other_ms = sum(time_ms for name, time_ms in parts_ms.items() if name not in _PARTS)
    return [*named, (_OTHER, other_ms)] if other_ms else named


def _share_of_memory(parts_ms: dict[str, float]) -> float:
    """What the inner loop takes, and the prefix of the states that it alone visits."""
    return sum(parts_ms.get(name, 0) for name in _OF_THE_MEMORY) / sum(parts_ms.values())
