"""Time variants in alternation, measure their peak memory, and say on what machine."""

import ctypes
import functools
import gc
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import MEMORY_EVENT_NAME
from tqdm import tqdm

_ROOT = Path(__file__).parent.parent
_CACHE_BYTES = 1 << 28  # more than any GPU's L2
# What a figure depends on: code, and how it is built.
_SOURCES = ("memdlm_kernels", "python", "csrc", "bench", "CMakeLists.txt", "pyproject.toml")
_SOURCE_TYPES = {".py", ".cpp", ".h", ".cu", ".cuh", ".sh", ".txt", ".toml"}


def interleaved_ms(
    variants: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    every: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Run every variant once per round, so that a slow spell of the machine meets all of them.

    Args:
        variants: name to what is timed; each runs once untimed before.
        repeats: rounds, at least 1.
        device: waited for around each run.
        every: of a variant that is slow beside the others: n, to take part in each nth round alone.

    Returns:
        Name to `repeats` times in milliseconds, fewer for those in `every`.
    """
    for run in tqdm(variants.values(), desc="warm-up", leave=False):
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in tqdm(range(repeats), desc="rounds", leave=False):
        names = [name for name in variants if number % (every or {}).get(name, 1) == 0]
        # Another one begins each time: what runs before has its effect on caches and the allocator.
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            run = variants[name]
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def device_seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long `run` takes: on a GPU between two events on its stream, elsewhere by the clock.

    On a GPU the L2 cache is overwritten before, as what else a training step does would; meanwhile
    the host gets ahead, so that its first launch is not in the time.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _cache_filler(device).zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def _cache_filler(device: torch.device) -> torch.Tensor:
    return torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=device)


def percentiles(times_ms: list[float]) -> dict[str, float]:
    """p20, p50 and p80 of a list of times, as JSON fields."""
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    values = torch.tensor(times_ms, dtype=torch.float64).quantile(quantiles)
    names = ("p20_ms", "p50_ms", "p80_ms")
    return {name: round(value, 4) for name, value in zip(names, values.tolist(), strict=True)}


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """What tensors hold at the peak of `run` beyond what is held before it, in MiB.

    The allocator's count: on a GPU its peak; on a CPU the running total of what the profiler sees
    allocated and freed, where freeing what was held before does not count.
    """
    gc.collect()
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        wait(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    events = profiled(run, device, memory=True)
    changes = [event for event in events if event.name() == MEMORY_EVENT_NAME]
    changes.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in changes), initial=0)) / 2**20


def profiled(run: Callable[[], object], device: torch.device, *, memory: bool = False) -> list[Any]:
    """Events of the profiler while `run` runs, as they are recorded.

    Not its `function_events`: that tree of Python objects takes minutes for 10^6 events.

    Args:
        run: what is profiled.
        device: a GPU's kernels are among the events.
        memory: whether allocations are.

    Returns:
        Events with methods `name`, `start_ns`, `end_ns` and others.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports each start on stderr
    use_device = "cuda" if device.type == "cuda" else None
    with torch.autograd.profiler.profile(use_device=use_device, profile_memory=memory) as profiler:
        run()
        wait(device)
    results: Any = profiler.kineto_results
    return results.events()


def rss_mib(run: Callable[[], object]) -> float:
    """Growth of the process's resident size at the peak of `run`, in MiB (Linux, CPU).

    It holds what `peak_mib` counts, and scratch memory of libraries, code and what the C library
    keeps; what earlier runs freed is given back to the system before.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present size
    before_kib = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before_kib) / 1024


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what this runs: JSON fields that every measurement carries."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    # What a run itself writes does not count: it would spoil its own later rows.
    written = (":(exclude)bench/results", ":(exclude)README.md")
    changes = _git("status", "--porcelain", "--", ".", *written)
    if changes is None and "COMMIT" in os.environ:
        changes = ""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        # A copy of the tree without its history is told where it is from.
        "commit": _git("rev-parse", "HEAD") or os.environ.get("COMMIT"),
        "dirty": None if changes is None else bool(changes),
        "sources": source_digest(_ROOT),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["driver"] = _driver()
    return facts


def source_digest(root: Path) -> str:
    """SHA-256 of the sources below `root`, names and contents.

    A copy of the tree without its history knows no commit; what it was a copy of is found by this
    (`bench.land`).
    """
    files = [path for name in _SOURCES for path in ((root / name), *(root / name).rglob("*"))]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file() and path.suffix in _SOURCE_TYPES):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def write_rows(path: str | Path | None, rows: list[dict[str, Any]]) -> None:
    """Append one JSON line per measurement to a file; nothing where `path` is None."""
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def wait(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*words: str) -> str | None:
    try:
        result = subprocess.run(("git", "-C", _ROOT, *words), capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _driver() -> str | None:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        result = subprocess.run(query, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return result.stdout.split()[0] if result.returncode == 0 else None
