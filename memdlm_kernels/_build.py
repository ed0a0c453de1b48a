"""What the compiled part of this installation contains."""

import importlib
from typing import Any

from memdlm_kernels._backends import library_missing

_FACTS = (
    *("version", "torch_version", "torch_abi", "compiler", "cpu", "cuda", "cuda_architectures"),
)


def build_info() -> dict[str, Any]:
    """Say what was built, for a bug report or to see why an op runs on its reference.

    Returns:
        built: bool, whether the compiled ops are loaded.
        missing: str, why they are not, or None.
        version: str, of this package when it was built.
        torch_version: str, of the torch that it was built against.
        torch_abi: str, the oldest torch that it loads in.
        compiler: str, name and version.
        cpu: bool, whether the CPU ops are in it.
        cuda: bool, whether the CUDA ops are.
        cuda_architectures: tuple of int, those that they were compiled for.

        The facts of the build are None where nothing was built.
    """
    try:
        built: Any = importlib.import_module("memdlm_kernels._build_info")
    except ModuleNotFoundError:
        built = None
    facts = {name: getattr(built, name, None) for name in _FACTS}
    return {"built": library_missing is None, "missing": library_missing, **facts}
