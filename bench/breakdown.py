"""Where the time of a training step goes, and what it asks of the host, from one profile of it."""

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import record_function

# The parts are the ranges with these prefixes; where they nest, the innermost counts.
_RANGES = ("memdlm.", "bench.")
_STEPS = "bench.steps"
# Operators whose result or its shape the host needs, so that on a GPU it waits for the device.
_READS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}


@dataclass(frozen=True)
class Breakdown:
    """One step, taken apart.

    Attributes:
        parts_ms: part to its time. On a CPU the time in the part's range; on a GPU the device's
            time for what was launched there. `rest` is what remains of the step: on a GPU also the
            time in which the device waits for the host.
        calls: operators that are dispatched, without those that another operator calls.
        launches: kernels, without copies and fills; None on a CPU.
        host_reads: places where the host reads a value off the device, or a shape that depends on
            values. The same operators count on a CPU, where they are cheap. The optimiser's are
            left out: its step counters lie on the host.
    """

    parts_ms: dict[str, float]
    calls: int
    launches: int | None
    host_reads: int


class Event(NamedTuple):
    """What is read of an event of the profiler; times in nanoseconds."""

    name: str
    start: int
    end: int
    correlation: int = 0
    on_device: bool = False
    is_annotation: bool = False


def profile_steps(run: Callable[[], object], count: int, device: torch.device) -> Breakdown:
    """Profile steps that have run before.

    Args:
        run: takes the steps.
        count: how many steps those are; the figures are of one, on average.
        device: what they run on.

    Returns:
        The breakdown.
    """
    on_gpu = device.type == "cuda"
    with torch.autograd.profiler.profile(use_device="cuda" if on_gpu else None) as profiler:
        start = time.perf_counter()
        with record_function(_STEPS):
            run()
        if on_gpu:
            torch.cuda.synchronize(device)
        total_ms = 1e3 * (time.perf_counter() - start)
    # Not `profiler.function_events`: its tree of Python objects takes a minute for 10^6 events.
    results: Any = profiler.kineto_results
    return analyse(map(_event, results.events()), total_ms, count, on_gpu=on_gpu)


def _event(raw: Any) -> Event:
    return Event(
        raw.name(),
        raw.start_ns(),
        raw.end_ns(),
        raw.correlation_id(),
        raw.device_type() != DeviceType.CPU,
        raw.is_user_annotation(),
    )


def analyse(events: Iterable[Event], total_ms: float, count: int, *, on_gpu: bool) -> Breakdown:
    """Make a breakdown of a profile's events.

    Args:
        events: in any order.
        total_ms: wall time of all steps.
        count: how many steps there were.
        on_gpu: whether the parts are of the device's time.

    Returns:
        The breakdown of one step.
    """
    ranges, operators, waiting, launched, kernels = [], [], [], {}, []
    for event in events:
        name = event.name
        if event.on_device:
            # The ranges are drawn a second time on the device's own time line.
            if not event.is_annotation and not name.startswith(_RANGES):
                kernels.append(event)
        elif name.startswith(_RANGES):
            ranges.append(event)
        elif name.startswith("cu"):
            launched[event.correlation] = event.start
            if name in _WAITS:
                waiting.append(event)
        elif _is_operator(name):
            operators.append(event)
    timeline = _Timeline(ranges)
    spent_ns: dict[str, float] = defaultdict(float)
    if on_gpu:
        for kernel in kernels:
            part = timeline.part_at(launched.get(kernel.correlation, kernel.start))
            spent_ns[part] += kernel.end - kernel.start
    else:
        spent_ns.update(timeline.spent_ns())
    parts_ms = {
        name.partition(".")[2]: round(spent / 1e6 / count, 3)
        for name, spent in spent_ns.items()
        if name not in ("", _STEPS)
    }
    parts_ms["rest"] = round(total_ms / count - sum(parts_ms.values()), 3)
    reads = [
        event
        for event in _outermost(waiting + [each for each in operators if each.name in _READS])
        if timeline.part_at(event.start) not in ("", "bench.optimizer")
    ]
    real = sum(not kernel.name.startswith(("Memcpy", "Memset")) for kernel in kernels)
    return Breakdown(
        parts_ms,
        calls=round(sum(1 for _ in _outermost(operators)) / count),
        launches=round(real / count) if on_gpu else None,
        host_reads=round(len(reads) / count),
    )


def _is_operator(name: str) -> bool:
    """Whether the name is an operator's (aten::mm), and not a node's of the graph."""
    return "::" in name and not name.startswith(("autograd::", "torch::"))


def _outermost(events: list[Event]) -> Iterator[Event]:
    """Those that lie in no other. Threads take turns: one waits while the other runs backward."""
    end = 0
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        if event.start >= end:
            end = event.end
            yield event


class _Timeline:
    """Which range is the innermost at a time."""

    def __init__(self, ranges: list[Event]) -> None:
        self._starts: list[int] = []
        self._names: list[str] = []
        stack: list[Event] = []
        for event in sorted(ranges, key=lambda event: (event.start, -event.end)):
            self._close(stack, event.start)
            stack.append(event)
            self._mark(event.start, event.name)
        self._close(stack, float("inf"))

    def _close(self, stack: list[Event], until: float) -> None:
        while stack and stack[-1].end <= until:
            ended = stack.pop()
            self._mark(ended.end, stack[-1].name if stack else "")

    def _mark(self, start: int, name: str) -> None:
        self._starts.append(start)
        self._names.append(name)

    def part_at(self, time_ns: int) -> str:
        """Name of the range, empty outside all of them."""
        found = bisect_right(self._starts, time_ns) - 1
        return self._names[found] if found >= 0 else ""

    def spent_ns(self) -> dict[str, float]:
        """Range to the time that is its own."""
        spent: dict[str, float] = defaultdict(float)
        for name, (start, end) in zip(self._names, pairwise(self._starts), strict=False):
            spent[name] += end - start
        return spent
