"""What is built and shipped: the stable-ABI gate, the wheel, the imports, the pins."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from torch_abi_audit import inspect_extension
from torch_abi_audit.symbols import extract_undefined_symbols

from memdlm_kernels import _build_info
from tools.find_nvcc import find_nvcc

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path(_build_info.__file__).with_name("libmemdlm_C.so")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CUDA = find_nvcc() is not None
PACKAGES = {"memdlm_kernels": ROOT / "memdlm_kernels", "memdlm": ROOT / "python/memdlm"}


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def succeed(*command: str | Path, **environment: str) -> str:
    finished = run(*command, **environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def test_library_loads_in_the_oldest_torch() -> None:
    check_abi(LIBRARY)


def check_abi(library: Path) -> None:
    report = inspect_extension(library)
    assert report.error is None
    assert report.torch.unstable_symbols == ()
    assert report.torch.unknown_shim_symbols == ()
    assert report.torch.min_torch_version is not None
    assert release(report.torch.min_torch_version) <= release(_build_info.torch_abi), (
        report.torch.version_defining_symbols
    )


def test_sources_use_no_macro_that_the_oldest_torch_lacks() -> None:
    """Headers of a later torch define it whatever the target: only the oldest one's would tell."""
    later = "STABLE_TORCH_ERROR_CODE_CHECK"  # in 2.11 it is TORCH_ERROR_CODE_CHECK
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 10
    assert [str(path) for path in sources if later in path.read_text(encoding="utf-8")] == []


def test_library_is_free_of_python() -> None:
    assert not [s for s in extract_undefined_symbols(LIBRARY) if re.match("_?Py", s)]


def test_build_info_agrees_with_pyproject() -> None:
    assert _build_info.version == PYPROJECT["project"]["version"]
    assert PYPROJECT["project"]["dependencies"] == [f"torch>={_build_info.torch_abi}"]


def test_import_is_lean() -> None:
    code = "import sys, memdlm_kernels; print(*sys.modules)"
    loaded = {"transformers", "triton"} & set(succeed(sys.executable, "-c", code).split())
    assert loaded == set()


@pytest.mark.slow
def test_wheel_from_sdist(tmp_path: Path) -> None:
    """Built as a user builds it, installed where nothing but torch is, and used.

    With the CUDA ops where there is nvcc, a GPU or not, and whatever the torch.
    """
    build_sdist = f"import build_backend; build_backend.build_sdist({str(tmp_path)!r})"
    succeed(sys.executable, "-c", build_sdist, PYTHONPATH=str(ROOT / "tools"))
    (sdist,) = tmp_path.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    choice = {
        "MEMDLM_CUDA": "ON" if CUDA else "OFF",
        "CUDAARCHS": "",
        "TORCH_CUDA_ARCH_LIST": "9.0",
    }
    succeed(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, sdist, **choice)
    (wheel,) = tmp_path.glob("*.whl")

    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        f"memdlm_kernels/{LIBRARY.name}",
        f"memdlm_kernels/{Path(_build_info.__file__).name}",
    }
    for package, folder in PACKAGES.items():
        tracked = succeed("git", "-C", folder, "ls-files").split("\n")
        expected |= {f"{package}/{name}" for name in tracked if name and (folder / name).exists()}
    assert expected <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)

    # The outer site-packages are on this environment's path, but not their .pth files: so the
    # editable install under test elsewhere is not.
    environment = tmp_path / "venv"
    succeed(sys.executable, "-m", "venv", "--without-pip", environment)
    site = sysconfig.get_path("purelib", "venv", {"base": str(environment)})
    Path(site, "outer.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    python = environment / "bin/python"
    succeed(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    code = (
        "import memdlm, memdlm_kernels; from memdlm_kernels import _backends; "
        "print(memdlm.__file__, memdlm_kernels.__file__, _backends.library_missing)"
    )
    memdlm, kernels, missing = succeed(python, "-P", "-c", code).split()
    assert memdlm == f"{site}/memdlm/__init__.py"
    assert kernels == f"{site}/memdlm_kernels/__init__.py"
    assert missing == "None"
    assert (environment / "bin/memdlm").exists()

    check_abi(Path(site, "memdlm_kernels", LIBRARY.name))
    code = """
import json, torch, memdlm_kernels
has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = ("fast_weight_sgd_", "fast_weight_sgd_backward", "fast_weight_reset_")
info = memdlm_kernels.build_info()
registered = [has(f"memdlm_C::{op}", "CUDA") for op in ops]
print(json.dumps([info["cuda"], info["cuda_architectures"], registered]))
"""
    facts = json.loads(succeed(python, "-P", "-c", code))
    assert facts == [CUDA, [90] if CUDA else [], 3 * [CUDA]]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"MEMDLM_CUDA": "yes"}, "MEMDLM_CUDA must be AUTO, ON or OFF, got 'yes'"),
        ({"MEMDLM_CPU_OPS": "no"}, "MEMDLM_CPU_OPS must be ON or OFF, got 'no'"),
        ({"MEMDLM_CUDA": "ON", "CUDAARCHS": "native"}, "numbers such as 90 or 9.0, got 'native'"),
    ],
)
def test_build_says_which_choice_is_wrong(
    tmp_path: Path, choice: dict[str, str], message: str
) -> None:
    build = f"import build_backend; build_backend.build_wheel({str(tmp_path)!r})"
    path = os.pathsep.join([str(ROOT / "tools"), sysconfig.get_path("purelib")])
    finished = run(sys.executable, "-c", build, PYTHONPATH=path, **choice)
    assert finished.returncode != 0
    assert message in " ".join((finished.stdout + finished.stderr).split())


def test_build_without_torch_says_what_to_do(tmp_path: Path) -> None:
    succeed(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    finished = run(
        tmp_path / "venv/bin/python",
        "-c",
        "import build_backend; build_backend.build_wheel('unused')",
        PYTHONPATH=os.pathsep.join([str(ROOT / "tools"), sysconfig.get_path("purelib")]),
    )
    assert finished.returncode != 0
    assert "has no torch" in finished.stderr
    assert "pip install 'torch>=2.11'" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("group", ["build", "train", "eval", "dev", "nvcc"])
def test_every_tool_is_pinned(group: str) -> None:
    pins = dict(re.findall(r"^([a-z0-9-]+)(==|>=)", (ROOT / "constraints.txt").read_text(), re.M))
    project = PYPROJECT["project"]
    groups = {"build": PYPROJECT["build-system"]["requires"], **project["optional-dependencies"]}
    names = {re.match("[a-z0-9-]+", requirement)[0] for requirement in groups[group]}
    assert names - {project["name"]} <= pins.keys()
