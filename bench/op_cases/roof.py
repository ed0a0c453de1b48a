"""What this machine can do at best: a row to draw the roofline's roof with."""

import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from bench.op_cases.case import text
from bench.timing import wait

# Rows and columns of the product: the larger ones are the better for a GPU, not for every CPU.
_SIZES = {"cpu": (1_024, 2_048), "cuda": (4_096, 8_192)}
_COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
_ROUNDS = 5


def roof(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Measure a large product and a large copy.

    Args:
        dtype: of the product.
        device: where.

    Returns:
        The fields of a row: `gemm_gflops` of the best product, and `copy_gb_s` of the best copy,
        its bytes counted as they are read and as they are written.
    """
    gflops = 0.0
    for size in tqdm(_SIZES[device.type], desc="roof", leave=False):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = _best_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        gflops = max(gflops, 2 * size**3 / seconds / 1e9)
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device)
    return {
        "bench": "roof",
        "dtype": text(dtype),
        "gemm_gflops": round(gflops, 1),
        "copy_gb_s": round(2 * source.nbytes / seconds / 1e9, 1),
    }


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(1 + _ROUNDS):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
