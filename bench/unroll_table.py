"""Rows of `bench.unroll` in Markdown."""

from bench.results import Row
from bench.table import figure, table

# The rows of one case, by variant, K and `inner_checkpoint`.
Case = dict[tuple[str, int, str | None], Row]
GRADIENTS = {
    "first_order": "first order",
    "exact": "exact",
    "exact_suffix": "exact_suffix",
    "kept_graph": "exact, graphs kept",
}
_CHECKPOINTS = ("none", "layer", "auto")
_PARTS = {"first_order": "the whole pass", "inner_steps": "the inner steps alone"}


def by_case(rows: list[Row]) -> dict[str, Case]:
    """Rows of `bench.unroll` by case, then by what tells variants apart."""
    cases: dict[str, Case] = {}
    for row in rows:
        case = cases.setdefault(row["case"], {})
        case[row["variant"], row["k"], row["inner_checkpoint"]] = row
    return cases


def by_k(case: Case, variant: str) -> dict[int, Row]:
    """K to the row of a variant as it runs by default, in order."""
    default = None if variant == "kept_graph" else "auto"
    found = {
        k: row for (name, k, choice), row in case.items() if (name, choice) == (variant, default)
    }
    return dict(sorted(found.items()))


def grown(case: Case, variant: str) -> tuple[int, int, float]:
    """Least and largest K above 1, and peak memory with the latter over that with the former.

    With K = 1 the only state is the anchor, and no other state's layers are differentiated.
    """
    rows = {k: row for k, row in by_k(case, variant).items() if k > 1}
    least, most = min(rows), max(rows)
    return least, most, rows[most]["peak_mib"] / rows[least]["peak_mib"]


def lines(rows: list[Row]) -> list[str]:
    """What was measured, and two tables: the gradients with each K, then `inner_checkpoint`.

    Args:
        rows: those that stand for the benchmark.

    Returns:
        Lines of Markdown.
    """
    first = rows[0]
    cases = by_case(rows)
    said = (
        "The gradient through the inner loop: one forward and backward of the objective, median of "
        f"{len(first['times_ms'])} rounds, and what tensors hold at its peak beyond the weights "
        f"(`python -m bench.unroll`, {first['run'][:10]}, commit `{first['commit'][:7]}`, "
        f'{first["device"]}, {first["threads"]} threads, {first["dtype"]}). "Graphs kept" is the '
        "exact gradient written plainly, with no step taken again."
    )
    head = ["case", "K", *GRADIENTS.values()]
    body = [
        [name, str(k), *(_time_and_peak(by_k(case, variant)[k]) for variant in GRADIENTS)]
        for name, case in cases.items()
        for k in by_k(case, "exact")
    ]
    return [said, "", *table(head, body), "", *_checkpoints(cases)]


def _checkpoints(cases: dict[str, Case]) -> list[str]:
    head = ["case, first order", "K", "of"]
    head += [f"`inner_checkpoint: {name}`" for name in _CHECKPOINTS]
    body = []
    for name, case in cases.items():
        (k,) = {k for _, k, choice in case if choice == "none"}
        for variant, meaning in _PARTS.items():
            rows = [case[variant, k, choice] for choice in _CHECKPOINTS]
            body.append([name, str(k), meaning, *map(_time_and_peak, rows)])
    return table(head, body)


def _time_and_peak(row: Row) -> str:
    return f"{figure(row['p50_ms'])} ms, {figure(row['peak_mib'])} MiB"
