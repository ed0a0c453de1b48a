"""Every op once at a real shape: `python -m bench.smoke --rows FILE`, about a minute on a GPU.

Each op's default backend is compared with the reference in float64, then timed, beside what the
device can do at best, measured in the same run. A line each, as soon as it is known; what fails is
named, with its traceback, and the others go on.
"""

import argparse
import datetime
import gc
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from bench.op_cases.case import Case, default_variant, text
from bench.op_cases.measure import Timing, build, check
from bench.op_cases.roof import roof
from bench.op_cases.suites import SUITE_NAMES, op_cases
from bench.timing import machine, write_rows

# The ops that are compiled: what runs before their build is done leaves them out.
_COMPILED = ("fast_weight_reset_", "fast_weight_sgd", "fast_weight_sgd_")
_ROUNDS, _SECONDS = 5, 0.3


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and exit with 1 where an op is wrong or fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--suite", choices=SUITE_NAMES, default="smoke")
    parser.add_argument(
        "--ops",
        choices=("all", "triton", "compiled"),
        default="all",
        help="those in Triton, or those in C++ and CUDA, which must have been built",
    )
    parser.add_argument("--rows", type=Path, help="append one JSON line per op to this file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device must be cpu where torch finds no GPU, got {options.device}")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts = {"suite": options.suite, "run": now, **machine(device)}
    cases = [
        case
        for case in op_cases(options.suite)
        if options.ops == "all" or (case.op in _COMPILED) == (options.ops == "compiled")
    ]
    roofs = {}
    for dtype in sorted({case.dtype for case in cases}, key=text):
        roofs[dtype] = roof(dtype, device)
        write_rows(options.rows, [roofs[dtype] | facts])
        print(
            f"roof {text(dtype)}: {roofs[dtype]['gemm_gflops'] / 1e3:.0f} TFLOP/s, "
            f"{roofs[dtype]['copy_gb_s']:.0f} GB/s",
            flush=True,
        )
    failed = []
    for case in cases:
        name = f"{case.op} {case.name} {text(case.dtype)}"
        try:
            row = _measured(case, device)
        except Exception:  # noqa: BLE001 - whatever one op raises, the others are measured
            print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
            failed.append(case.op)
            continue
        write_rows(options.rows, [row | facts])
        print(f"{'WRONG ' if row['wrong'] else ''}{name}: {_line(row, case, roofs)}", flush=True)
        if row["wrong"]:
            failed.append(case.op)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if failed:
        sys.exit(f"bench.smoke: failed: {', '.join(failed)}")


def _measured(case: Case, device: torch.device) -> dict[str, Any]:
    variant = default_variant(case, device)
    checked = check(build(case, device), variant, _ROUNDS, _SECONDS)
    if not isinstance(checked, Timing):
        if "skipped" in checked:
            raise RuntimeError(f"{variant.name} does not run: {checked['skipped']}")
        return checked
    checked.visit(0, 1)
    return checked.row()


def _line(row: dict[str, Any], case: Case, roofs: dict[torch.dtype, dict[str, Any]]) -> str:
    error = f"{row['variant']}, error {row['error']}, bar {case.bar:.1e}"
    if row["wrong"]:
        return error
    best = roofs[case.dtype]
    gb_s, gflops = (row[amount] / row["p50_ms"] / 1e6 for amount in ("bytes", "flops"))
    return (
        f"{error}, {row['p50_ms']:.3f} ms, {gflops / 1e3:.1f} TFLOP/s "
        f"({gflops / best['gemm_gflops']:.0%} of the roof), {gb_s:.0f} GB/s "
        f"({gb_s / best['copy_gb_s']:.0%})"
    )


if __name__ == "__main__":
    main()
