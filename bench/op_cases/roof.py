"""What this machine can do at best: a row to draw the roofline's roof with."""

import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from bench.op_cases.case import text
from bench.timing import device_seconds

# Rows and columns of the product: the larger ones are the better for a GPU, not for every CPU.
_SIZES = {"cpu": (1_024, 2_048), "cuda": (4_096, 8_192)}
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
_LEAST_ROUNDS = 5
# A CPU whose host has other guests has slow spells of seconds: the roof is that of a fast one.
_LEAST_SECONDS = {"cpu": 20.0, "cuda": 0.0}


def roof(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Measure large products and a large copy, in turn.

    Args:
        dtype: of the product.
        device: where.

    Returns:
        The fields of a row: `gemm_gflops` of the best product, and `copy_gb_s` of the best copy,
        its bytes counted as they are read and as they are written.
    """
    work: dict[str, list[tuple[int, Callable[[], object]]]] = {"gemm": [], "copy": []}
    for size in _SIZES[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        work["gemm"].append((2 * size**3, lambda a=a, b=b, out=out: torch.mm(a, b, out=out)))
    # Random: zeros are copied and multiplied faster than data.
    source = torch.randint(256, (_COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    work["copy"].append((2 * source.nbytes, lambda: target.copy_(source)))
    for _, run in (*work["gemm"], *work["copy"]):
        run()
    best = dict.fromkeys(work, 0.0)
    end = time.perf_counter() + _LEAST_SECONDS[device.type]
    rounds = 0
    with tqdm(desc="roof", leave=False) as progress:
        while rounds < _LEAST_ROUNDS or time.perf_counter() < end:
            for kind, runs in work.items():
                for amount, run in runs:
                    best[kind] = max(best[kind], amount / device_seconds(run, device) / 1e9)
            rounds += 1
            progress.update()
    return {
        "bench": "roof",
        "dtype": text(dtype),
        "gemm_gflops": round(best["gemm"], 1),
        "copy_gb_s": round(best["copy"], 1),
    }
