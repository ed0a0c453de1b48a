"""Where the time of a training step goes, from one profile of it."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import record_function

from bench.timing import profiled

# The parts are the ranges with these prefixes; where they nest, the innermost counts.
_RANGES = ("memdlm.", "bench.")
_STEPS = "bench.steps"


@dataclass(frozen=True)
class Breakdown:
    """One step, taken apart.

    Attributes:
        parts_ms: part to its time. On a CPU the time in the part's range; on a GPU the device's
            time for what was launched there. `rest` is what remains of the step: on a GPU also the
            time in which the device waits for the host.
        calls: operators that are dispatched, without those that another operator calls.
        launches: kernels, without copies and fills; None on a CPU.
    """

    parts_ms: dict[str, float]
    calls: int
    launches: int | None


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

    def marked() -> None:
        with record_function(_STEPS):
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    events = map(_event, profiled(marked, device))
    return analyse(events, count, on_gpu=device.type == "cuda")


def _event(raw: Any) -> Event:
    return Event(
        raw.name(),
        raw.start_ns(),
        raw.end_ns(),
        raw.correlation_id(),
        raw.device_type() != DeviceType.CPU,
        raw.is_user_annotation(),
    )


def analyse(events: Iterable[Event], count: int, *, on_gpu: bool) -> Breakdown:
    """Make a breakdown of a profile's events.

    Args:
        events: in any order; one is the range of all the steps.
        count: how many steps there were.
        on_gpu: whether the parts are of the device's time.

    Returns:
        The breakdown of one step.
    """
    ranges, operators, launched, kernels = [], [], {}, []
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
    (total_ms,) = ((each.end - each.start) / 1e6 for each in ranges if each.name == _STEPS)
    parts_ms["rest"] = round(total_ms / count - sum(parts_ms.values()), 3)
    real = sum(not kernel.name.startswith(("Memcpy", "Memset")) for kernel in kernels)
    return Breakdown(
        parts_ms,
        calls=round(_count_outermost(operators) / count),
        launches=round(real / count) if on_gpu else None,
    )


def _is_operator(name: str) -> bool:
    """Whether the name is an operator's (aten::mm), and not a node's of the graph."""
    return "::" in name and not name.startswith(("autograd::", "torch::"))


def _count_outermost(events: list[Event]) -> int:
    """How many lie in no other. Threads take turns: one waits while the other runs backward."""
    count, end = 0, 0
    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        if event.start >= end:
            count, end = count + 1, event.end
    return count


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
