"""What the pictures share: colours, type and the frame around the axes."""

from typing import Any

from bench.results import Row

# Okabe and Ito's colours, which the colour-blind tell apart; a marker each for print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
GREY = "#595959"
WIDTH = 10  # inches: 1,000 px in a README, where a point of type is 1.4 px
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.constrained_layout.use": True,
}


def look(number: int) -> dict[str, str]:
    """Colour and marker of the n-th of some lines; no two of the first 63 look alike."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
    }


def finish(figure: Any, message: str, rows: list[Row], handles: list[Any], columns: int) -> None:
    """Put what the picture says above it, and below it the legend and the machine.

    Args:
        figure: with its axes drawn.
        message: the title.
        rows: what is drawn; the first tells the machine.
        handles: of the legend.
        columns: of the legend.
    """
    row = rows[0]
    machine = (
        f"{row['device']}, {row['threads']} threads, {row['dtype']}, torch {row['torch']}, "
        f"commit {(row['commit'] or 'none')[:7]}"
    )
    figure.suptitle(message, fontsize=13, fontweight="bold")
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        title=machine,
        title_fontsize=9,
    )
