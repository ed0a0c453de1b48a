"""Compile every Triton kernel that the launchers would launch on a GPU, without one.

`python -m tests.kernels.ahead_of_time CAPABILITY` runs the launchers of `tests/kernels/launches` on
fake GPU tensors of real sizes. Triton specialises and compiles as it would there; nothing is run.
Prints one JSON line for each compiled kernel.
"""

import ast
import dataclasses
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

import memdlm_kernels
from tests.kernels import assembly, launches
from tests.kernels.assembly import Dot, Load

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The shared memory that one block can have, in bytes.
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
# Of 64 Ki registers in a multiprocessor: no more than its 255 for each of 256 threads.
REGISTERS = 255
# Hopper's product of four warps takes no fewer rows.
WGMMA_ROWS = 64

_CUOBJDUMP = Path(triton.__file__).with_name("backends") / "nvidia/bin/cuobjdump"


@dataclass
class Compiled:
    """A kernel, specialised and compiled.

    Attributes:
        kernel: its name.
        launched_by: the op and dtype that launched it first.
        whole_vectors: whether a launch had tensors only whose rows Triton can see to be whole
            vectors.
        in_place: whether a launch had two tensors that begin at one address.
        shared: bytes of shared memory.
        registers: of a thread.
        stack: bytes of its frame, which holds what is spilled.
        dots, loads, asynchronous_copies: see `tests/kernels/assembly.py`.
    """

    kernel: str
    launched_by: str
    whole_vectors: bool = False
    in_place: bool = False
    shared: int = 0
    registers: int = 0
    stack: int = 0
    dots: list[Dot] = dataclasses.field(default_factory=list)
    loads: list[Load] = dataclasses.field(default_factory=list)
    asynchronous_copies: int = 0

    @classmethod
    def from_json(cls, line: str) -> "Compiled":
        fields = json.loads(line)
        fields["dots"] = [Dot(**dot) for dot in fields["dots"]]
        fields["loads"] = [Load(**load) for load in fields["loads"]]
        return cls(**fields)


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


def compile_all(capability: int) -> list[Compiled]:
    """What all launches compile for one architecture; Triton launches nothing after it."""
    triton.runtime.driver.set_active(_Driver(capability))
    found: dict[tuple[str, str], tuple[Compiled, Any]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, FakeTensor)]
        args = [_mock(arg) for arg in args]
        kwargs = {name: _mock(value) for name, value in kwargs.items()}
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        name = self.fn.__name__
        compiled, _ = found.setdefault((name, kernel.hash), (Compiled(name, scenario), kernel))
        compiled.whole_vectors |= all(has_whole_vectors(tensor) for tensor in tensors)
        compiled.in_place |= in_place(tensors)
        return kernel

    JITFunction.run = compile_only
    for module in pkgutil.iter_modules(launches.__path__):
        launch = importlib.import_module(f"{launches.__name__}.{module.name}").launch
        for dtype in DTYPES:
            scenario = f"{module.name} {dtype}"
            with FakeTensorMode(), torch.no_grad():
                launch(dtype)
    for compiled, kernel in found.values():
        _examine(compiled, kernel)
    return [compiled for compiled, _ in found.values()]


def has_whole_vectors(tensor: Tensor) -> bool:
    """Whether Triton can load it by 16 bytes: dense rows, their width and distance multiples of 16.

    16 elements, for that is what Triton looks for in an argument. Vectors, and integers, which are
    indices, may be any.
    """
    sizes = [(size, tensor.stride(d)) for d, size in enumerate(tensor.shape) if size > 1]
    if len(sizes) < 2 or not tensor.is_floating_point():
        return True
    dense = [size for size, stride in sizes[-2:] if stride == 1]
    apart = [stride for _, stride in sizes if stride != 1]
    return len(dense) == 1 and all(n % 16 == 0 and n > 0 for n in (*dense, *apart))


def in_place(tensors: list[Tensor]) -> bool:
    """Whether two of a launch's tensors begin at one address: it writes over what it reads."""
    starts = [
        (tensor.untyped_storage()._cdata, tensor.storage_offset() * tensor.itemsize)
        for tensor in tensors
    ]
    return len(set(starts)) < len(starts)


def kernels() -> set[str]:
    """Names of all functions that are launched: by convention, they end in `_kernel`."""
    names = set()
    for path in Path(memdlm_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                names.add(node.name)
    return names


def problems(compiled: list[Compiled], capability: int) -> list[str]:
    """What is wrong with the kernels of an architecture, a line each."""
    found = [f"{name} is not launched" for name in kernels() - {each.kernel for each in compiled}]
    for each in compiled:
        found += [f"{each.kernel} ({each.launched_by}): {text}" for text in wrong(each, capability)]
    # One that is launched with odd sizes alone would be asked for nothing.
    streaming = {each.kernel for each in compiled if any(load.most > 4 for load in each.loads)}
    vectors = {each.kernel for each in compiled if each.whole_vectors}
    found += [f"{name} is not launched with whole vectors" for name in streaming - vectors]
    return found


def wrong(compiled: Compiled, capability: int) -> list[str]:
    """What is wrong with one kernel."""
    found = []
    if compiled.stack > 0:
        found.append(f"spills: {compiled.stack} bytes of stack")
    if compiled.shared > SHARED[capability]:
        found.append(f"{compiled.shared} bytes of shared memory")
    if compiled.registers > REGISTERS:
        found.append(f"{compiled.registers} registers")
    if compiled.in_place and compiled.asynchronous_copies:
        # A copy of the next block would be under way while this one's results are written there.
        found.append("writes over what it reads, and reads ahead with asynchronous copies")
    # Of float32 the tensor cores take one order of each operand, from Hopper on: the other order is
    # turned on its way to shared memory, element by element.
    turned = any(dot.tensor_cores and dot.operands == "f32" for dot in compiled.dots)
    if compiled.whole_vectors and not turned:
        found += [
            f"{load.place} loads {load.bytes} bytes at a time, not {load.most}"
            for load in compiled.loads
            if load.bytes < load.most
        ]
    if capability == 90:
        found += [
            f"a product of {dot.rows} rows in {dot.operands} is no wgmma"
            for dot in compiled.dots
            if dot.tensor_cores and dot.rows >= WGMMA_ROWS and not dot.wgmma
        ]
    return found


def _mock(value: Any) -> Any:
    return MockTensor(value.dtype) if isinstance(value, FakeTensor) else value


def _examine(compiled: Compiled, kernel: Any) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [_CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    compiled.registers, compiled.stack = (
        int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK")
    )
    compiled.shared = kernel.metadata.shared
    ttir, ttgir, ptx = (kernel.asm[stage] for stage in ("ttir", "ttgir", "ptx"))
    compiled.dots = assembly.dots(ttgir)
    compiled.loads = assembly.loads(ttir, ptx, threads=32 * kernel.metadata.num_warps)
    compiled.asynchronous_copies = assembly.asynchronous_copies(ptx)


def main(capability: int) -> None:
    for compiled in compile_all(capability):
        print(json.dumps(dataclasses.asdict(compiled)))


if __name__ == "__main__":
    main(int(sys.argv[1]))
