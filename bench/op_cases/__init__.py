"""The op benchmark's cases: every op of memdlm_kernels, beside what people use today.

`run_ops` measures them; `python -m pytest bench/test_ops.py` does the same by hand.
"""

import subprocess
import sys
from pathlib import Path

from bench.cases import Suite
from bench.op_cases.suites import op_cases

__all__ = ["op_cases", "run_ops"]

_ROOT = Path(__file__).resolve().parents[2]


def run_ops(suite_name: str, suite: Suite, run: str, path: Path) -> int:
    """Measure a suite's ops in a process of their own, and append their rows to a file.

    Args:
        suite_name: "tiny", "quick", "cpu" or "gpu".
        suite: its device, and how long its ops are timed.
        run: UTC ISO seconds at which the invocation began.
        path: of the rows.

    Returns:
        pytest's exit code: 0 where nothing of ours is wrong.
    """
    command = [sys.executable, "-m", "pytest", "bench/test_ops.py", "-q", "-rfEx"]
    command += ["-p", "no:cacheprovider", "--benchmark-columns=min,median,rounds"]
    command += ["--suite", suite_name, "--device", suite.device, "--rounds", str(suite.op_rounds)]
    command += ["--seconds", str(suite.op_seconds), "--visits", str(suite.op_visits)]
    command += ["--run", run, "--rows", str(Path(path).resolve())]
    return subprocess.run(command, cwd=_ROOT).returncode
