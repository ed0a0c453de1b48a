"""Find the CUDA compiler that tests and builds use: the machine's, else that of NVIDIA's wheels.

Run as a script it prints nvcc's path, or nothing.
"""

import os
import shutil
import sys
from pathlib import Path


def find_nvcc() -> Path | None:
    """The nvcc to use, or None."""
    return machine_nvcc() or wheel_nvcc()


def machine_nvcc() -> Path | None:
    """What CUDACXX names, or CUDA_HOME has, or is on the path."""
    home = os.environ.get("CUDA_HOME")
    for name in (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc"):
        found = shutil.which(name) if name else None
        if found is not None:
            return Path(found)
    return None


def wheel_nvcc() -> Path | None:
    """That of the wheels this interpreter has."""
    found = [nvcc for folder in sys.path for nvcc in Path(folder).glob("nvidia/cu*/bin/nvcc")]
    return max(found, default=None)


if __name__ == "__main__":
    nvcc = find_nvcc()
    if nvcc is not None:
        print(nvcc)
