"""Make .venv ready: packages, torch, and the C++ ops built and installed in editable mode.

Needs only a Python with its headers and a C++ compiler. A stamp in .venv remembers what was
installed and built from which sources, so a second run does nothing and an edited C++ file is
rebuilt without touching the packages.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - this file is what an older Python meets first
    sys.exit(
        "setup: needs Python 3.11 or later, got "
        + sys.version.split()[0]
        + "; name another with: make PYTHON=python3.12 setup"
    )

import tomllib

from find_nvcc import machine_nvcc
from find_torch import Torch, find_torch

TORCH_RELEASE = "2.13.0"

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "memdlm-setup.json"
CONSTRAINTS = ROOT / "constraints.txt"
# What of the environment decides what is built.
BUILD_VARIABLES = (
    "CUDAARCHS",
    "CUDACXX",
    "CUDA_HOME",
    "CXX",
    "MEMDLM_CPU_OPS",
    "MEMDLM_CUDA",
    "TORCH_CUDA_ARCH_LIST",
)
# Where an installed package's folder may lie, as against the standard library and the script's.
SITE_FOLDERS = ("site-packages", "dist-packages")


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def check_tools() -> None:
    problems = []
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        problems.append(f"a C++ compiler ({compiler} is not on the path; CXX may name another)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        problems.append(f"the headers of {sys.executable} (on Debian: python3-dev)")
    if not ((VENV / "bin/pip").exists() or _can_make_venv()):
        problems.append(f"{sys.executable} -m venv with pip (on Debian: python3-venv)")
    if problems:
        sys.exit("setup: this machine lacks " + "; and ".join(problems))


def _can_make_venv() -> bool:
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return False
    return True


def make_venv() -> None:
    """Create .venv; where this Python has a fit torch, .venv sees that one."""
    say(f"creating .venv with Python {sys.version.split()[0]}")
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    torch = find_torch()
    if torch is not None and torch.fits:
        # Not --system-site-packages: from inside a virtual environment that means the base
        # Python's packages, not that environment's.
        folders = [path for path in sys.path if Path(path).name in SITE_FOLDERS]
        site = sysconfig.get_path("purelib", vars={"base": str(VENV)}, scheme="venv")
        Path(site, "outer-torch.pth").write_text("\n".join(folders) + "\n", encoding="utf-8")


def venv_torch() -> Torch | None:
    command = [str(VENV / "bin/python"), "-E", "-P", str(ROOT / "tools/find_torch.py")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return Torch(Path(lines[0]), lines[1]) if lines else None


def has_nvidia_driver() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True).returncode == 0


def torch_requirement() -> str:
    torch = venv_torch()
    if torch is not None and torch.fits:
        say(f"using the torch {torch.version} that is there")
        return f"torch=={torch.version}"
    if has_nvidia_driver():
        say(f"NVIDIA driver found: torch {TORCH_RELEASE}, the ordinary build")
        return f"torch=={TORCH_RELEASE},!={TORCH_RELEASE}+cpu"
    # pip prefers the local version "+cpu" wherever one of its indexes has it.
    say(
        f"no NVIDIA driver: torch {TORCH_RELEASE}, the CPU build if pip is set up with an index "
        "that has it (PIP_EXTRA_INDEX_URL), else the ordinary one, which is larger"
    )
    return f"torch=={TORCH_RELEASE}"


def pip_install(*arguments: str) -> None:
    # --no-compile: of thousands of modules few are ever imported, and those are compiled then.
    options = ["-qq", "--disable-pip-version-check", "--no-compile"]
    command = [str(VENV / "bin/python"), "-m", "pip", "install", *options, *arguments]
    finished = subprocess.run(command, cwd=ROOT)
    if finished.returncode != 0:
        sys.exit("setup: pip failed, see above")


def let_wheel_nvcc_link() -> None:
    """NVIDIA's wheels have a folder lib, and their nvcc looks in lib64."""
    command = [str(VENV / "bin/python"), "-E", "-P", str(ROOT / "tools/find_nvcc.py")]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if found and machine_nvcc() is None:
        lib64 = Path(found).parent.parent / "lib64"
        if not lib64.exists():
            lib64.symlink_to("lib")


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_stamp() -> dict[str, str]:
    if not STAMP.exists():
        return {}
    stamp: dict[str, str] = json.loads(STAMP.read_text(encoding="utf-8"))
    return stamp


def write_stamp(**stamp: str) -> None:
    STAMP.write_text(json.dumps(stamp), encoding="utf-8")


def main() -> None:
    check_tools()
    start = time.monotonic()
    with open(ROOT / "pyproject.toml", "rb") as file:
        pyproject = tomllib.load(file)
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    groups = [pyproject["build-system"]["requires"], project["dependencies"]]
    groups += [extras[name] for name in ("train", "eval", "dev")]
    if machine_nvcc() is None:
        groups.append(extras["nvcc"])
    requirements = sorted(
        requirement
        for group in groups
        for requirement in group
        if not requirement.startswith(project["name"])
    )

    if not (VENV / "bin/pip").exists():
        make_venv()
    with open(VENV / "setup.lock", "w") as lock:
        # Two runs of make at once would install over each other.
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = read_stamp()

        packages = digest(requirements, CONSTRAINTS.read_text(encoding="utf-8"))
        if before.get("packages") != packages:
            torch = torch_requirement()
            say("installing the packages (a minute or two the first time)")
            pip_install("-c", str(CONSTRAINTS), torch, *requirements)
            let_wheel_nvcc_link()
            write_stamp(packages=packages)

        native = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
        native += [ROOT / "CMakeLists.txt", *sorted((ROOT / "tools").glob("*.py"))]
        build = digest(
            [(str(path.relative_to(ROOT)), path.read_bytes().hex()) for path in native],
            [pyproject["build-system"], project, pyproject["tool"]["scikit-build"]],
            [str(venv_torch()), str(ROOT)],
            [os.environ.get(name) for name in BUILD_VARIABLES],
        )
        if before.get("build") != build:
            say("building the C++ ops")
            pip_install(
                *("--no-build-isolation", "--no-deps", "--editable", "."),
                *("--config-settings", "build-dir=build/editable"),
            )

        if before != {"packages": packages, "build": build}:
            write_stamp(packages=packages, build=build)
            say(f"ready in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
