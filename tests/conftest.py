"""What every test shares."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.failures import FailureLog, choose_first

# Before any kernel is imported: without a GPU, Triton's interpreter runs them on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.kernels import interpreter

    interpreter.mend()

# The same examples on every run; the first call of a torch op is slow, and that is no failure.
settings.register_profile("memdlm", deadline=None, derandomize=True)
settings.load_profile("memdlm")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --failures."""
    parser.addoption("--failures", type=Path, metavar="FILE", help="append each failure at once")


def pytest_configure(config: pytest.Config) -> None:
    """Write failures to their file from the process that hears of all of them."""
    if config.getoption("failures") is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailureLog(config.getoption("failures")))


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the GPU's first tests, and let them come first."""
    first = choose_first(items)
    for item in first:
        item.add_marker("first")
    others = [item for item in items if item.get_closest_marker("first") is None]
    items[:] = first + others
