"""What each op achieves, under the most that the machine does."""

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from bench.pictures.style import GREY, WIDTH, finish, look
from bench.ratios import by_op, op_base
from bench.results import Row


def ops_roofline(rows: list[Row]) -> Any:
    """GFLOP/s against FLOP per byte, and GB/s of what multiplies nothing: ours filled."""
    cases = by_op(rows)
    dtype = next((row["dtype"] for variants in cases.values() for row in variants), None)
    roof = next((row for row in rows if row["bench"] == "roof" and row["dtype"] == dtype), None)
    # A bound is no implementation.
    shown = [
        (row, row is op_base(variants))
        for variants in cases.values()
        for row in variants
        if row["dtype"] == dtype and "p50_ms" in row and not row["variant"].startswith("bound")
    ]
    multiplying = [(row, ours) for row, ours in shown if row["flops"]]
    moving = [(row, ours) for row, ours in shown if not row["flops"]]
    if roof is None or not multiplying:
        return None
    names = dict.fromkeys(row["op"] for row, _ in shown)
    looks = {op: look(number) for number, op in enumerate(names)}
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 6), width_ratios=(3, 1))
    _draw_roof(left, roof, [_intensity(row) for row, _ in multiplying])
    for row, ours in multiplying:
        _draw_point(left, _intensity(row), _gflops_per_s(row), looks[row["op"]], ours)
    left.set(xscale="log", xlabel="FLOP per byte of the least traffic", ylabel="GFLOP/s")
    ops = list(dict.fromkeys(row["op"] for row, _ in moving))
    for row, ours in moving:
        _draw_point(right, ops.index(row["op"]), _gb_per_s(row), looks[row["op"]], ours)
    right.axhline(roof["copy_gb_s"], color=GREY, linewidth=2)
    right.set(xlim=(-0.6, len(ops) - 0.4), ylabel="GB/s of the least traffic", xticks=[])
    right.set_xlabel("ops without products")
    for axes in (left, right):
        axes.set_yscale("log")
    for axis in (left.xaxis, left.yaxis, right.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    right.yaxis.set_minor_formatter(NullFormatter())
    handles = [Line2D([], [], linestyle="", label=op, **own) for op, own in looks.items()]
    peers = {"label": "open: other implementations", "marker": "o", "markerfacecolor": "none"}
    handles.append(Line2D([], [], linestyle="", color=GREY, **peers))
    said = f"roof: {roof['gemm_gflops']:,.0f} GFLOP/s, {roof['copy_gb_s']:,.0f} GB/s"
    handles.append(Line2D([], [], color=GREY, linewidth=2, label=said))
    products = [
        _gflops_per_s(row) / _attainable(roof, _intensity(row)) for row, ours in multiplying if ours
    ]
    copies = [_gb_per_s(row) / roof["copy_gb_s"] for row, ours in moving if ours]
    message = f"Our ops reach {_least_to_most(products)} of the measured roof"
    if copies:
        message += f",\nand without products {_least_to_most(copies)} of a copy"
    finish(figure, message, [row for row, _ in shown], handles, columns=3)
    return figure


def _draw_roof(axes: Any, roof: Row, intensities: list[float]) -> None:
    ends = (min(intensities) / 2, max(intensities) * 2)
    ridge = roof["gemm_gflops"] / roof["copy_gb_s"]
    corners = sorted({*ends, min(max(ridge, ends[0]), ends[1])})
    axes.plot(corners, [_attainable(roof, at) for at in corners], color=GREY, linewidth=2)


def _draw_point(axes: Any, at: float, value: float, look: dict[str, str], ours: bool) -> None:
    own = look if ours else look | {"markerfacecolor": "none"}
    axes.plot(at, value, linestyle="", markersize=8, zorder=3 if ours else 2, **own)


def _least_to_most(shares: list[float]) -> str:
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def _gb_per_s(row: Row) -> float:
    """A GB is 1e9 bytes, and a time is in ms."""
    return row["bytes"] / row["p50_ms"] / 1e6


def _intensity(row: Row) -> float:
    return row["flops"] / row["bytes"]


def _gflops_per_s(row: Row) -> float:
    return row["flops"] / row["p50_ms"] / 1e6


def _attainable(roof: Row, intensity: float) -> float:
    return min(roof["gemm_gflops"], intensity * roof["copy_gb_s"])
