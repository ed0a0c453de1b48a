"""What the kernels cost on a GPU, beside the bound that each is held to.

`python -m bench.gpu_targets --json FILE [--only cross_entropy]`. Sizes are those of LLaDA-MoE and
LLaDA2.x-mini in bfloat16. Each case stands beside the products or the copy that it cannot do
without. The cross-entropies, peers' too where they are installed, are checked against float64
before they are timed; the other ops are by the GPU tests.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import interleaved_ms, machine, peak_mib, percentiles, write_rows
from memdlm_kernels import (
    fast_weight_reset_,
    fast_weight_sgd_,
    grouped_linear,
    grouped_lora_linear,
    lora_swiglu,
    masked_linear_cross_entropy,
)

Variants = dict[str, Callable[[], Any]]

_DTYPE = torch.bfloat16
_HIDDEN, _VOCABULARY = 2048, 157_184
_MASKED = (1024, 4096)
_RANK, _SCALE, _LR, _MAX_NORM = 32, 2.0, 0.1, 1.0
# Of LLaDA-MoE's FFN: 8,192 tokens times 8 experts each.
_ROWS, _EXPERTS, _INNER = 65_536, 64, 1_024


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(_CASES), help="one group of cases")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=21, help="timed rounds")
    parser.add_argument("--json", help="append one JSON line per variant to this file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    facts = machine(device)
    torch.manual_seed(0)
    for name in [options.only] if options.only else _CASES:
        for case, bound, variants in _CASES[name](device):
            _report(name, case, bound, variants, options, device, facts)


def _report(
    name: str,
    case: str,
    bound: str,
    variants: Variants,
    options: argparse.Namespace,
    device: torch.device,
    facts: dict[str, Any],
) -> None:
    times_ms = interleaved_ms(variants, options.repeats, device)
    rows = [
        {
            "benchmark": "gpu_target",
            "op": name,
            "case": case,
            "dtype": "bfloat16",
            "variant": variant,
            "bound": bound,
            **percentiles(times_ms[variant]),
            "peak_mib": round(peak_mib(run, device), 1),
            **facts,
        }
        for variant, run in variants.items()
    ]
    write_rows(options.json, rows)
    bound_ms = next(row["p50_ms"] for row in rows if row["variant"] == bound)
    print(f"{name}: {case}")
    for row in rows:
        print(
            f"  {row['variant']:34} p20 {row['p20_ms']:9.3f} p50 {row['p50_ms']:9.3f} "
            f"p80 {row['p80_ms']:9.3f} ms  {row['p50_ms'] / bound_ms:6.2f}x {bound}  "
            f"peak {row['peak_mib']:.0f} MiB"
        )


def _cross_entropy(device: torch.device) -> Iterator[tuple[str, str, Variants]]:
    """Forward and backward for hidden, frozen head; bound: its two products alone."""
    head = (torch.randn(_VOCABULARY, _HIDDEN, device=device) / _HIDDEN**0.5).to(_DTYPE)
    for masked in _MASKED:
        hidden = torch.randn(masked, _HIDDEN, device=device).to(_DTYPE).requires_grad_()
        target = torch.randint(_VOCABULARY, (masked,), device=device)
        logits = torch.empty(masked, _VOCABULARY, dtype=_DTYPE, device=device)

        def bare(hidden: Tensor = hidden, logits: Tensor = logits) -> Tensor:
            with torch.no_grad():
                torch.mm(hidden, head.mT, out=logits)
                return torch.mm(logits, head)

        def ours(chunk_bytes: int | None, h: Tensor = hidden, t: Tensor = target) -> Any:
            loss = masked_linear_cross_entropy(
                h, head, t, reduction="mean", chunk_bytes=chunk_bytes
            )
            return torch.autograd.grad(loss, h)

        losses = {"gather + F.cross_entropy": _plain_loss} | _peers()
        variants: Variants = {"two products": bare}
        for mebibytes in (None, 16, 64, 256):
            label = "ours" if mebibytes is None else f"ours, {mebibytes} MiB of logits"
            size = None if mebibytes is None else mebibytes << 20
            variants[label] = lambda size=size, ours=ours: ours(size)
        for peer, loss in losses.items():
            variants[peer] = lambda loss=loss, h=hidden, t=target: torch.autograd.grad(
                loss(h, head, t), h
            )
        (expected,) = torch.autograd.grad(
            _plain_loss(hidden.double(), head.double(), target), hidden
        )
        for label, run in list(variants.items())[1:]:
            _require_close(label, run()[0], expected, 0.02)
        yield f"M {masked}, D {_HIDDEN}, V {_VOCABULARY}", "two products", variants


def _plain_loss(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ head.mT, target)


def _peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    peers: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    if hasattr(F, "linear_cross_entropy"):
        peers["F.linear_cross_entropy"] = F.linear_cross_entropy
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        peers["Liger"] = lambda hidden, head, target: liger(head, hidden, target)
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy

        peers["cut-cross-entropy"] = linear_cross_entropy
    except ImportError:
        pass
    return peers


def _fast_weights(device: torch.device) -> Iterator[tuple[str, str, Variants]]:
    """LLaDA2.x-mini's tensors; bound: a copy of as many bytes as the op must move."""
    # Two layers, 256 experts and a shared one: A and B of gate, up and down.
    sizes = 2 * 257 * [_RANK * n for n in (2048, 512, 2048, 512, 512, 2048)]
    total = sum(sizes)
    segments = torch.tensor([0, *sizes], device=device).cumsum(0)
    bounds = torch.tensor([2048**-0.5, 0.0] * (len(sizes) // 2), device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    param = torch.empty(1, total, device=device)
    cast = torch.empty(1, total, device=device, dtype=_DTYPE)
    grad = torch.randn(1, total, device=device)
    narrow = grad.to(_DTYPE)

    def copy_of(bytes_moved: int) -> Callable[[], Any]:
        # Read once and written once.
        source = torch.empty(bytes_moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    case = f"{len(sizes)} tensors, {total / 1e6:.0f} M elements"
    # Bytes per element: the gradient twice, the parameter in and out, and its cast.
    yield (
        f"{case}, SGD, fp32 state, fp32 gradient",
        "copy of the bytes",
        {
            "copy of the bytes": copy_of(16 * total),
            "ours": lambda: fast_weight_sgd_(param, grad, segments, _LR, _MAX_NORM),
        },
    )
    yield (
        f"{case}, SGD, fp32 state, bf16 gradient and copy",
        "copy of the bytes",
        {
            "copy of the bytes": copy_of(14 * total),
            "ours": lambda: fast_weight_sgd_(param, narrow, segments, _LR, _MAX_NORM, cast=cast),
        },
    )
    yield (
        f"{case}, reset, fp32 state, bf16 copy",
        "copy of the bytes",
        {
            "copy of the bytes": copy_of(6 * total),
            "ours": lambda: fast_weight_reset_(param, segments, bounds, seed, cast=cast),
        },
    )


def _ffn(device: torch.device) -> Iterator[tuple[str, str, Variants]]:
    """The experts of one layer, with and without fast weights; bound: the base products alone."""
    group = torch.randint(_EXPERTS, (_ROWS,), device=device).sort().values
    offsets = torch.bincount(group, minlength=_EXPERTS).cumsum(0).int()
    x = torch.randn(_ROWS, _HIDDEN, device=device).to(_DTYPE).requires_grad_()
    gate_up = torch.randn(_EXPERTS, 2 * _INNER, _HIDDEN, device=device).to(_DTYPE)
    down = torch.randn(_EXPERTS, _HIDDEN, _INNER, device=device).to(_DTYPE)
    gate_up, down = gate_up / _HIDDEN**0.5, down / _INNER**0.5
    state = [
        torch.randn(_EXPERTS, *shape, device=device).mul_(0.02).to(_DTYPE).requires_grad_()
        for shape in (
            (2 * _RANK, _HIDDEN),
            (2 * _INNER, _RANK),
            (_RANK, _INNER),
            (_HIDDEN, _RANK),
        )
    ]
    grad_out = torch.randn(_ROWS, _HIDDEN, device=device).to(_DTYPE)

    def products() -> Any:
        rows = grouped_linear(x.detach(), gate_up, offsets)
        return rows, grouped_linear(inner_rows, down, offsets)

    def backward_products() -> Any:
        grad_inner = grouped_linear(grad_out, down.mT, offsets)
        return grad_inner, grouped_linear(grad_gate_up, gate_up.mT, offsets)

    def ours(x: Tensor) -> Tensor:
        A, B, A_down, B_down = state
        wide = grouped_linear(x, gate_up, offsets)
        inner = lora_swiglu(x, wide, None, A, B, _SCALE, offsets=offsets)
        out = grouped_linear(inner, down, offsets)
        return grouped_lora_linear(inner, out, A_down, B_down, offsets, _SCALE)

    def no_grad() -> Tensor:
        with torch.no_grad():
            return ours(x)

    inner_rows = torch.randn(_ROWS, _INNER, device=device).to(_DTYPE)
    grad_gate_up = torch.randn(_ROWS, 2 * _INNER, device=device).to(_DTYPE)
    case = f"{_ROWS} rows, {_EXPERTS} experts, {_HIDDEN} -> {_INNER}, rank {_RANK}"
    yield f"{case}, forward", "base products", {"base products": products, "ours": no_grad}
    out = ours(x)
    yield (
        f"{case}, backward",
        "base products",
        {
            "base products": backward_products,
            "ours": lambda: torch.autograd.grad(out, [x, *state], grad_out, retain_graph=True),
        },
    )


def _require_close(name: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    if not error <= bound:
        raise RuntimeError(f"{name}: gradient is off by {error:.2e} of its norm")


_CASES = {"cross_entropy": _cross_entropy, "fast_weights": _fast_weights, "ffn": _ffn}

if __name__ == "__main__":
    main()
