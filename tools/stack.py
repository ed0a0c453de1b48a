"""Make .stack, the GPU machine's software without a GPU, and check this package on it.

It is torch's ordinary CUDA build. The CUDA libraries that it links take 3 GB and are not installed:
for each of them there is a library of stubs, whose every function answers that there is no device.
So torch is imported, computes on the CPU, and Triton compiles for a GPU. The checks are
`tests/on_stack.py`. A stamp in .stack remembers by which version of this file it was made: a second
run only checks.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STACK = ROOT / ".stack"
STAMP = STACK / "stack-made-by"
PYTHON = STACK / "bin/python"
VERSION = "3.12"

# As the GPU machine has them, where a version matters; those without one are the newest.
PACKAGES = (
    *("transformers==5.17.0", "tokenizers==0.23.2", "safetensors==0.8.0", "numpy==2.5.2"),
    *("huggingface-hub==1.33.0", "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis"),
    *("matplotlib", "psutil", "pyyaml", "tensorboard", "tqdm"),
    # What torch asks for beside CUDA.
    *("filelock", "fsspec", "jinja2", "networkx", "setuptools<82", "sympy", "typing-extensions"),
)
# Without what they ask for: the CUDA libraries, or torch and thereby these.
ALONE = ("torch==2.11.0", "triton==3.6.0", "accelerate==1.15.0", "peft>=0.19")

NO_DEVICE = 100  # cudaErrorNoDevice and CUDA_ERROR_NO_DEVICE; no success to the other libraries


def say(text: str) -> None:
    print(f"stack: {text}", flush=True)


def run(*command: str | Path) -> str:
    """What a command prints; ends with its errors where it fails."""
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if finished.returncode != 0:
        sys.exit(f"stack: {Path(command[0]).name} failed:\n{finished.stdout}{finished.stderr}")
    return finished.stdout


def find_python() -> Path:
    """A Python of the GPU machine's version: PYTHON312, else on the path or one of pyenv's."""
    named = os.environ.get("PYTHON312")
    if named:
        candidates = [Path(shutil.which(named) or named)]
    else:
        on_path = shutil.which(f"python{VERSION}")
        pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
        candidates = [] if on_path is None else [Path(on_path)]
        candidates += sorted(pyenv.glob(f"versions/{VERSION}.*/bin/python{VERSION}"))
    # Asked, for pyenv's command on the path may refuse. ensurepip is what `venv` needs.
    question = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
    for python in candidates:
        if python.exists():
            answer = subprocess.run([python, "-c", question], capture_output=True, text=True)
            if answer.stdout.strip() == VERSION:
                return python
    found = f"PYTHON312 is {named}" if named else "none is on the path or among pyenv's"
    sys.exit(
        f"stack: needs Python {VERSION} with venv, and {found}; "
        f"name one with: make stack PYTHON312=/path/to/python{VERSION}"
    )


def check_tools() -> None:
    missing = [tool for tool in ("gcc", "nm", "readelf") if shutil.which(tool) is None]
    if missing:
        sys.exit(f"stack: needs {', '.join(missing)} on the path (on Debian: gcc and binutils)")


def make_environment(python: Path) -> None:
    say(f"creating .stack with {python}")
    shutil.rmtree(STACK, ignore_errors=True)
    run(python, "-m", "venv", STACK)
    pip = (PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-compile")
    say(f"installing {ALONE[0]} and {ALONE[1]}, 720 MB, and the packages around them")
    run(*pip, *PACKAGES)
    run(*pip, "--no-deps", *ALONE)


def make_stubs() -> None:
    """Put a library of stubs beside torch's for each of the CUDA libraries that is not there."""
    (torch,) = STACK.glob("lib/python*/site-packages/torch/lib")
    libraries = sorted(torch.glob("*.so"))
    defined = {name for library in libraries for name, _ in symbols(library, "--defined-only")}
    # soname -> version node, "" for none -> functions
    stubs: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for library in libraries:
        needed = re.findall(r"NEEDED.*\[(.+)\]", run("readelf", "--dynamic", "--wide", library))
        missing = [soname for soname in needed if not can_load(torch, soname)]
        if not missing:
            continue
        for soname in missing:
            stubs[soname]  # also one of which nothing is used
        nodes = version_nodes(library)
        # A function without a version is found in whichever library defines it.
        unversioned = next((soname for soname in missing if soname not in nodes.values()), None)
        for name, version in symbols(library, "--undefined-only"):
            if version:
                if nodes[version] in missing:
                    stubs[nodes[version]][version].add(name)
            # C++'s and Python's own functions have no versions either.
            elif unversioned and name not in defined and not name.startswith(("_", "Py")):
                stubs[unversioned][""].add(name)
    for soname, versions in stubs.items():
        compile_stubs(torch / soname, versions)
    count = sum(len(names) for versions in stubs.values() for names in versions.values())
    say(f"{count} stubs in place of {len(stubs)} CUDA libraries")


def can_load(torch: Path, soname: str) -> bool:
    if (torch / soname).exists():
        return True
    try:
        ctypes.CDLL(soname)
    except OSError:
        return False
    return True


def symbols(library: Path, which: str) -> set[tuple[str, str]]:
    """(name, version or "") of a library's dynamic symbols, but for those it can do without."""
    lines = run("nm", "--dynamic", which, library).splitlines()
    found = (line.split()[-2:] for line in lines)
    return {
        (name.partition("@")[0], name.split("@")[-1] if "@" in name else "")
        for kind, name in found
        if kind not in ("w", "v")
    }


def version_nodes(library: Path) -> dict[str, str]:
    """Version node to the soname of the library that must define it."""
    nodes, soname = {}, ""
    for line in run("readelf", "--version-info", "--wide", library).splitlines():
        if file := re.search(r"\bFile: (\S+)", line):
            soname = file[1]
        elif node := re.search(r"\bName: (\S+) .*\bFlags:", line):
            nodes[node[1]] = soname
    return nodes


def compile_stubs(path: Path, versions: dict[str, set[str]]) -> None:
    names = sorted(name for group in versions.values() for name in group)
    with tempfile.TemporaryDirectory() as folder:
        source, script = Path(folder, "stubs.c"), Path(folder, "stubs.map")
        source.write_text("".join(f"int {name}() {{ return {NO_DEVICE}; }}\n" for name in names))
        script.write_text(
            "".join(
                f"{version} {{ global: {'; '.join(sorted(group))}; }};\n"
                for version, group in versions.items()
                if version
            )
        )
        linking = [f"-Wl,-soname,{path.name}"]
        if script.read_text():
            linking.append(f"-Wl,--version-script,{script}")
        run("gcc", "-shared", "-fPIC", "-w", *linking, "-o", path, source)


def main() -> int:
    start = time.monotonic()
    made_by = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if not STAMP.exists() or STAMP.read_text() != made_by:
        check_tools()
        make_environment(find_python())
        make_stubs()
        run(PYTHON, "-c", "import torch, triton")
        STAMP.write_text(made_by)
        say(f".stack is ready in {time.monotonic() - start:.0f} s")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([PYTHON, "-m", "tests.on_stack"], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
