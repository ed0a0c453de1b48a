"""bench/on_gpu.sh without a GPU: no phase outlives its limit, and what failed comes home."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_failures import TESTS

ROOT = Path(__file__).resolve().parent.parent
# Enough for pytest to start where other tests run beside it.
TEST_SECONDS = 60


def run(folder, *phases, **variables):
    environment = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, **variables}
    environment["RESULTS_DIR"] = str(folder)
    command = ["bash", "bench/on_gpu.sh", *phases]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_a_phase_that_fails_or_hangs_stops_no_other_and_leaves_its_evidence(tmp_path):
    (tmp_path / "test_two.py").write_text(TESTS)
    others = ("build", "env", "smoke", "gpu_step", "step", "compiled", "summary")
    limits = " ".join(f"{phase}=4" for phase in others) + f" tests={TEST_SECONDS}"
    begin = time.monotonic()
    finished = run(tmp_path / "out", "first", LIMITS=limits, TESTS=str(tmp_path / "test_two.py"))
    took = time.monotonic() - begin
    assert took < TEST_SECONDS + 4 * len(others) + 30, finished.stdout

    assert finished.returncode == 1
    failed = finished.stderr.splitlines()[-1]
    assert failed.startswith("on_gpu: failed: ")
    assert {"tests", "smoke", "step"} <= set(failed.split()[3:])
    for phase in (*others, "tests"):
        assert re.search(rf"^{phase} +\d+ s  (passed|cut off|failed)", finished.stdout, re.M), phase
    told = (tmp_path / "out/failures.txt").read_text()
    assert "test_that_fails (call)" in told
    assert "assert (1 + 1) == 3" in told
    assert "STOPPED" in told
    assert "test_that_hangs" in told
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert "cut off at its limit" in (tmp_path / "out/log.txt").read_text()


def test_the_limits_of_each_run_fit_the_time_there_is():
    script = (ROOT / "bench/on_gpu.sh").read_text()
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", script.partition("declare -A run_of")[0]))
    for name, seconds in (("first", 270), ("second", 400)):
        phases = re.search(rf'\[{name}\]="([^"]*)"', script)[1].split()
        assert sum(int(limits[phase]) for phase in phases) <= seconds
        assert int(limits["build"]) <= seconds


@pytest.mark.parametrize(
    ("phases", "variables", "text"),
    [
        (["frist"], {}, "phase must be first, second or one of build"),
        (["env"], {"LIMITS": "evn=3"}, "LIMITS must be PHASE=SECONDS"),
        (["env"], {"DEVICE": "cuda"}, "must have a torch that finds a GPU"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, phases, variables, text):
    finished = run(tmp_path / "out", *phases, **variables)
    assert finished.returncode == 2
    assert text in finished.stderr
    assert not (tmp_path / "out").exists()
