"""What the ops cost, beside what people use today: `python -m pytest bench/test_ops.py`.

Every variant of a case gets the same inputs, and is compared with the op's reference in float64
before it is timed. A backend of ours that is wrong fails; another library's is reported, in its
row and as an expected failure: it says something about that library, and the run goes on. What
cannot run here is skipped, with the reason. In each timed round our default backend runs first, so
that a slow spell of the machine meets both. With `--visits N` the rounds of each are spread over
the whole run: the machine's spells differ in what they slow, a cache or the arithmetic.
"""

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from bench.op_cases.case import Case, Variant, text
from bench.op_cases.measure import Problem, Timing, build, check
from bench.op_cases.roof import roof
from bench.op_cases.suites import op_cases
from bench.timing import machine, write_rows

Checked = dict[str, Any] | Timing  # of `check`


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case of the suite with each of its variants."""
    suite = metafunc.config.getoption("--suite") or "quick"
    cases = op_cases(suite)
    if "problem" in metafunc.fixturenames:
        pairs = [
            pytest.param(
                case,
                variant,
                id=f"{case.op}-{case.name}-{text(case.dtype)}-{variant.name}",
            )
            for case in cases
            for variant in case.variants
        ]
        # The cases' tensors are large: those of one at a time.
        metafunc.parametrize(("problem", "variant"), pairs, indirect=["problem"], scope="module")
    if "dtype" in metafunc.fixturenames:
        dtypes = sorted({case.dtype for case in cases}, key=text)
        metafunc.parametrize("dtype", dtypes, ids=text)


@pytest.fixture(scope="session")
def write(request: pytest.FixtureRequest, device: torch.device) -> Callable[[dict[str, Any]], None]:
    """Complete a row and append it to the file of rows, if there is one."""
    option = request.config.getoption
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts = {"suite": option("--suite"), "run": option("--run") or now, **machine(device)}
    path = None if option("--rows") is None else Path(option("--rows"))
    return lambda row: write_rows(path, [row | facts])


@pytest.fixture(scope="session")
def keep(
    request: pytest.FixtureRequest, write: Callable[[dict[str, Any]], None]
) -> Iterator[Callable[[Checked], None]]:
    """Write a variant's row; with more visits than one, after the last of all variants' visits."""
    visits = request.config.getoption("--visits")
    kept: list[Checked] = []
    if visits == 1:  # at once: what a case holds is let go before the next
        yield lambda checked: write(_row(checked))
    else:
        yield kept.append
    timings = [checked for checked in kept if isinstance(checked, Timing)]
    for number in tqdm(range(1, visits), desc="visits", disable=not timings):
        for timing in timings:
            timing.visit(number, visits)
    for checked in kept:
        write(_row(checked))


@pytest.fixture(scope="module")
def problem(request: pytest.FixtureRequest, device: torch.device) -> Problem:
    """A case's inputs and truth."""
    case: Case = request.param
    return build(case, device)


def test_roof(
    dtype: torch.dtype, device: torch.device, write: Callable[[dict[str, Any]], None]
) -> None:
    write(roof(dtype, device))


# What is wrong or skipped is not timed.
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
def test_op(
    problem: Problem,
    variant: Variant,
    keep: Callable[[Checked], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    if benchmark.disabled:
        pytest.skip("pytest-benchmark is disabled here, by an option or by xdist")
    case = problem.case
    benchmark.group = f"{case.op}: {case.name}, {text(case.dtype)}"
    benchmark.name = variant.name

    def timer(run: Callable[[], None], before: Callable[[], None], rounds: int) -> list[float]:
        benchmark.pedantic(run, setup=before, rounds=rounds)
        return [1e3 * seconds for seconds in benchmark.stats.stats.data]

    rounds, seconds, visits = map(request.config.getoption, ("--rounds", "--seconds", "--visits"))
    checked = check(problem, variant, rounds, seconds)
    if isinstance(checked, Timing):
        checked.visit(0, visits, timer)
    keep(checked)
    row = _row(checked)
    if "skipped" in row:
        pytest.skip(row["skipped"])
    if not row["wrong"]:
        benchmark.extra_info |= {name: row[name] for name in ("peak_mib", "error")}
        return
    message = f"{variant.name} is off by {row['error']}, more than {case.bar:.1e}"
    if variant.role == "peer":
        pytest.xfail(f"{case.op}, {case.name}: {message}")
    pytest.fail(message)


def _row(checked: Checked) -> dict[str, Any]:
    return checked.row() if isinstance(checked, Timing) else checked
