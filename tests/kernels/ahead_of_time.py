"""Compile every Triton kernel that the launchers would launch on a GPU, without one.

`python -m tests.kernels.ahead_of_time CAPABILITY` runs the launchers of `tests/kernels/launches` on
fake GPU tensors of real sizes. Triton specialises and compiles as it would there; nothing is run.
Prints one JSON line for each compiled kernel.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

from tests.kernels import launches

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_CUOBJDUMP = Path(triton.__file__).with_name("backends") / "nvidia/bin/cuobjdump"


class _Driver:
    """What Triton asks a driver for in order to compile."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


def main(capability: int) -> None:
    """Compile for one architecture and print what came of it."""
    triton.runtime.driver.set_active(_Driver(capability))
    compiled: dict[tuple[Any, ...], tuple[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        args = [_mock(arg) for arg in args]
        kwargs = {name: _mock(value) for name, value in kwargs.items()}
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[self.fn.__name__, kernel.hash] = (scenario, kernel)
        return kernel

    JITFunction.run = compile_only
    for module in pkgutil.iter_modules(launches.__path__):
        launch = importlib.import_module(f"{launches.__name__}.{module.name}").launch
        for dtype in DTYPES:
            scenario = f"{module.name} {dtype}"
            with FakeTensorMode(), torch.no_grad():
                launch(dtype)
    for (name, _), (first, kernel) in compiled.items():
        print(json.dumps({"kernel": name, "launched_by": first, **_resources(kernel)}))


def _mock(value: Any) -> Any:
    return MockTensor(value.dtype) if isinstance(value, FakeTensor) else value


def _resources(kernel: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
    # The spill loads and stores of a kernel go to its stack frame.
    return {"shared": kernel.metadata.shared, "registers": registers, "stack": stack}


if __name__ == "__main__":
    main(int(sys.argv[1]))
