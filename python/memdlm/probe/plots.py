"""Pictures of a probe, made of its rows."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from memdlm.probe.report import Row, mean_and_error, pooled, select
from memdlm.probe.retrieval import OFF, UNRELATED, WITH, WITHOUT

_BLUE, _ORANGE, _GREY, _GREEN = "#2e6fd0", "#d08a2e", "#9a9a9a", "#3f9b5c"
_LINE_OF_TOKENS = 110


def plot_probe(out: Path, rows: Sequence[Row]) -> list[str]:
    """Draw all that there are rows for.

    Args:
        out: folder of the PNGs.
        rows: of every measure, of all models.

    Returns:
        Their names.
    """
    plots = {
        "weights": (_plot_weights, select(rows, "projection")),
        "experts": (_plot_experts, select(rows, "expert")),
        "tokens": (_plot_tokens, select(rows, "tokens")),
        "retrieval": (_plot_retrieval, select(rows, "retrieval")),
        "strip": (_plot_strip, select(rows, "strip")),
    }
    drawn = {name: (draw, own) for name, (draw, own) in plots.items() if own}
    for name, (draw, own) in drawn.items():
        figure = draw(own)
        figure.savefig(out / f"{name}.png", dpi=130, bbox_inches="tight")
        plt.close(figure)
    return [f"{name}.png" for name in drawn]


def _plot_weights(rows: Sequence[Row]) -> Any:
    """Norms, and the singular values of the updates."""
    names = list(dict.fromkeys(row["projection"] for row in rows))
    figure, (norms, moved, spectra) = plt.subplots(1, 3, figsize=(15, 4.4))
    panels = ((norms, "relative_of_prompts"), (moved, "moved_of_prompts"))
    for panel, measure in panels:
        values = [
            [100 * value for value in pooled(select(rows, "projection", projection=name), measure)]
            for name in names
        ]
        panel.boxplot([own or [0.0] for own in values], orientation="horizontal", showfliers=False)
        panel.set_yticks(range(1, len(names) + 1), names)
        panel.invert_yaxis()
        panel.set(xlabel="%", xlim=(0, None))
        panel.grid(axis="x", alpha=0.25)
    norms.set(title="norm of the update / norm of its weight")
    moved.set(title="norm of A's change / norm of A")
    for number, name in enumerate(names):
        own = [row["spectrum"] for row in select(rows, "projection", projection=name)]
        mean = [statistics.fmean(values) for values in zip(*own, strict=True)]
        colour = plt.get_cmap("viridis")(number / max(1, len(names) - 1) * 0.85)
        spectra.plot(range(1, len(mean) + 1), mean, marker=".", color=colour, label=name)
    spectra.set(title="singular values of the update", xlabel="number", yscale="log")
    spectra.grid(alpha=0.25)
    if len(names) <= 12:
        spectra.legend(fontsize=8)
    figure.tight_layout()
    return figure


def _plot_experts(rows: Sequence[Row]) -> Any:
    """Each expert's update, and where tokens were routed."""
    names = list(dict.fromkeys(row["projection"] for row in rows))
    figure, panels = plt.subplots(1, 2, figsize=(14, 1.6 + 0.4 * len(names)), sharey=True)
    experts = sorted({row["expert"] for row in rows})
    for panel, (measure, title) in zip(
        panels,
        (("relative", "norm of the update / of the weight, %"), ("routed", "choices, %")),
        strict=True,
    ):
        grid = [
            [
                100 * statistics.fmean([r[measure] for r in own if r["expert"] == expert] or [0])
                for expert in experts
            ]
            for own in (select(rows, "expert", projection=name) for name in names)
        ]
        image = panel.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
        panel.set(title=title, xlabel="expert")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_yticks(range(len(names)), names)
        figure.colorbar(image, ax=panel)
    figure.tight_layout()
    return figure


