"""Rows of the op benchmark as Markdown."""

from bench.ratios import by_op, op_base, over_base
from bench.results import Row
from bench.table import figure, or_dash, table


def first_cases(ops: list[Row]) -> list[str]:
    """A table: one case of each op, what ours takes, and what each other way does.

    Args:
        ops: the newest of one suite.

    Returns:
        Lines of Markdown.
    """
    body = []
    shown: set[str] = set()
    for (op, case), variants in by_op(ops).items():
        base = op_base(variants)
        if base is not None and op not in shown:
            shown.add(op)
            others = [_beside(row) for row in variants if row is not base]
            ours = f"{base['variant']}: {_time_and_peak(base)}"
            body.append([f"`{op}`", case, ours, "<br>".join(others)])
    return table(["op", "case", "ours", "others: time, peak memory, time over ours"], body)


def every_op(ops: list[Row]) -> list[str]:
    """A table: a row for each op, case and variant, also for what did not run and why."""
    head = ["op", "case", "dtype", "variant", "p20 ms", "p50 ms", "p80 ms", "over ours"]
    head += ["GFLOP/s", "GB/s", "peak MiB", "error"]
    body = []
    for row in ops:
        cells = [f"`{row['op']}`", row["case"], row["dtype"], row["variant"]]
        if "p50_ms" in row:
            seconds = row["p50_ms"] / 1e3
            cells += [figure(row[key]) for key in ("p20_ms", "p50_ms", "p80_ms")]
            cells.append(f"{over_base(row):.2f}")
            cells += [figure(row[key] / seconds / 1e9) for key in ("flops", "bytes")]
            cells += [figure(row["peak_mib"]), or_dash(row["error"], "{:.1e}")]
        else:
            said = f"did not run: {_one_line(row['skipped'])}" if "skipped" in row else "**wrong**"
            error = or_dash(row.get("error"), "{:.1e}")
            cells += [said, *[""] * (len(head) - 6), error]
        body.append(cells)
    return table(head, body)


def roof(row: Row) -> str:
    """A sentence: what a roof row says."""
    return (
        f"The most that this machine does: {row['gemm_gflops']:,.0f} GFLOP/s in a matrix product "
        f"({row['dtype']}), {row['copy_gb_s']:,.0f} GB/s in a copy."
    )


def _time_and_peak(row: Row) -> str:
    return f"{figure(row['p50_ms'])} ms, {figure(row['peak_mib'])} MiB"


def _beside(row: Row) -> str:
    if "p50_ms" not in row:
        return f"{row['variant']}: **wrong**, so not timed"
    return f"{row['variant']}: {_time_and_peak(row)}, {over_base(row):.2f} ×"


def _one_line(text: str) -> str:
    """A message as a cell of a table holds it."""
    return " ".join(text.replace("|", "/").split())
