"""Options of the op benchmark: `python -m pytest bench/test_ops.py --suite cpu --rows FILE`."""

import gc

import pytest
import torch

from bench.op_cases.suites import SUITE_NAMES


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `bench.op_cases.run_ops` passes; by hand none of it is needed."""
    group = parser.getgroup("memdlm ops")
    group.addoption("--suite", choices=SUITE_NAMES, help="which cases (default: quick)")
    group.addoption("--device", help="where to run (default: cuda for the suite gpu, else cpu)")
    group.addoption("--rounds", type=int, default=9, help="timed rounds of a variant, at most")
    group.addoption("--seconds", type=float, default=0.7, help="for about how long to time one")
    group.addoption(
        "--visits",
        type=int,
        default=1,
        help="over how many visits to spread these rounds; beyond one, all cases lie in memory",
    )
    group.addoption("--rows", help="append one JSON line per variant to this file")
    group.addoption("--run", help="UTC ISO time of the invocation that the rows belong to")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what cannot be, a GPU where there is none, before anything is built for it."""
    device = _device(config)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device must be cpu where torch finds no GPU, got {device}")
    for name in ("--rounds", "--visits"):
        if config.getoption(name) < 1:
            raise pytest.UsageError(f"{name} must be at least 1, got {config.getoption(name)}")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where everything runs."""
    return _device(request.config)


def pytest_collection_finish() -> None:
    """What is imported by now stays: a collection in or before a timed run need not look at it."""
    gc.collect()
    gc.freeze()


def _device(config: pytest.Config) -> torch.device:
    default = "cuda" if config.getoption("--suite") == "gpu" else "cpu"
    return torch.device(config.getoption("--device") or default)
