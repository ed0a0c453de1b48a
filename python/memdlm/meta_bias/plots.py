"""Pictures of the rows of `memdlm meta-bias`."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from memdlm.meta_bias.groups import ALL, GROUPS
from memdlm.meta_bias.measure import Row
from memdlm.meta_bias.options import CENTRE, VARIED
from memdlm.meta_bias.report import (
    COSINE,
    DIFFERENCE,
    NORM_RATIO,
    by_setting,
    models_of,
    of_batches,
    of_mean,
    setting_name,
    values,
)

SETTINGS_FILE, TRAINING_FILE = "settings.png", "training.png"
_COLOURS = ("#d08a2e", "#8a4fb0", "#3f9b5c", "#2e6fd0", "#e0699f", "#c0392b", "#17a2a2", "#9a9a9a")
# Rows hold cosines to six digits.
_LEAST_ANGLE = 1e-6
_TITLES = {
    "inner_steps": "inner steps K",
    "inner_lr": "inner learning rate",
    "inner_max_norm": "inner gradient norm kept",
}


def plot_meta_bias(out: Path, rows: Sequence[Row]) -> None:
    """Draw both pictures.

    Args:
        out: folder of the PNGs.
        rows: of at least one model; `settings.png` is of the last.
    """
    last = [row for row in rows if row["model"] == rows[-1]["model"]]
    for name, figure in (
        (SETTINGS_FILE, _plot_settings(last)),
        (TRAINING_FILE, _plot_training(rows)),
    ):
        figure.tight_layout()
        figure.savefig(out / name, dpi=110)
        plt.close(figure)


def _plot_settings(rows: Sequence[Row]) -> Any:
    """Angle and norm ratio of each group, against each varied option; batches are dots."""
    figure, panels = plt.subplots(2, len(VARIED), figsize=(15, 8), sharey="row")
    groups = [group for group in GROUPS if group in rows[0]["first_order"]]
    for column, option in enumerate(VARIED):
        own = _along(rows, option)
        ticks = [setting[0][option] for setting in own]
        angles, norms = panels[0][column], panels[1][column]
        for group in groups:
            _draw(angles, [_angles(each, group) for each in own], group)
            ratios = [values(of_batches(each), NORM_RATIO, group=group) for each in own]
            _draw(norms, ratios, group)
        angles.set(yscale="log")
        norms.axhline(1, color="black", linewidth=0.8)
        for panel in (angles, norms):
            panel.set_xticks(range(len(own)), ["none" if x is None else f"{x:g}" for x in ticks])
            panel.grid(alpha=0.25)
        panels[1][column].set(xlabel=_TITLES[option])
    panels[0][0].set(ylabel="1 - cosine of first order and exact")
    panels[1][0].set(ylabel="norm of first order / exact")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"the outer gradient at {rows[0]['model']}")
    return figure


def _along(rows: Sequence[Row], option: str) -> list[list[Row]]:
    """The settings that differ from the model's own in one option alone, by its value."""
    own = [found for found in by_setting(rows).values() if found[0]["varied"] in (CENTRE, option)]
    return sorted(own, key=lambda found: _last_if_none(found[0][option]))


def _last_if_none(value: float | None) -> float:
    return float("inf") if value is None else value


def _plot_training(rows: Sequence[Row]) -> Any:
    """Against the models: the angle by group and by setting, and the bias beside the noise."""
    models = models_of(rows)
    per_model = [by_setting([row for row in rows if row["model"] == name]) for name in models]
    figure, (by_group, by_loop, sizes) = plt.subplots(1, 3, figsize=(15, 4.6))
    first = [next(iter(own.values())) for own in per_model]
    for group in [group for group in GROUPS if group in first[0][0]["first_order"]]:
        _draw(by_group, [_angles(own, group) for own in first], group)
    for name in per_model[0]:
        found = [_angles(own.get(name, []), ALL) for own in per_model]
        by_loop.plot(range(len(models)), [_mean(own) for own in found], marker=".", label=name)
    means = [of_mean(own) for own in first]
    places = range(len(models))
    parts = {
        "bias of a batch / its gradient": [
            _mean(values(of_batches(own), DIFFERENCE)) for own in first
        ],
        "bias of the mean / the mean": [_mean(values([row], DIFFERENCE)) for row in means],
        "noise of a batch / the mean": [row["noise"][ALL] for row in means],
    }
    for name, heights in parts.items():
        sizes.plot(places, heights, marker="o", label=name)
    sizes.set(yscale="log", title="bias and noise of the whole gradient")
    by_group.set(yscale="log", title=f"1 - cosine by group: {setting_name(first[0][0])}")
    by_loop.set(yscale="log", title="1 - cosine of the whole gradient, by inner loop")
    for panel in (by_group, by_loop, sizes):
        panel.set_xticks(places, models)
        panel.set(xlabel="model")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7, framealpha=0.5)
    return figure


def _angles(rows: Sequence[Row], group: str) -> list[float]:
    """1 - cosine of the first-order and the exact gradient of each batch."""
    return [max(_LEAST_ANGLE, 1 - own) for own in values(of_batches(rows), COSINE, group=group)]


def _draw(panel: Any, found: Sequence[Sequence[float]], group: str) -> None:
    """The means of lists of values as a line, and the values as dots where it is of everything."""
    colour = "black" if group == ALL else _COLOURS[GROUPS.index(group) % len(_COLOURS)]
    width = 2.2 if group == ALL else 1.2
    panel.plot([_mean(own) for own in found], color=colour, lw=width, marker=".", label=group)
    if group == ALL:
        for place, own in enumerate(found):
            panel.plot([place] * len(own), own, ".", color=colour, alpha=0.25)


def _mean(found: Sequence[float]) -> float:
    return statistics.fmean(found) if found else float("nan")
