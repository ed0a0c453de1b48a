"""Tests that tell although they may be cut off: a plugin, `python -m pytest -p tests.failures`.

`--failures FILE` appends the id and the text of every test that fails, as soon as it has. Of a run
that is stopped by SIGTERM, as `timeout` does, it names the tests that were still running. Of a
GPU's tests one case each is marked `first` and comes first.
"""

import signal
import types
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --failures."""
    parser.addoption("--failures", type=Path, metavar="FILE", help="append each failure at once")


def pytest_configure(config: pytest.Config) -> None:
    """Write failures from the process that hears of all of them, not from its workers."""
    if config.getoption("failures") is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailureLog(config.getoption("failures")))


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the first of a GPU's tests, and let them come first."""
    first = choose_first(items)
    for item in first:
        item.add_marker("first")
    others = [item for item in items if item.get_closest_marker("first") is None]
    items[:] = first + others


class FailureLog:
    """Appends failures to a file, as hooks of pytest.

    Args:
        path: of the file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._running: dict[str, None] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, self._stopped)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running[nodeid] = None

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._running.pop(nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._write(f"FAILED {report.nodeid} ({report.when})", report.longreprtext)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(f"FAILED {report.nodeid} (collection)", report.longreprtext)

    def _stopped(self, number: int, frame: types.FrameType | None) -> None:
        for nodeid in self._running:
            self._write(f"STOPPED {nodeid}", "it was running when the time was up")
        # Not SystemExit, which would count as a failure of the test that it meets.
        pytest.exit("stopped by SIGTERM", returncode=128 + number)

    def _write(self, title: str, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"== {title}\n{text}\n\n")


def choose_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of every test that needs a GPU one case: what tells most where there is little time.

    Args:
        items: in the order in which they were collected.

    Returns:
        Of each test function, the middle one of its cases in bfloat16, or of all if none is; in
        the same order.
    """
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = []
    for cases in functions.values():
        likely = [case for case in cases if "bfloat16" in case.nodeid] or cases
        chosen.append(likely[len(likely) // 2])
    return chosen
