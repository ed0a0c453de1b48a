"""A plan as text."""

from collections.abc import Iterable, Sequence

from memdlm.cost.flops import PARTS
from memdlm.cost.plan import ALL_ROWS, MASKED_ROWS, Plan

_GIB = 2**30
_MEMORY = {
    "weights": "weights",
    "AdamW state": "optimizer",
    "fast weights": "fast_weights",
    "gradients": "gradients",
    "activations": "activations",
    "total": "total",
}


def describe_plan(plan: Plan) -> str:
    """What `memdlm plan` prints.

    Args:
        plan: from `make_plan`.

    Returns:
        Lines of text.
    """
    options = plan.options
    kind = options.outer + (", checkpointed" if options.gradient_checkpointing else "")
    lines = [
        f"{options.model}, {options.batch_size} x {options.length} tokens, "
        f"{options.prompt:.0%} prompt, K = {options.k}, outer {kind}, {options.dtype}",
        "",
        *_products(plan),
        "",
        *_memory(plan),
        "",
        *_levers(plan),
    ]
    return "\n".join(lines)


def _products(plan: Plan) -> list[str]:
    costs = plan.costs
    unit, divisor = _unit(costs[ALL_ROWS].total_flops)
    lines = [_row(f"{unit} of one step", costs)]
    for part in PARTS:
        values = [cost.flops.get(part, 0.0) for cost in costs.values()]
        lines.append(_row(f"  {part}", (_number(value / divisor) for value in values)))
    totals = [cost.total_flops for cost in costs.values()]
    lines.append(_row("  total", (_number(total / divisor) for total in totals)))
    for standard in (ALL_ROWS, MASKED_ROWS):
        against = costs[standard].total_flops
        lines.append(_row(f"  / {standard}", (f"{total / against:.2f}" for total in totals)))
    return [
        *lines,
        "  Matrix products alone, the mean over t in (0, 1). The last two lines are the expected",
        "  cost ratio: a ratio of FLOPs, not of times.",
    ]


def _memory(plan: Plan) -> list[str]:
    memories = [cost.memory for cost in plan.costs.values()]
    lines = [_row("GiB at the peak", plan.costs)]
    for name, field in _MEMORY.items():
        values = [getattr(memory, field) / _GIB for memory in memories]
        lines.append(_row(f"  {name}", map(_number, values)))
    limit = plan.options.memory_gib
    if limit is not None:
        fits = ["yes" if memory.total <= limit * _GIB else "no" for memory in memories]
        lines.append(_row(f"  fits in {limit:g} GiB", fits))
    return [
        *lines,
        "  Of the batch that needs most (t = 1): what tensors hold. What ops and libraries hold",
        "  inside, the allocator's gaps and the CUDA context (about 1 GiB) come on top.",
    ]


def _levers(plan: Plan) -> list[str]:
    base = plan.costs[plan.base]
    now = base.memory.total
    lines = [
        f"{'levers on ' + plan.base:<30}{'FLOPs':>9}{'/ all rows':>12}{'GiB':>10}{'GiB':>9}",
        f"  {'':<28}{'a token':>9}{'':>12}{'at peak':>10}{'change':>9}",
    ]
    for lever in plan.levers:
        lines.append(
            f"  {lever.name:<28}{lever.flops_ratio - 1:>+9.1%}{lever.all_rows_ratio:>12.2f}"
            f"{_number(lever.total_bytes / _GIB):>10}"
            f"{(lever.total_bytes - now) / _GIB:>+9.2f}  {lever.price}"
        )
    fastest = min(plan.levers, key=lambda lever: lever.flops_ratio)
    smallest = min(plan.levers, key=lambda lever: lever.total_bytes)
    if fastest.flops_ratio < 1:
        lines.append(f"  Most time is saved by {fastest.name}.")
    if smallest.total_bytes < now:
        lines.append(f"  Most memory is saved by {smallest.name}.")
    return lines


def _unit(flops: float) -> tuple[str, float]:
    return ("TFLOP", 1e12) if flops >= 1e12 else ("GFLOP", 1e9)


def _number(value: float) -> str:
    """Three digits, or all before the point; a dash for nothing."""
    if not value:
        return "-"
    decimals = 3 if value < 1 else 2 if value < 10 else 1
    return f"{value:.{decimals}f}"


def _row(name: str, values: Iterable[str] | Sequence[str]) -> str:
    return f"{name:<24}" + "".join(f"{value:>13}" for value in values)
