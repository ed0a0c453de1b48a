"""Ratios of the rows of one run, and how they differ from those of another."""

from itertools import accumulate, pairwise
from statistics import geometric_mean, median

from bench.results import Row

# The rows of one case of `bench.step`, by variant and K.
Case = dict[tuple[str, int | None], Row]
SHOWN_K = 2  # inner steps of what is compared across cases: the paper's best


def by_case(rows: list[Row]) -> dict[str, Case]:
    """Step rows by case, then by variant and K."""
    cases: dict[str, Case] = {}
    for row in rows:
        if row["bench"] == "step":
            cases.setdefault(row["case"], {})[row["variant"], row["k"]] = row
    return cases


def inner_steps(case: Case) -> list[int]:
    """Every K with which `memdlm` ran, in order."""
    return sorted(k for variant, k in case if variant == "memdlm" and k is not None)


def complete_cases(rows: list[Row]) -> dict[str, Case]:
    """The cases that ran with both standards and with `SHOWN_K`."""
    needed = {("mdlm_all_rows", None), ("mdlm", None), ("memdlm", SHOWN_K)}
    return {name: case for name, case in by_case(rows).items() if needed <= case.keys()}


def cost_cases(rows: list[Row]) -> dict[str, Case]:
    """The complete cases; where some ran with more than one K, those: the rest are sweeps."""
    cases = complete_cases(rows)
    many = {name: case for name, case in cases.items() if len(inner_steps(case)) > 1}
    return many or cases


def over(case: Case, base: str, key: str = "p50_ms") -> float:
    """What `memdlm` with `SHOWN_K` takes of `key`, over a standard.

    Args:
        case: from `cost_cases`.
        base: "mdlm_all_rows" or "mdlm".
        key: "p50_ms" for time, "peak_mib" or "flops".

    Returns:
        The ratio; of time as `time_over` has it.
    """
    own, standard = case["memdlm", SHOWN_K], case[base, None]
    return time_over(own, standard) if key == "p50_ms" else own[key] / standard[key]


def time_over(row: Row, standard: Row) -> float:
    """The time of a step over another's: the geometric mean of `by_round`.

    Not the ratio of two medians, which leaps where the machine's spells come in two kinds
    (docs/decisions/ratios_of_times.md).
    """
    return geometric_mean(by_round(row, standard))


def by_round(row: Row, standard: Row) -> list[float]:
    """Times over those of a standard, round by round.

    Args:
        row: of a step, which took part in each nth round (`every`).
        standard: of a step that took part in all of them.

    Returns:
        A ratio for each round that both took part in.
    """
    return _quotients(row["times_ms"], standard["times_ms"][:: row["every"]])


def over_base(row: Row) -> float:
    """The time of what ran beside a base in each round over the base's.

    Args:
        row: of an op, whose base is our default backend, or of `bench.prompt_kv`: the exact step.

    Returns:
        The median over the rounds of a visit, of these the geometric mean over the visits.
    """
    quotients = _quotients(row["times_ms"], row["base_times_ms"])
    ends = list(accumulate(row.get("visit_rounds", [len(quotients)]), initial=0))
    return geometric_mean(median(quotients[begin:end]) for begin, end in pairwise(ends))


def by_op(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Op rows that ran, by op and by case with its dtype; what was wrong has no times."""
    ops: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["bench"] == "op" and "skipped" not in row:
            ops.setdefault((row["op"], f"{row['case']}, {row['dtype']}"), []).append(row)
    return ops


def op_base(variants: list[Row]) -> Row | None:
    """The row that the others of an op's case are divided by: our backend that is preferred here.

    Args:
        variants: of one case, in the order in which they ran.

    Returns:
        The row; None where none of ours ran.
    """
    own = (row for row in variants if row["variant"].startswith(("ours", "reference")))
    return next((row for row in own if "p50_ms" in row), None)


def ratios(rows: list[Row]) -> dict[str, float]:
    """Every ratio of times that the tables show: what it is of, to its value."""
    found = {}
    for case, own in by_case(rows).items():
        for (variant, k), row in own.items():
            if variant == "memdlm":
                for base in ("mdlm", "mdlm_all_rows"):
                    if (base, None) in own:
                        name = f"memdlm/{base} K={k}, {case}"
                        found[name] = time_over(row, own[base, None])
            elif variant == "memdlm_naive" and ("memdlm", k) in own:
                name = f"memdlm_naive/memdlm K={k}, {case}"
                found[name] = time_over(row, own["memdlm", k])
    for (op, case), variants in by_op(rows).items():
        for row in variants:
            if "p50_ms" in row and row is not op_base(variants):
                found[f"{row['variant']} of {op}, {case}"] = over_base(row)
    return found


def against_previous(rows: list[Row], run: str) -> str | None:
    """How far the ratios of a run are from those of the run before it.

    Args:
        rows: of one folder.
        run: when the run began, as its rows say.

    Returns:
        A sentence; None where no earlier run of the suite on this machine shares a ratio.
    """
    here = [row for row in rows if row["run"] == run]
    if not here:
        return None
    alike = ("suite", "device", "threads")
    now = ratios(here)
    earlier = [row for row in rows if all(row[key] == here[0][key] for key in alike)]
    for before in sorted({row["run"] for row in earlier if row["run"] < run}, reverse=True):
        old = ratios([row for row in earlier if row["run"] == before])
        moved = {name: abs(now[name] / old[name] - 1) for name in now if name in old}
        if moved:
            worst = max(moved, key=lambda name: moved[name])
            return (
                f"against the run of {before}: {len(moved)} ratios moved by at most "
                f"{100 * moved[worst]:.1f} %, at {worst} ({old[worst]:.3f}, now {now[worst]:.3f})"
            )
    return None


def _quotients(times_ms: list[float], others_ms: list[float]) -> list[float]:
    return [own / other for own, other in zip(times_ms, others_ms, strict=True)]
