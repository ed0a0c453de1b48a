"""Every Triton kernel compiled for each architecture without a GPU: it fits, and lost nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.ahead_of_time import SHARED, Compiled, problems

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_is_what_it_should_be(capability: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", str(capability)]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    compiled = [Compiled.from_json(line) for line in finished.stdout.splitlines()]
    assert not problems(compiled, capability)
    # Probabilities and gradients of half the size lie over the logits.
    overlays = {each.kernel for each in compiled if each.in_place}
    assert overlays >= {"forward_tile_kernel", "backward_tile_kernel", "kl_row_kernel"}
