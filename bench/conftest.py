"""Options of the op benchmark: `python -m pytest bench/test_ops.py --suite cpu --rows FILE`."""

import gc

import pytest

from bench.op_cases.suites import SUITE_NAMES


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `bench.op_cases.run_ops` passes; by hand none of it is needed."""
    group = parser.getgroup("memdlm ops")
    group.addoption("--suite", choices=SUITE_NAMES, help="which cases (default: quick)")
    group.addoption("--device", help="where to run (default: cuda for the suite gpu, else cpu)")
    group.addoption("--rounds", type=int, default=9, help="timed rounds of a variant")
    group.addoption("--rows", help="append one JSON line per variant to this file")
    group.addoption("--run", help="UTC ISO time of the invocation that the rows belong to")


def pytest_collection_finish() -> None:
    """What is imported by now stays: a collection in or before a timed run need not look at it."""
    gc.collect()
    gc.freeze()