def _plot_tokens(rows: Sequence[Row]) -> Any:
    """The change of the NLL by kind: means, and how it is distributed."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, (means, spreads) = plt.subplots(1, 2, figsize=(13, 1.8 + 0.6 * len(kinds)), sharey=True)
    for written, colour, shift in ((True, _BLUE, -0.18), (False, _ORANGE, 0.18)):
        label = "predicted in writing" if written else "not"
        for place, kind in enumerate(kinds):
            own = select(rows, "tokens", kind=kind, written=written)
            if not own:
                continue
            mean, error = mean_and_error([row["change_of_prompts"] for row in own])
            bar = error if error == error else 0.0
            means.barh(place + shift, mean, 0.32, xerr=bar, color=colour, label=label)
            ends = zip(*(row["quantiles"] for row in own), strict=True)
            low, first, middle, third, high = (statistics.fmean(values) for values in ends)
            box = {"whislo": low, "q1": first, "med": middle, "q3": third, "whishi": high}
            spreads.bxp(
                [box],
                positions=[place + shift],
                widths=0.3,
                orientation="horizontal",
                showfliers=False,
                patch_artist=True,
                boxprops={"facecolor": colour, "alpha": 0.6},
                medianprops={"color": "black"},
            )
            label = ""
    means.set(title="mean, ± standard error over prompts", xlabel="NLL, memory on minus off, nats")
    spreads.set(title="5, 25, 50, 75, 95 % of the tokens", xlabel="NLL, memory on minus off, nats")
    for panel in (means, spreads):
        panel.axvline(0, color="black", linewidth=0.8)
        panel.grid(axis="x", alpha=0.25)
        panel.set_yticks(range(len(kinds)), kinds)
    means.invert_yaxis()
    means.legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    return figure


def _plot_retrieval(rows: Sequence[Row]) -> Any:
    """NLL of the value and recall, by setting: off, and a memory of each source."""
    arms = (
        (WITH, OFF, _GREY, "needle in context, memory off"),
        (WITH, WITH, _GREEN, "needle in context and memory"),
        (WITHOUT, OFF, "#cfcfcf", "needle nowhere, memory off"),
        (WITHOUT, WITH, _BLUE, "needle in memory alone"),
        (WITHOUT, WITHOUT, _ORANGE, "needle nowhere, memory of the rest"),
        (WITHOUT, UNRELATED, "#c0392b", "needle nowhere, memory of unrelated text"),
    )
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, panels = plt.subplots(1, 2, figsize=(15, 2 + 0.95 * len(settings)), sharey=True)
    height = 0.85 / len(arms)
    for number, (context, memory, colour, label) in enumerate(arms):
        for place, setting in enumerate(settings):
            chosen = {} if memory == OFF else {"setting": setting}
            own = select(rows, "retrieval", context=context, memory=memory, **chosen)
            at = place + (number - (len(arms) - 1) / 2) * height
            for panel, measure, scale in zip(panels, ("nll", "right"), (1, 100), strict=True):
                mean, error = mean_and_error([row[measure] for row in own])
                panel.barh(
                    at,
                    scale * mean,
                    0.92 * height,
                    xerr=scale * error,
                    color=colour,
                    label=label if place == 0 else "",
                    error_kw={"elinewidth": 0.8},
                )
    panels[0].set(title="NLL of the value's tokens, nats, ± standard error over questions")
    panels[1].set(title="values recalled, %")
    panels[0].set_yticks(range(len(settings)), settings)
    panels[0].invert_yaxis()
    for panel in panels:
        panel.grid(axis="x", alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.legend(handles, labels, loc="upper center", ncols=3, fontsize=9)
    return figure


def _plot_strip(rows: Sequence[Row]) -> Any:
    """One prompt, its tokens coloured by the change; those predicted in writing are framed."""
    own = rows[0]
    change = [on - off for on, off in zip(own["on"], own["off"], strict=True)]
    limit = sorted(map(abs, change))[int(0.95 * (len(change) - 1))] or 1.0
    norm, colours = Normalize(-limit, limit), plt.get_cmap("RdBu_r")
    places, x, y = [], 0, 0
    for token in own["tokens"]:
        if x and x + len(token) > _LINE_OF_TOKENS:
            x, y = 0, y + 1
        places.append((x, y))
        x += len(token)
    figure, axes = plt.subplots(figsize=(13, 0.8 + 0.3 * (y + 1)))
    for token, (left, line), value, masked in zip(
        own["tokens"], places, change, own["masked"], strict=True
    ):
        box = Rectangle((left, line), len(token), 0.9, facecolor=colours(norm(value)), lw=0.9)
        box.set_edgecolor("black" if masked else "none")
        axes.add_patch(box)
        axes.text(
            left + len(token) / 2,
            line + 0.45,
            token.replace("$", r"\$"),
            family="monospace",
            color="white" if abs(value) > 0.7 * limit else "black",
            fontsize=9,
            ha="center",
            va="center",
        )
    axes.set(xlim=(0, _LINE_OF_TOKENS), ylim=(y + 1, 0))
    axes.axis("off")
    axes.set_title("NLL of each token, memory on minus off, nats (framed: predicted in writing)")
    figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=axes, fraction=0.02, pad=0.01)
    return figure
