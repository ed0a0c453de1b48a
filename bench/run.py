"""Measure a suite: `python -m bench.run --suite cpu`.

The suite's steps and ops go, row by row, into a folder of results; pictures and tables follow. A
case that fails is told and the others go on.
"""

import argparse
import datetime
import gc
import os
import sys
import traceback
from pathlib import Path

import torch
from tqdm import tqdm

from bench import plot
from bench.cases import SUITES, StepCase, Suite
from bench.op_cases import run_ops
from bench.ratios import against_previous
from bench.results import ROOT, read_rows
from bench.step import DTYPES, measure
from bench.timing import machine

_BUSY = 0.5  # load per core from which on times say little


def main(arguments: list[str] | None = None) -> None:
    """Measure, draw, and compare with the run before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=tuple(SUITES), default="quick")
    parser.add_argument(
        "--out", type=Path, help="folder of the rows; by default bench/results/<this device>"
    )
    parser.add_argument(
        "--without",
        choices=("ops", "step", "sweeps"),
        nargs="+",
        default=[],
        help="what is left out: the ops, all steps, or the steps at other lengths and shares",
    )
    parser.add_argument(
        "--cases",
        type=int,
        nargs="*",
        metavar="N",
        help="cost cases of the suite by number, from 1; without a number none; default: all",
    )
    options = parser.parse_args(arguments)
    suite = SUITES[options.suite]
    if suite.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"--suite must be one for a CPU ({_suites_for('cpu')}) where torch finds no GPU, "
            f"got {options.suite}"
        )
    known = range(1, len(suite.costs) + 1)
    numbers = known if options.cases is None else options.cases
    for number in numbers:
        if number not in known:
            parser.error(f"--cases must be in [1, {len(suite.costs)}], got {number}")
    folder = options.out or ROOT / folder_name(torch.device(suite.device))
    if any(folder.glob("*.jsonl")):
        read_rows(folder)  # refuses what an older version wrote, before hours go by
    _tell_what_spoils_figures(torch.device(suite.device))

    run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    failed = []
    if "step" not in options.without:
        costs = [suite.costs[number - 1] for number in numbers]
        sweeps = [] if "sweeps" in options.without else suite.sweeps
        failed += _run_steps(options.suite, suite, costs, sweeps, run, folder / "step.jsonl")
    # In a process of their own, with tests that fail where an op of ours is wrong.
    if "ops" not in options.without and run_ops(options.suite, suite, run, folder / "ops.jsonl"):
        failed.append("ops")
    if any(folder.glob("*.jsonl")):
        plot.write(folder)
        print(against_previous(read_rows(folder), run) or "no earlier run to compare with")
    if failed:
        sys.exit(f"bench.run: failed: {'; '.join(failed)}")


def folder_name(device: torch.device) -> str:
    """Name of the folder of a device's results: "cpu-2-cores", or a GPU's name with dashes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}-cores"


def _suites_for(device: str) -> str:
    return ", ".join(name for name, suite in SUITES.items() if suite.device == device)


def _tell_what_spoils_figures(device: torch.device) -> None:
    if machine(device)["dirty"]:
        print(
            "bench.run: the tree has changes that are not committed: the rows will say so, and the "
            "tests refuse them among committed results",
            file=sys.stderr,
        )
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0]
    if load > _BUSY * cores:
        print(
            f"bench.run: the machine is busy (load {load:.1f} on {cores} cores): figures will be "
            f"off; wait until the load is below {_BUSY * cores:.1f}",
            file=sys.stderr,
        )


def _run_steps(
    name: str, suite: Suite, costs: list[StepCase], sweeps: list[StepCase], run: str, path: Path
) -> list[str]:
    """Measure cases and append their rows; returns the names of those that failed."""
    failed = []
    device = torch.device(suite.device)
    for number, case in enumerate(tqdm([*costs, *sweeps], desc="steps")):
        tqdm.write(case.name)
        is_cost = number < len(costs)
        try:
            measure(
                case,
                inner_steps=suite.inner_steps if is_cost else [2],
                naive=is_cost and not case.gradient_checkpointing,
                naive_every=suite.naive_every,
                prompt_kv=suite.prompt_kv,
                exact=suite.exact and is_cost,
                graph=suite.graph and is_cost,
                sdpa_backends=suite.sdpa_backends if is_cost else (),
                extra_steps=[2],
                repeats=suite.repeats,
                device=device,
                dtype=DTYPES[suite.dtype],
                suite=name,
                run=run,
                path=path,
            )
        except Exception:  # noqa: BLE001 - whatever one case raises, the others are measured
            tqdm.write(f"{case.name} failed:\n{traceback.format_exc()}", file=sys.stderr)
            failed.append(case.name)
        # What a case held, were it only by a traceback, would be missing to the next.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    main()
