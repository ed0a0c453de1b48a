"""What one training step costs: `python -m bench.step --model llada_moe_small --k 1 2 3 4`.

The variants (`bench.variants`) run on the same batches, interleaved in one process. Each gives one
row: times, peak memory, FLOPs, and where the time goes.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula
from tqdm import tqdm

import memdlm_kernels.flops  # noqa: F401 - registers the formulas
from bench.breakdown import profile_steps
from bench.cases import MODELS, SMALL, StepCase
from bench.operator_counts import OperatorCounts
from bench.ratios import time_over
from bench.timing import interleaved_ms, machine, peak_mib, percentiles, rss_mib, write_rows
from bench.variants import Step, check_losses, collation_ms, make_steps, memory_of
from memdlm.models.published import PUBLISHED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    batch_size, heads, rows, width = query
    return 2 * batch_size * heads * rows * key[2] * (width + value[3])


def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    # Five matrix products where the forward has two: the scores again, and four gradients.
    return _attention_flops(query, key, value) * 5 // 2


# The counter does not know the CPU's attention, and before torch 2.12 it refuses keys that several
# query heads share.
for _kernel in (
    "flash_attention",
    "efficient_attention",
    "cudnn_attention",
    "flash_attention_for_cpu",
):
    for _direction, _formula in (("", _attention_flops), ("_backward", _attention_backward_flops)):
        _name = f"_scaled_dot_product_{_kernel}{_direction}"
        if hasattr(torch.ops.aten, _name):
            flop_registry.pop(getattr(torch.ops.aten, _name), None)
            _register: Any = register_flop_formula(getattr(torch.ops.aten, _name))
            _register(_formula)


@register_flop_formula(torch.ops.aten._grouped_mm)
def _grouped_flops(rows: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # [N, in] by [E, in, out], or for a weight's gradient [in, N] by [N, out].
    return 2 * rows[0] * rows[1] * weight[-1]


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark by hand and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_case_options(parser)
    parser.add_argument("--k", type=int, nargs="+", default=[2], help="inner steps")
    parser.add_argument(
        "--without_naive",
        action="store_true",
        help="leave out memdlm_naive, which --gradient_checkpointing does anyway",
    )
    parser.add_argument("--without_exact", action="store_true", help="leave out memdlm_exact")
    parser.add_argument(
        "--without_graph", action="store_true", help="leave out memdlm_graph, as a CPU always does"
    )
    parser.add_argument(
        "--sdpa_backends",
        nargs="+",
        default=[],
        choices=("cudnn", "flash", "efficient", "math"),
        help="attention backends that mdlm and memdlm are measured with too",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument("--batches", type=int, default=1, help="batches in one round")
    parser.add_argument("--json", type=Path, help="append one JSON line per variant to this file")
    options = parser.parse_args(arguments)
    case = case_of(options)
    rows = measure(
        case,
        inner_steps=options.k,
        repeats=options.repeats,
        batches=options.batches,
        device=torch.device(options.device),
        dtype=DTYPES[options.dtype],
        naive=not (options.without_naive or case.gradient_checkpointing),
        exact=not options.without_exact,
        graph=not options.without_graph,
        sdpa_backends=options.sdpa_backends,
        path=options.json,
    )
    print_table(rows)


def add_case_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a case and where it runs; `case_of` reads the former."""
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--length", type=int, help="tokens of a sequence")
    parser.add_argument("--prompt_share", type=float, help="share of it that is never masked")
    parser.add_argument("--outer", choices=("full", "lora", "lora_attention"), help="what trains")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")


def case_of(options: argparse.Namespace) -> StepCase:
    """The batch of a small model, or 1 x 4,096 of a published one, with what was asked for."""
    if options.model in PUBLISHED:
        base = StepCase(options.model, 1, 4_096, 0.9)
    else:
        base = SMALL.get(options.model, StepCase(options.model, 2, 512, 0.8))
    fields = ("batch_size", "length", "prompt_share", "outer")
    asked = {name: getattr(options, name) for name in fields}
    given = {name: value for name, value in asked.items() if value is not None}
    return replace(base, gradient_checkpointing=options.gradient_checkpointing, **given)


