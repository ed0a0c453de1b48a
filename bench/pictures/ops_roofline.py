"""What each op achieves, under the most that the machine does."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from bench.pictures.style import GREY, WIDTH, finish, look
from bench.ratios import by_op, op_base
from bench.results import Row


def ops_roofline(rows: list[Row]) -> Any:
    """GFLOP/s against FLOP per byte: ours filled, other implementations open."""
    cases = by_op(rows)
    dtype = next((row["dtype"] for variants in cases.values() for row in variants), None)
    roof = next((row for row in rows if row["bench"] == "roof" and row["dtype"] == dtype), None)
    # A reset draws numbers and multiplies none: it has no place here. A bound is no implementation.
    shown = [
        (row, row is op_base(variants))
        for variants in cases.values()
        for row in variants
        if row["flops"] and row["dtype"] == dtype and "p50_ms" in row
        if not row["variant"].startswith("bound")
    ]
    if roof is None or not any(ours for _, ours in shown):
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 6))
    ops = list(dict.fromkeys(row["op"] for row, _ in shown))
    intensities = [_intensity(row) for row, _ in shown]
    ends = (min(intensities) / 2, max(intensities) * 2)
    ridge = roof["gemm_gflops"] / roof["copy_gb_s"]
    corners = sorted({*ends, min(max(ridge, ends[0]), ends[1])})
    axes.plot(corners, [_attainable(roof, at) for at in corners], color=GREY, linewidth=2)
    for row, ours in shown:
        own = look(ops.index(row["op"])) | ({} if ours else {"markerfacecolor": "none"})
        place = (_intensity(row), _gflops_per_s(row))
        axes.plot(*place, linestyle="", markersize=8, zorder=3 if ours else 2, **own)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte, if each input is read once and each output written once",
        ylabel="GFLOP/s",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    handles = [
        Line2D([], [], linestyle="", label=op, **look(number)) for number, op in enumerate(ops)
    ]
    peers = {"label": "open: other implementations", "marker": "o", "markerfacecolor": "none"}
    handles.append(Line2D([], [], linestyle="", color=GREY, **peers))
    said = f"measured: {roof['gemm_gflops']:,.0f} GFLOP/s, {roof['copy_gb_s']:,.0f} GB/s"
    handles.append(Line2D([], [], color=GREY, linewidth=2, label=said))
    reached = [
        _gflops_per_s(row) / _attainable(roof, _intensity(row)) for row, ours in shown if ours
    ]
    message = f"Our ops reach {min(reached):.0%} to {max(reached):.0%} of what the machine can do"
    finish(figure, message, [roof], handles, columns=3)
    return figure


def _intensity(row: Row) -> float:
    return row["flops"] / row["bytes"]


def _gflops_per_s(row: Row) -> float:
    return row["flops"] / row["p50_ms"] / 1e6


def _attainable(roof: Row, intensity: float) -> float:
    return min(roof["gemm_gflops"], intensity * roof["copy_gb_s"])
