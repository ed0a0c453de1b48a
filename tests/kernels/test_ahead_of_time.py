"""Every Triton kernel compiled for each architecture without a GPU: it fits, and spills nothing."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import memdlm_kernels

ROOT = Path(memdlm_kernels.__file__).parent.parent

# The shared memory that one block can have, in bytes.
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
# Of 64 Ki registers in a multiprocessor: no more than its 255 for each of 256 threads.
REGISTERS = 255


def kernels() -> set[str]:
    """Names of all functions that are launched: by convention, they end in `_kernel`."""
    names = set()
    for path in Path(memdlm_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                names.add(node.name)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_fits(capability: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", str(capability)]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    compiled = [json.loads(line) for line in finished.stdout.splitlines()]
    assert {each["kernel"] for each in compiled} == kernels()
    too_large = [each for each in compiled if each["shared"] > SHARED[capability]]
    assert not too_large, too_large
    spilling = [each for each in compiled if each["stack"] > 0]
    assert not spilling, spilling
    assert all(each["registers"] <= REGISTERS for each in compiled)
