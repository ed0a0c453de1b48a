"""How many kernels the inner loop launches on a GPU: `python -m bench.launches --preset llada_moe`.

The loop of K steps is profiled for each K, after the same steps ran once; what one more step adds
is the difference of two of them.
"""

import argparse
from collections import Counter
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from bench.cases import PRESETS, step_case
from bench.step import make_batches
from bench.timing import machine, write_rows
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.objective import MemDLMObjective


def main(arguments: list[str] | None = None) -> None:
    """Profile and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="llada_moe")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 3], help="inner steps")
    parser.add_argument("--kernels", type=int, default=12, help="kernels to list by name")
    parser.add_argument("--json", help="append one JSON line per K to this file")
    options = parser.parse_args(arguments)
    device = torch.device("cuda")
    case = step_case(options.preset)
    with device:
        model = AutoModelForCausalLM.from_config(case.config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()
    for k in options.k:
        memory = MemoryConfig(inner_steps=k)
        objective = MemDLMObjective(model, DiffusionConfig(), memory)
        (batch,) = make_batches(case, DiffusionConfig(), memory, 1, device)
        batch = send_to_device(batch, device)
        objective.write_memory(batch)
        counts = _kernels(lambda objective=objective, batch=batch: objective.write_memory(batch))
        objective.fast_weights.detach()
        rows.append(
            {
                "benchmark": "launches",
                "preset": options.preset,
                "k": k,
                "launches": counts.total(),
                **machine(device),
            }
        )
        print(f"K {k}: {counts.total()} kernels, prefix of the noisier states included")
    for name, count in counts.most_common(options.kernels):
        print(f"  {count:5} {name[:90]}")
    write_rows(options.json, rows)


def _kernels(run: Any) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        run()
        torch.cuda.synchronize()
    return Counter(
        event.name
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    )


if __name__ == "__main__":
    main()
