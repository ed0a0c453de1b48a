"""Which implementation of an op runs: the only dispatch code of the package."""

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_LIBRARY = Path(__file__).with_name("libmemdlm_C.so")
# What the C++ ops may use of a CPU, at most (csrc/cpu/instruction_set.h).
_CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")


def _load_library() -> str | None:
    """Load the compiled ops (namespace `memdlm_C`); return why they are missing, None if loaded."""
    if not _LIBRARY.exists():
        return f"the compiled extension is not built ({_LIBRARY.name} is missing)"
    asked = os.environ.get("MEMDLM_CPU_CAPABILITY")
    if asked is not None and asked not in _CAPABILITIES:
        raise ValueError(
            f"MEMDLM_CPU_CAPABILITY must be one of {', '.join(_CAPABILITIES)}, got {asked!r}"
        )
    torch.ops.load_library(_LIBRARY)
    return None


def _built() -> tuple[bool, tuple[int, ...]]:
    """(whether the CPU ops are in the build, the architectures that the CUDA ops are for)."""
    try:
        built: Any = importlib.import_module("memdlm_kernels._build_info")
    except ModuleNotFoundError:
        return True, ()
    return built.cpu, built.cuda_architectures if built.cuda else ()


library_missing: str | None = _load_library()
# Read now: torch.compile traces the choice of a backend, and could not trace an import.
_has_cpu_ops, _cuda_architectures = _built()


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: what a caller passes as `backend=`.
        unfit: called with the facts that the op passes to `choose`; returns the reason why this
            backend cannot run on them, None where it can.
    """

    name: str
    unfit: Callable[..., str | None]


def _cpu_unfit(device: torch.device, *_: Any) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device.type}"
    if not _has_cpu_ops:
        return "this build leaves the CPU ops out (MEMDLM_CPU_OPS=OFF at installation)"
    return library_missing


def _cuda_unfit(device: torch.device, *_: Any) -> str | None:
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if library_missing is not None:
        return library_missing
    if not _cuda_architectures:
        return "this build has no CUDA (MEMDLM_CUDA=ON at installation forces it)"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    major, minor = torch.cuda.get_device_capability(device)
    capability, architectures = 10 * major + minor, _cuda_architectures
    # Machine code runs on its own generation from its own revision on; PTX on all later ones.
    if capability >= max(architectures) or any(
        architecture // 10 == major and architecture <= capability for architecture in architectures
    ):
        return None
    return f"this build is for {architectures}, and the GPU is sm_{capability}"


def _triton_unfit(device: torch.device, dtype: torch.dtype, *_: Any) -> str | None:
    if dtype == torch.float64:
        return f"the tensors must be float32, bfloat16 or float16, got {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (8, 0) else f"the GPU is older than sm_80: sm_{capability}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the tensors are on {device.type} (on the CPU only TRITON_INTERPRET=1 runs it, slowly)"


# All look at the device of the op's tensors, and Triton at their dtype; an op may pass more.
CPU = Backend("cpu", _cpu_unfit)
CUDA = Backend("cuda", _cuda_unfit)
TRITON = Backend("triton", _triton_unfit)
REFERENCE = Backend("reference", lambda *_: None)


# How often `reference_ops` was entered. A number of the module, so that torch.compile can trace the
# choice and guard on it.
_reference_depth = 0


@contextlib.contextmanager
def reference_ops() -> Iterator[None]:
    """In here every op that is not told a backend runs its reference.

    A reference is plain PyTorch, and can be differentiated as often as one likes; the other
    backends can once. Under this context a function that calls ops can be too. It holds for all
    threads.
    """
    global _reference_depth
    _reference_depth += 1
    try:
        yield
    finally:
        _reference_depth -= 1


def preferred(requested: str | None) -> str | None:
    """What a caller asked for: a backend's name, or the reference's under `reference_ops`."""
    return REFERENCE.name if requested is None and _reference_depth > 0 else requested


def choose(op: str, order: Sequence[Backend], requested: str | None, *facts: Any) -> str:
    """Name of the backend that runs `op` on these inputs.

    Args:
        op: name of the op, for the error text.
        order: the op's backends, preferred first.
        requested: a backend's name, or None for the first in `order` that fits, and under
            `reference_ops` for the reference.
        facts: what each backend's `unfit` looks at; tensors' device, dtype and shape only.

    Returns:
        The name of the backend.

    Raises:
        ValueError: `requested` is no backend of this op, or cannot run here; or none can.
    """
    requested = preferred(requested)
    reasons = []
    for backend in order:
        if requested is not None and backend.name != requested:
            continue
        reason = backend.unfit(*facts)
        if reason is None:
            return backend.name
        reasons.append(f"{backend.name}: {reason}")
    if requested is not None and not reasons:
        names = ", ".join(repr(backend.name) for backend in order)
        raise ValueError(f"{op}: backend must be None or one of {names}, got {requested!r}")
    raise ValueError(f"{op}: no backend can run on these inputs ({'; '.join(reasons)})")


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """`torch.autocast(device, enabled=False)`, at no cost where autocast is off already."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
