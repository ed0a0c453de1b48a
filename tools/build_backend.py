"""scikit-build-core, told where the torch that is already installed lies, and nvcc.

pip isolates a build by laying its own folders over PYTHONPATH, so an interpreter that ignores the
environment still sees the real site-packages, and torch in it.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from find_torch import MINIMUM, Torch
from scikit_build_core import build as skbuild
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, Any] | None


def _ask(script: str) -> list[str]:
    """The lines that a script beside this one prints, outside of pip's isolation."""
    command = [sys.executable, "-E", "-P", str(Path(__file__).with_name(script))]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def _with_torch(settings: Settings) -> dict[str, Any]:
    for nvcc in _ask("find_nvcc.py"):
        os.environ["CUDACXX"] = nvcc  # where CMake looks first
    lines = _ask("find_torch.py")
    torch = Torch(Path(lines[0]), lines[1]) if lines else None
    if torch is None or not torch.fits:
        found = f"torch {torch.version}" if torch else "no torch"
        minimum = ".".join(map(str, MINIMUM))
        sys.exit(
            f"memdlm-kernels is built against the torch already installed, {minimum} or later; "
            f"{sys.executable} has {found}.\n"
            f"Install it first, then try again: pip install 'torch>={minimum}'\n"
            "Where the front end builds in an environment of its own (uv, python -m build), "
            "also switch its build isolation off."
        )
    return {**(settings or {}), "cmake.define.MEMDLM_TORCH_DIR": str(torch.directory)}


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    return skbuild.build_wheel(wheel_directory, _with_torch(config_settings), metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    return skbuild.build_editable(wheel_directory, _with_torch(config_settings), metadata_directory)
