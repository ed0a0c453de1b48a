"""Rows of `bench.step` as Markdown."""

from bench.ratios import SHOWN_K, by_case, cost_cases, over, time_over
from bench.results import Row
from bench.table import figure, or_dash, span, table

_STANDARDS = {
    "mdlm_all_rows": "the step that trainers run today, which computes every row",
    "mdlm": "our own MDLM, which computes masked rows only (the honest overhead)",
}


def findings(steps: list[Row]) -> list[str]:
    """What the figures say, against both standards, whichever way they went.

    Args:
        steps: the newest of one suite.

    Returns:
        Items of a Markdown list.
    """
    cases = list(cost_cases(steps).values())
    if not cases:
        return [f"- No case ran both MDLM and MemDLM with K = {SHOWN_K}."]
    lines = []
    for base, meaning in _STANDARDS.items():
        own = [over(case, base) for case in cases]
        cheaper = sum(ratio < 1 for ratio in own)
        lines.append(
            f"- Against {meaning}, MemDLM with K = {SHOWN_K} takes {span(own)} the time: it is "
            f"cheaper in {cheaper or 'none'} of {len(own)} cases."
        )
    flops = [over(case, "mdlm", "flops") for case in cases]
    lines.append(
        f"- It computes {span(flops)} the FLOPs of our MDLM; its time over that of our MDLM is "
        f"{span([_over_flops(case) for case in cases])} that ratio."
    )
    naive = [case for case in cases if ("memdlm_naive", SHOWN_K) in case]
    if naive:
        own = [time_over(case["memdlm_naive", SHOWN_K], case["memdlm", SHOWN_K]) for case in naive]
        lines.append(f"- The same method written plainly takes {span(own)} the time of ours.")
    return lines


def costs(steps: list[Row]) -> list[str]:
    """A table: a row for each cost case, a column for each kind of step and ratio."""
    head = ["training step", "MDLM, all rows", "MDLM, ours", f"MemDLM K={SHOWN_K}, plainly"]
    head += [f"MemDLM K={SHOWN_K}, ours", "over all rows", "over our MDLM"]
    head += ["FLOPs over our MDLM", "time over FLOPs"]
    columns = [("mdlm_all_rows", None), ("mdlm", None)]
    columns += [("memdlm_naive", SHOWN_K), ("memdlm", SHOWN_K)]
    body = []
    for name, case in cost_cases(steps).items():
        ratios = [over(case, "mdlm_all_rows"), over(case, "mdlm")]
        ratios += [over(case, "mdlm", "flops"), _over_flops(case)]
        cells = [_time_and_peak(case.get(column)) for column in columns]
        body.append([name, *cells, *(f"{ratio:.2f}" for ratio in ratios)])
    return table(head, body)


def host_reads(steps: list[Row]) -> list[str]:
    """A table: how often one step waits for a value, and how much it dispatches."""
    kinds = {
        ("mdlm_all_rows", None): "MDLM, all rows",
        ("mdlm", None): "MDLM, ours",
        ("memdlm_naive", SHOWN_K): f"MemDLM K={SHOWN_K}, plainly",
        ("memdlm", SHOWN_K): f"MemDLM K={SHOWN_K}, ours",
    }
    body = []
    for kind, name in kinds.items():
        own = [case[kind] for case in cost_cases(steps).values() if kind in case]
        if own:
            body.append([name, *(_range(own, key) for key in ("host_reads", "calls", "launches"))])
    head = ["in one step", "values that the host reads off the device", "operators", "GPU kernels"]
    return table(head, body)


def every_step(steps: list[Row]) -> list[str]:
    """A table: a row for each case, variant and K."""
    head = ["case", "variant", "K", "p20 ms", "p50 ms", "p80 ms", "over all rows", "over our MDLM"]
    head += ["FLOPs over our MDLM", "GFLOP", "tokens/s", "peak MiB", "resident MiB"]
    head += ["operators", "kernels", "host reads"]
    body = []
    for name, case in by_case(steps).items():
        for (variant, k), row in case.items():
            cells = [name, f"`{variant}`", or_dash(k)]
            cells += [figure(row[key]) for key in ("p20_ms", "p50_ms", "p80_ms")]
            standards = [case.get((base, None)) for base in _STANDARDS]
            cells += ["-" if each is None else f"{time_over(row, each):.2f}" for each in standards]
            mdlm = case.get(("mdlm", None))
            cells.append("-" if mdlm is None else f"{row['flops'] / mdlm['flops']:.2f}")
            cells += [f"{row['flops'] / 1e9:,.0f}", f"{1e3 * row['tokens'] / row['p50_ms']:,.0f}"]
            cells += [or_dash(row[key], "{:,.0f}") for key in ("peak_mib", "rss_mib")]
            cells += [or_dash(row[key], "{:,}") for key in ("calls", "launches", "host_reads")]
            body.append(cells)
    return table(head, body)


def parts(steps: list[Row]) -> list[str]:
    """A table: the parts of each step in ms, as profiled."""
    names = list(dict.fromkeys(part for row in steps for part in row["parts_ms"]))
    body = []
    for row in steps:
        own_ms = row["parts_ms"]
        cells = [row["case"], f"`{row['variant']}`", or_dash(row["k"])]
        body.append(cells + [figure(own_ms[name]) if name in own_ms else "-" for name in names])
    return table(["case", "variant", "K", *(name.replace("_", " ") for name in names)], body)


def _over_flops(case: dict[tuple[str, int | None], Row]) -> float:
    """1 where a step of MemDLM takes as much more time than MDLM as it computes more."""
    return over(case, "mdlm") / over(case, "mdlm", "flops")


def _time_and_peak(row: Row | None) -> str:
    return "-" if row is None else f"{figure(row['p50_ms'])} ms, {row['peak_mib']:,.0f} MiB"


def _range(rows: list[Row], key: str) -> str:
    counts = sorted(row[key] for row in rows if row[key] is not None)
    if not counts:
        return "-"
    low, high = f"{counts[0]:,}", f"{counts[-1]:,}"
    return low if low == high else f"{low} to {high}"
