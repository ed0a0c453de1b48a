"""The rows of the benchmarks: where they lie, what each must hold, which are the newest."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]

_MACHINE = {"device", "threads", "torch", "triton", "python", "commit", "dirty"}
_EVERY = {"bench", "suite", "run"} | _MACHINE
_TIMES = {"times_ms", "p20_ms", "p50_ms", "p80_ms", "peak_mib"}
_STEP = {
    *("case", "model", "batch_size", "length", "prompt_share", "outer", "gradient_checkpointing"),
    *("dtype", "variant", "k", "every", "rss_mib", "flops", "tokens"),
    *("parts_ms", "calls", "launches", "host_reads"),
}
_OP = _EVERY | {"op", "case", "dtype", "variant"}
_CHECKED_OP = _OP | {"error", "wrong", "flops", "bytes"}
KEYS = {
    "step": _EVERY | _TIMES | _STEP,
    "op": _CHECKED_OP | _TIMES | {"base_times_ms", "visit_rounds"},
    "roof": _EVERY | {"dtype", "gemm_gflops", "copy_gb_s"},
    "prompt_kv": _EVERY
    | {
        "model",
        "train_steps",
        "batch_size",
        "length",
        "prompt_share",
        "k",
        "batches",
        "times_ms",
        "p20_ms",
        "p50_ms",
        "p80_ms",
        "base_times_ms",
        "fast_weight_cosine",
        "fast_weight_cosine_min",
        "loss_change",
        "memory_loss_change",
        "gradient_cosine",
        "gradient_change",
        "memory_gradient_change",
    },
    "unroll": _EVERY
    | _TIMES
    | {
        "case",
        "model",
        "batch_size",
        "length",
        "prompt_share",
        "outer",
        "dtype",
        "variant",
        "inner_checkpoint",
        "k",
    },
}


def check_row(row: Row) -> None:
    """Refuse a row that does not hold what its benchmark writes.

    Raises:
        ValueError: naming the keys that it misses, or its unknown benchmark.
    """
    bench = row.get("bench")
    if bench not in KEYS:
        raise ValueError(f"bench must be one of {', '.join(KEYS)}, got {bench!r}")
    keys = KEYS[bench]
    if "skipped" in row:
        keys = _OP
    elif row.get("wrong"):
        keys = _CHECKED_OP  # what is wrong is not timed
    missing = keys - row.keys()
    if missing:
        raise ValueError(f"a row of {bench} must hold {', '.join(sorted(missing))}, got none")


def read_rows(folder: Path) -> list[Row]:
    """Every row of the `.jsonl` files in a folder, in their order.

    Raises:
        ValueError: naming the file and the line that does not parse or lacks a key.
    """
    rows = []
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                check_row(row)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
            rows.append(row)
    return rows


def newest(rows: list[Row], bench: str, suite: str | None) -> list[Row]:
    """The rows that stand for a suite, or for a benchmark that is in none.

    They all come from one commit, software and machine, those of the newest row, so that nothing
    is compared across versions. Among these a case that ran more than once counts by its newest
    run; a suite may so be run in pieces.

    Args:
        rows: of one folder.
        bench: "step", "op", "roof" or "unroll".
        suite: a name in `bench.cases.SUITES`; None for "unroll".

    Returns:
        The rows in their order; none where the suite did not run.
    """
    own = [row for row in rows if row["bench"] == bench and row["suite"] == suite]
    if not own:
        return []
    last = max(own, key=lambda row: row["run"])
    own = [row for row in own if all(row[fact] == last[fact] for fact in _MACHINE)]
    runs: dict[tuple[Any, ...], str] = {}
    for row in own:
        runs[_measured(row)] = max(runs.get(_measured(row), ""), row["run"])
    return [row for row in own if row["run"] == runs[_measured(row)]]


def suites(rows: list[Row]) -> list[str]:
    """Names of the suites that rows belong to, sorted; rows made by hand belong to none."""
    return sorted({row["suite"] for row in rows if row["suite"]})


def _measured(row: Row) -> tuple[Any, ...]:
    return row.get("op"), row.get("case"), row["dtype"]
