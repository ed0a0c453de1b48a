"""What a cut-off test run leaves behind, and which tests of a GPU come first."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.failures import choose_first

ROOT = Path(__file__).resolve().parent.parent
TESTS = """
import time

def test_that_fails():
    assert 1 + 1 == 3, "arithmetic"

def test_that_hangs():
    time.sleep(600)
"""


def start(folder, *options):
    (folder / "test_two.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    # They lie elsewhere: the options and hooks are those of this repository all the same.
    command += ["--rootdir", str(folder), "-c", str(ROOT / "pyproject.toml")]
    command += ["-p", "tests.failures"]
    command += ["--failures", str(folder / "out/failures.txt"), str(folder / "test_two.py")]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("options", [(), ("-n", "2")])
def test_a_run_that_is_stopped_has_told_what_failed_and_what_ran(tmp_path, options):
    run = start(tmp_path, *options)
    file = tmp_path / "out/failures.txt"
    end = time.monotonic() + 120
    while not (file.exists() and "arithmetic" in file.read_text()):
        assert run.poll() is None, "pytest ended before it was stopped"
        assert time.monotonic() < end, "the failure was not written while others ran"
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 128 + signal.SIGTERM
    text = file.read_text()
    assert "test_two.py::test_that_fails (call)" in text
    assert "assert (1 + 1) == 3" in text
    assert "STOPPED" in text
    assert "test_two.py::test_that_hangs" in text


class Item:
    def __init__(self, nodeid, gpu=True):
        self.nodeid, self._gpu = nodeid, gpu

    def get_closest_marker(self, name):
        return self if self._gpu and name == "gpu" else None


def test_of_each_test_of_a_gpu_one_case_comes_first():
    names = ["a[float32]", "a[bfloat16-1]", "a[bfloat16-2]", "a[float16]", "b[1]", "b[2]", "c"]
    items = [*map(Item, names), Item("d", gpu=False)]
    assert [item.nodeid for item in choose_first(items)] == ["a[bfloat16-2]", "b[2]", "c"]
