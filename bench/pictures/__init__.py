"""Pictures of the newest rows of a suite, readable at the width of a README."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from bench.pictures.by_length import by_length
from bench.pictures.cost_vs_k import cost_vs_k
from bench.pictures.ops_roofline import ops_roofline
from bench.pictures.parts import parts
from bench.pictures.style import STYLE
from bench.pictures.unroll import unroll
from bench.results import Row

_DRAW: dict[str, Callable[[list[Row]], Any]] = {
    "cost_vs_k.png": cost_vs_k,
    "by_length.png": by_length,
    "parts.png": parts,
    "ops_roofline.png": ops_roofline,
    "unroll.png": unroll,
}


def draw(name: str, rows: list[Row], path: Path) -> None:
    """Draw a picture of the newest rows; none where they do not hold what it shows.

    Args:
        name: a name in `bench.pages.PICTURES`, or `bench.pages.UNROLL`.
        rows: the newest of one suite, steps, ops and roof; or those of `bench.unroll`.
        path: of the PNG; removed if it is there and there is nothing to show.
    """
    with plt.rc_context(STYLE):
        figure = _DRAW[name](rows)
        if figure is None:
            path.unlink(missing_ok=True)
            return
        figure.savefig(path, dpi=160, metadata={"Software": None})
        plt.close(figure)
