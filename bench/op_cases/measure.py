"""Measure one variant of a case: first whether it is right, then its memory and time."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import memdlm_kernels.flops  # noqa: F401 - tells the counter what the ops compute
from bench.op_cases.case import (
    Case,
    Inputs,
    Results,
    Run,
    UnavailableError,
    Variant,
    refusal,
    text,
)
from bench.timing import device_seconds, peak_mib, percentiles

# Of (what is timed, what runs before each round, rounds): the rounds' times in milliseconds.
Timer = Callable[[Callable[[], None], Callable[[], None], int], list[float]]

# Rounds at least; the slow are those whose one run takes longer than all of its rounds should, as
# the largest cases' oracles.
_LEAST_ROUNDS = 5
_ROUNDS_OF_THE_SLOW = 2
# A visit has so many, or none: it begins with an untimed run, which costs as much as a round.
_ROUNDS_OF_A_VISIT = 3
# What another library may raise where it does not work with what is installed here.
_FOREIGN_ERRORS = (AttributeError, ImportError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Problem:
    """A case on a device, with its truth.

    Attributes:
        case, device: what and where.
        inputs: of every variant.
        truth: results in float64.
        base: our default backend, which runs beside every variant.
        base_seconds: of one run of it.
        flops: of matrix products.
    """

    case: Case
    device: torch.device
    inputs: Inputs
    truth: Results
    base: Run
    base_seconds: float
    flops: int


def build(case: Case, device: torch.device) -> Problem:
    """Draw a case's inputs on a device, compute the truth, and run the base once.

    Args:
        case: what to build.
        device: where.

    Returns:
        The problem, the same for the same case and kind of device.

    Raises:
        ValueError: no backend of our own runs the case on the device.
    """
    generator = torch.Generator(device)
    generator.manual_seed(0)
    inputs = case.inputs(generator)
    truth = case.truth({name: _widened(tensor) for name, tensor in inputs.items()})
    with FlopCounterMode(display=False) as counter:
        results = tuple(tensor.detach().clone() for tensor in truth())
    del truth
    flops = counter.get_total_flops() if case.flops is None else case.flops
    if device.type == "cuda":
        torch.cuda.empty_cache()
    base = _base(case, inputs, device)
    return Problem(case, device, inputs, results, base, _least_seconds(base, device), flops)


@dataclass
class Timing:
    """A variant that is right, and its times so far.

    Attributes:
        problem: its case.
        run: what is timed.
        rounds: how many it is to have.
        checked: fields of its row: what is known before it is timed.
        times_ms: of each round.
        base_times_ms: of the base, which ran before it in the same round.
        visit_rounds: how many rounds each visit had.
    """

    problem: Problem
    run: Run
    rounds: int
    checked: dict[str, Any]
    times_ms: list[float] = field(default_factory=list)
    base_times_ms: list[float] = field(default_factory=list)
    visit_rounds: list[int] = field(default_factory=list)

    def visit(self, number: int, visits: int, timer: Timer | None = None) -> None:
        """Time the rounds that are due.

        Args:
            number: of this visit, from 0.
            visits: over how many the rounds are spread.
            timer: how, on a CPU; None for a plain loop.
        """
        parts = -(-self.rounds * (number + 1) // (visits * _ROUNDS_OF_A_VISIT))
        due = min(self.rounds, parts * _ROUNDS_OF_A_VISIT) - len(self.times_ms)
        if not due:
            return
        device = self.problem.device
        if number:  # others ran since: each base is to find what this one leaves in the caches
            self.run()
        if timer is None or device.type == "cuda":  # whose events time a GPU, no clock of the host
            timer = functools.partial(_loop, device)
        self.times_ms += timer(
            lambda: _finish(self.run),
            lambda: self.base_times_ms.append(self._time_base()),
            due,
        )
        self.visit_rounds.append(due)

    def row(self) -> dict[str, Any]:
        """The fields of its row."""
        return self.checked | {
            "times_ms": [round(value, 4) for value in self.times_ms],
            **percentiles(self.times_ms),
            "base_times_ms": [round(value, 4) for value in self.base_times_ms],
            "visit_rounds": self.visit_rounds,
        }

    def _time_base(self) -> float:
        return 1e3 * _seconds(self.problem.base, self.problem.device)


def check(
    problem: Problem, variant: Variant, rounds: int, seconds: float
) -> dict[str, Any] | Timing:
    """Compare a variant with the truth, and measure its memory if it is right.

    Args:
        problem: the case.
        variant: one of its variants.
        rounds: how often to time it at most.
        seconds: for about how long, its base's time included.

    Returns:
        What is to be timed; or, where there is nothing to time, the fields of a row: `skipped` if
        the variant does not run here, else `error` and `wrong`.

    Raises:
        Exception: whatever a variant of our own raises.
    """
    case, device = problem.case, problem.device
    row: dict[str, Any] = {
        "bench": "op",
        "op": case.op,
        "case": case.name,
        "dtype": text(case.dtype),
        "variant": variant.name,
    }
    if variant.backend is not None:
        reason = refusal(case.op, variant.backend, device)
        if reason is not None:
            return row | {"skipped": reason}
    try:
        run = variant.make(problem.inputs)
        results = run()
    except UnavailableError as error:
        return row | {"skipped": str(error)}
    except ValueError as error:
        # Sizes or dtypes that this backend does not take, which list_backends does not know.
        if "no backend can run" not in str(error) and variant.role == "ours":
            raise
        return row | {"skipped": str(error)}
    except _FOREIGN_ERRORS as error:
        if variant.role == "ours":
            raise
        return row | {"skipped": f"{type(error).__name__}: {error}"}

    row |= {"error": None, "wrong": False, "flops": problem.flops, "bytes": case.bytes}
    if variant.role != "bound":
        error, bar = variant.error(results, problem.truth), variant.bar
        # JSON has no NaN. "not <=" and not ">": a NaN is wrong.
        row["error"] = error if math.isfinite(error) else None
        row["wrong"] = not error <= (case.bar if bar is None else bar)
        if row["wrong"]:
            return row
    del results
    row["peak_mib"] = round(peak_mib(run, device), 3)
    one = _least_seconds(run, device)
    least = _LEAST_ROUNDS if one < seconds else _ROUNDS_OF_THE_SLOW
    rounds = min(rounds, max(least, int(seconds / (one + problem.base_seconds))))
    return Timing(problem, run, rounds, row)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _base(case: Case, inputs: Inputs, device: torch.device) -> Run:
    reasons = []
    for variant in case.variants:
        if variant.role != "ours":
            continue
        reason = refusal(case.op, variant.backend, device) if variant.backend else None
        if reason is None:
            try:
                run = variant.make(inputs)
                run()
                return run
            except ValueError as error:
                reason = str(error)
        reasons.append(f"{variant.name}: {reason}")
    raise ValueError(f"{case.op}: nothing runs {case.name} on {device} ({'; '.join(reasons)})")


def _least_seconds(run: Run, device: torch.device) -> float:
    """What to plan with: a single run may have met a slow spell."""
    return min(_seconds(run, device) for _ in range(3))


def _seconds(run: Run, device: torch.device) -> float:
    return device_seconds(lambda: _finish(run), device)


def _finish(run: Run) -> None:
    """Run, and let no result live beside the next run's."""
    run()


def _loop(
    device: torch.device, run: Callable[[], None], before: Callable[[], None], rounds: int
) -> list[float]:
    times_ms = []
    for _ in range(rounds):
        before()
        times_ms.append(1e3 * device_seconds(run, device))
    return times_ms
