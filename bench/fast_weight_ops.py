"""What the fast weights' own ops cost: `python -m bench.fast_weight_ops --op lora_linear`.

Each op against the plain PyTorch that a trainer would write, interleaved in one process, after a
check that they give the same.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import interleaved_ms, machine, peak_mib, percentiles, write_rows
from memdlm_kernels import fast_weight_reset_, fast_weight_sgd_, grouped_lora_linear, lora_linear

Variants = dict[str, Callable[[], Any]]

_RANK, _SCALE = 32, 2.0
_LR, _MAX_NORM = 0.1, 1.0
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# S (above 1, each sequence has its own fast weights), L, in, out.
_LAYERS = ((1, 1024, 384, 1024), (1, 1024, 1024, 384), (1, 2048, 1024, 4096), (8, 256, 384, 1024))
# S, E, N, in, out, projections. The last has the groups of a large model: 1,024 rows.
_EXPERTS = (
    (1, 64, 8192, 256, 256, 2),
    (1, 64, 8192, 256, 256, 1),
    (8, 64, 8192, 256, 256, 2),
    (1, 2, 2048, 2048, 2048, 2),
)
# S, P, elements in a tensor.
_STATES = ((1, 24, 22_528), (8, 24, 22_528), (1, 200, 200_000))


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=tuple(_CASES), required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--repeats", type=int, default=21, help="timed rounds")
    parser.add_argument("--json", help="append one JSON line per variant to this file")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    facts = machine(device)
    for case, variants in _CASES[options.op](_DTYPES[options.dtype], device):
        times_ms = interleaved_ms(variants, options.repeats, device)
        rows = [
            {
                "benchmark": "op",
                "op": options.op,
                "case": case,
                "dtype": options.dtype,
                "variant": name,
                **percentiles(times_ms[name]),
                "peak_mib": round(peak_mib(run, device), 1),
                **facts,
            }
            for name, run in variants.items()
        ]
        write_rows(options.json, rows)
        ours_ms = rows[0]["p50_ms"]
        for row in rows:
            print(
                f"{case:52} {row['variant']:10} p20 {row['p20_ms']:9.3f} p50 {row['p50_ms']:9.3f} "
                f"p80 {row['p80_ms']:9.3f} ms  {row['p50_ms'] / ours_ms:6.2f}x ours  "
                f"peak {row['peak_mib']:.0f} MiB"
            )


def _lora_linear(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Variants]]:
    """Forward alone; with the gradients of an inner step, of the outer pass, of both."""
    for sets, length, columns, out in _LAYERS:
        rows = (sets, length) if sets > 1 else (length,)
        own = (sets,) if sets > 1 else ()
        tensors = {
            "x": torch.randn(*rows, columns, device=device).to(dtype),
            "base": torch.randn(*rows, out, device=device).to(dtype),
            "A": torch.randn(*own, _RANK, columns, device=device) / columns**0.5,
            "B": torch.randn(*own, out, _RANK, device=device),
        }
        grad_out = torch.randn(*rows, out, device=device).to(dtype)
        for wanted in ((), ("A", "B"), ("x", "base"), ("x", "base", "A", "B")):
            variants = {
                name: _forward_backward(function, tensors, wanted, grad_out)
                for name, function in (("ours", lora_linear), ("plain", _plain_lora))
            }
            for ours, plain in zip(variants["ours"](), variants["plain"](), strict=True):
                # bfloat16 rounds each product on its way.
                atol = 0.02 * plain.abs().max().item()
                torch.testing.assert_close(ours, plain, rtol=0, atol=atol)
            yield f"[{sets}, {length}, {columns}] to {out}, grad {''.join(wanted) or '-'}", variants


def _plain_lora(x: Tensor, base: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    return base + (x @ A.to(x.dtype).mT @ B.to(x.dtype).mT) * scale


def _grouped_lora_linear(
    dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Variants]]:
    """As _lora_linear, over experts; "layer" is the frozen grouped layer that the update is of."""
    for sets, experts, rows, columns, out, projections in _EXPERTS:
        own = (sets,) if sets > 1 else ()
        group = torch.randint(experts * sets, (rows,))
        offsets = torch.bincount(group, minlength=experts * sets).cumsum(0).int().to(device)
        tensors = {
            "x": torch.randn(rows, columns, device=device).to(dtype),
            "base": torch.randn(rows, out, device=device).to(dtype),
            "A": torch.randn(*own, experts, projections * _RANK, columns, device=device)
            / columns**0.5,
            "B": torch.randn(*own, experts, out, _RANK, device=device),
            "offsets": offsets.view(experts, *own),
        }
        weight = torch.randn(experts, out, columns, device=device).to(dtype)
        expert_offsets = offsets[sets - 1 :: sets].contiguous()
        grad_out = torch.randn(rows, out, device=device).to(dtype)

        def loop(**arguments: Any) -> Tensor:
            return grouped_lora_linear(**arguments, backend="reference")

        def layer(x: Tensor, offs=expert_offsets, weight=weight, **_: Any) -> Tensor:
            return F.grouped_mm(x, weight.mT, offs=offs)

        for wanted in ((), ("A", "B"), ("x", "base"), ("x", "base", "A", "B")):
            functions = {"ours": grouped_lora_linear, "loop": loop, "plain": _plain_grouped_lora}
            variants = {
                name: _forward_backward(function, tensors, wanted, grad_out)
                for name, function in functions.items()
            }
            expected = variants["ours"]()
            for name in ("loop", "plain"):
                for ours, other in zip(expected, variants[name](), strict=True):
                    atol = 0.02 * other.abs().max().item()
                    torch.testing.assert_close(ours, other, rtol=0, atol=atol)
            of_layer = tuple(name for name in wanted if name == "x")
            variants["layer"] = _forward_backward(layer, tensors, of_layer, grad_out)
            case = f"[{rows}, {columns}] to {projections} x {out // projections}, E {experts}"
            yield f"{case}, S {sets}, grad {''.join(wanted) or '-'}", variants


def _plain_grouped_lora(
    x: Tensor, base: Tensor, A: Tensor, B: Tensor, offsets: Tensor, scale: float
) -> Tensor:
    if A.dim() == 4:
        A, B = A.transpose(0, 1).flatten(0, 1), B.transpose(0, 1).flatten(0, 1)
    A, B, offs, rank = A.to(x.dtype), B.to(x.dtype), offsets.flatten(), B.shape[-1]
    shrinks = F.grouped_mm(x, A.mT, offs=offs).split(rank, dim=-1)
    blocks = B.chunk(len(shrinks), dim=1)
    update = [F.grouped_mm(s, b.mT, offs=offs) for s, b in zip(shrinks, blocks, strict=True)]
    return base + scale * (torch.cat(update, dim=-1) if len(update) > 1 else update[0])


def _forward_backward(
    function: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    wanted: tuple[str, ...],
    grad_out: Tensor,
) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
        result = function(**leaves, scale=_SCALE)
        if not wanted:
            return (result,)
        return result, *torch.autograd.grad(result, [leaves[name] for name in wanted], grad_out)

    return run


def _fast_weight_sgd(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Variants]]:
    for sets, count, size in _STATES:
        segments = torch.arange(count + 1, device=device) * size
        start = torch.randn(sets, count * size, device=device).to(dtype)
        grad = torch.randn(sets, count * size, device=device)
        params = {name: start.clone() for name in ("ours", "loop", "foreach")}
        pieces = {name: list(param.view(-1, size)) for name, param in params.items()}
        grads = list(grad.view(-1, size))

        def ours(param=params["ours"], grad=grad, segments=segments):
            return fast_weight_sgd_(param, grad, segments, _LR, _MAX_NORM)

        def loop(pieces=pieces["loop"], grads=grads):
            # As published: a norm, a test and an update for each tensor.
            for piece, g in zip(pieces, grads, strict=True):
                norm = g.norm()
                if torch.isfinite(norm):
                    piece.sub_(g * torch.clamp(_MAX_NORM / norm, max=1.0), alpha=_LR)

        def foreach(pieces=pieces["foreach"], grads=grads):
            norms = torch.stack(torch._foreach_norm(grads))
            factors = (_LR * torch.clamp(_MAX_NORM / norms, max=1.0)).nan_to_num(nan=0.0)
            torch._foreach_sub_(pieces, torch._foreach_mul(grads, list(factors)))

        variants = {"ours": ours, "loop": loop, "foreach": foreach}
        for name, run in variants.items():
            run()
            torch.testing.assert_close(params[name], params["ours"])
        yield f"[{sets}, {count} x {size}]", variants


def _fast_weight_reset(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Variants]]:
    for sets, count, size in _STATES:
        segments = torch.arange(count + 1, device=device) * size
        # A and B in turn.
        bounds = torch.tensor([0.05, 0.0], device=device).repeat(count // 2)
        seed = torch.arange(sets, device=device)
        param = torch.empty(sets, count * size, dtype=dtype, device=device)
        pieces = list(param.view(-1, 2, size))
        generator = torch.Generator(device)

        def ours(param=param, segments=segments, bounds=bounds, seed=seed):
            fast_weight_reset_(param, segments, bounds, seed)

        def loop(pieces=pieces, generator=generator):
            for a, b in pieces:
                a.uniform_(-0.05, 0.05, generator=generator)
                b.zero_()

        yield f"[{sets}, {count} x {size}]", {"ours": ours, "loop": loop}


_CASES = {
    "grouped_lora_linear": _grouped_lora_linear,
    "lora_linear": _lora_linear,
    "fast_weight_sgd_": _fast_weight_sgd,
    "fast_weight_reset_": _fast_weight_reset,
}

if __name__ == "__main__":
    main()