def measure(
    case: StepCase,
    *,
    inner_steps: Sequence[int],
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    batches: int = 1,
    naive: bool = True,
    naive_every: int = 1,
    prompt_kv: bool = True,
    exact: bool = True,
    graph: bool = False,
    sdpa_backends: Sequence[str] = (),
    extra_steps: Sequence[int] | None = None,
    suite: str | None = None,
    run: str | None = None,
    path: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Measure every variant of a case.

    Args:
        case: the shape.
        inner_steps: the K of `memdlm`.
        repeats: timed rounds, in which the variants take turns.
        device, dtype: of the model.
        batches: batches of one round, over which its time is averaged.
        naive: whether `memdlm_naive` is measured too.
        naive_every: n, for it to take part in each nth round alone.
        prompt_kv: whether `memdlm_prompt_kv` is measured too.
        exact: whether `memdlm_exact` is.
        graph: whether `memdlm_graph` is, on a GPU.
        sdpa_backends: with which `mdlm` and `memdlm` are measured once more.
        extra_steps: with which of `inner_steps` all but `memdlm` are; None for all.
        suite: the suite's name for the rows, None by hand.
        run: when the invocation began, UTC, ISO seconds; None for now.
        path: a file that gets each row as a JSON line as soon as it is there.

    Returns:
        One row for each variant.

    Raises:
        ValueError: variants whose losses differ, `memdlm_naive` with gradient checkpointing, an
            attention backend that the device has not.
    """
    steps = make_steps(
        case,
        inner_steps,
        batches,
        device,
        dtype,
        naive=naive,
        prompt_kv=prompt_kv,
        exact=exact,
        graph=graph,
        sdpa_backends=sdpa_backends,
        extra_steps=extra_steps,
    )
    steps = check_losses(steps, device)
    rounds = {name: _round(step, batches) for name, step in steps.items()}
    every = {name: naive_every for name in rounds if name.startswith("memdlm_naive")}
    times_ms = interleaved_ms(rounds, repeats, device, every)
    for name, own in times_ms.items():  # before minutes of profiling, should they be cut off
        tqdm.write(f"{name}: {percentiles(own)['p50_ms'] / batches:.1f} ms")
    facts = {
        "bench": "step",
        "suite": suite,
        "run": run or datetime.now(UTC).isoformat(timespec="seconds"),
        **machine(device),
        "case": case.name,
        "model": case.model,
        "batch_size": case.batch_size,
        "length": case.length,
        "prompt_share": case.prompt_share,
        "outer": case.outer,
        "gradient_checkpointing": case.gradient_checkpointing,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": case.batch_size * case.length,
    }
    rows = []
    for name, take_round in rounds.items():
        variant, _, k = name.partition(" K=")
        breakdown = profile_steps(take_round, batches, device)
        parts_ms = breakdown.parts_ms
        if variant != "memdlm_naive":  # which makes its masks inside the step
            memory = memory_of(variant, int(k)) if k else None
            parts_ms = {"host_masks": round(collation_ms(case, memory), 3), **parts_ms}
        own_ms = [time_ms / batches for time_ms in times_ms[name]]
        grown_mib = None
        with OperatorCounts(device) as counts:
            if device.type == "cpu":
                grown_mib = round(rss_mib(take_round), 1)
            else:
                take_round()
        flops = counts.flops // batches
        if variant == "memdlm_graph":  # what a graph launches is not dispatched, so not counted
            launched_singly = [r for r in rows if (r["variant"], r["k"]) == ("memdlm", int(k))]
            flops = launched_singly[0]["flops"] if launched_singly else flops
        row = {
            **facts,
            "variant": variant,
            "k": int(k) if k else None,
            "every": every.get(name, 1),
            "times_ms": [round(time_ms, 3) for time_ms in own_ms],
            **percentiles(own_ms),
            "peak_mib": round(peak_mib(take_round, device) + steps[name].held_bytes() / 2**20, 1),
            "rss_mib": grown_mib,
            "flops": flops,
            "parts_ms": parts_ms,
            "calls": breakdown.calls,
            "launches": breakdown.launches,
            "host_reads": round(counts.host_reads / batches),
        }
        # At once: what was measured stays, should a later variant fail.
        write_rows(path, [row])
        rows.append(row)
    return rows


def _round(step: Step, batches: int) -> Callable[[], None]:
    def run() -> None:
        for number in range(batches):
            step(number)

    return run


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows of one case beside both standards, and where the time of the method goes.

    The floor is the ratio of FLOPs to `mdlm`: what the method costs if every FLOP costs the same.
    """
    first = {row["variant"]: row for row in reversed(rows)}
    mdlm, all_rows = first["mdlm"], first.get("mdlm_all_rows")
    print(f"\n{rows[0]['case']}, {rows[0]['dtype']}, {rows[0]['device']}")
    print(
        f"{'variant':<17}{'K':>2}{'p50 ms':>10}{'/all rows':>11}{'/mdlm':>8}{'floor':>8}"
        f"{'/floor':>8}{'tokens/s':>11}{'peak MiB':>10}{'calls':>8}{'host reads':>12}"
    )
    for row in rows:
        over_mdlm = time_over(row, mdlm)
        floor = row["flops"] / mdlm["flops"]
        over_all = f"{time_over(row, all_rows):.2f}" if all_rows else "-"
        print(
            f"{row['variant']:<17}{row['k'] or '':>2}{row['p50_ms']:>10.1f}{over_all:>11}"
            f"{over_mdlm:>8.2f}{floor:>8.2f}{over_mdlm / floor:>8.2f}"
            f"{1e3 * row['tokens'] / row['p50_ms']:>11,.0f}{row['peak_mib']:>10,.0f}"
            f"{row['calls']:>8,}{row['host_reads']:>12,}"
        )
    shown = [row for row in rows if row["variant"] == "memdlm"]
    shown = [row for row in shown if row["k"] == 2] or shown
    for row in shown[:1]:
        print(f"\nmemdlm K={row['k']}, ms of one profiled step (host_masks: beside it)")
        for part, time_ms in row["parts_ms"].items():
            print(f"  {part:<17}{time_ms:>10.2f}")


if __name__ == "__main__":
    main()
