"""The kernels that most depends on, profiled once: `python -m bench.profile_kernels`.

The activation of an adapted FFN, the head's cross-entropy, and the fast weights' update, each at
the shape of the smoke suite: every kernel that they launch, with its time and how often.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from bench.op_cases.case import default_variant
from bench.op_cases.suites import SUITE_NAMES, op_cases

_OPS = ("lora_swiglu", "masked_linear_cross_entropy", "fast_weight_sgd_")
_KERNELS = 12  # of the longest


def main(arguments: list[str] | None = None) -> None:
    """Run each op's default backend once more after its first call, and print its kernels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--suite", choices=SUITE_NAMES, default="smoke")
    parser.add_argument(
        "--bare", action="store_true", help="run the ops alone: another profiler looks on"
    )
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    cases = {case.op: case for case in reversed(op_cases(options.suite)) if case.op in _OPS}
    for case in cases.values():
        variant = default_variant(case, device)
        generator = torch.Generator(device)
        generator.manual_seed(0)
        run = variant.make(case.inputs(generator))
        run()
        if options.bare:
            run()
            continue
        with profile(activities=[activity]) as profiler:
            run()
            if on_gpu:
                torch.cuda.synchronize(device)
        table = profiler.key_averages().table(
            sort_by=f"self_{options.device.partition(':')[0]}_time_total", row_limit=_KERNELS
        )
        print(f"{case.op} {case.name}, {variant.name}\n{table}", flush=True)


if __name__ == "__main__":
    main()
