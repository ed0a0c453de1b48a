"""What the cross-entropy ops cost: `python -m bench.ops --op masked_linear_cross_entropy`.

Each op against what trainers write today, forward and backward for hidden with a frozen head (or
with `--trainable`, for the head too), interleaved in one process. Every variant's loss and
gradients are compared with float64 first; their errors go into the results.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import interleaved_ms, machine, peak_mib, percentiles, write_rows
from memdlm_kernels import masked_cross_entropy, masked_linear_cross_entropy

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_IGNORED = -100
_LARGEST_ERROR = 0.05  # of a gradient, relative to its norm: more is a wrong result, not rounding

Loss = Callable[..., Tensor]  # of the tensors that need a gradient


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=tuple(_VARIANTS), required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), default="float32")
    parser.add_argument("--rows", type=int, default=2048, help="N")
    parser.add_argument("--masked", type=int, default=205, help="M, of the N rows")
    parser.add_argument("--hidden", type=int, default=512, help="D")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="V")
    parser.add_argument("--trainable", action="store_true", help="the head needs a gradient too")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument("--json", help="append one JSON line per variant to this file")
    options = parser.parse_args(arguments)
    if not 0 < options.masked <= options.rows:
        parser.error(f"--masked must be in [1, {options.rows}], got {options.masked}")
    device = torch.device(options.device)
    facts = machine(device)

    torch.manual_seed(0)
    leaves, variants = _VARIANTS[options.op](options, device)
    errors = _gradient_errors(leaves, variants)
    steps = {name: _step(loss, leaves) for name, loss in variants.items()}
    times_ms = interleaved_ms(steps, options.repeats, device)
    rows = [
        {
            "benchmark": "op",
            "op": options.op,
            "case": f"N {options.rows}, M {options.masked}, D {options.hidden}, "
            f"V {options.vocabulary}" + (", head trains" if options.trainable else ""),
            "dtype": options.dtype,
            "variant": name,
            **percentiles(times_ms[name]),
            "peak_mib": round(peak_mib(steps[name], device), 1),
            "grad_error": errors[name],
            **facts,
        }
        for name in variants
    ]
    write_rows(options.json, rows)
    ours_ms = rows[0]["p50_ms"]
    print(f"{options.op}, {rows[0]['case']}, {options.dtype}")
    for row in rows:
        print(
            f"{row['variant']:32} p20 {row['p20_ms']:9.2f} p50 {row['p50_ms']:9.2f} "
            f"p80 {row['p80_ms']:9.2f} ms  {row['p50_ms'] / ours_ms:6.2f}x ours  "
            f"peak {row['peak_mib']:7.1f} MiB  gradient error {row['grad_error']:.1e}"
        )


def _step(loss: Loss, leaves: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(*leaves), leaves)


def _gradient_errors(leaves: list[Tensor], variants: dict[str, Loss]) -> dict[str, float]:
    """Largest error of each variant's gradients, relative to the norm of the float64 gradient."""
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    # The last variant keeps the inputs' dtype throughout: in float64 it is the truth.
    true_loss = list(variants.values())[-1](*wide)
    truth = torch.autograd.grad(true_loss, wide)
    errors = {}
    for name, loss in variants.items():
        value = loss(*leaves)
        torch.testing.assert_close(value.item(), true_loss.item(), rtol=1e-2, atol=0.0)
        errors[name] = max(
            ((grad.double() - true).norm() / true.norm()).item()
            for grad, true in zip(torch.autograd.grad(value, leaves), truth, strict=True)
        )
        if not errors[name] <= _LARGEST_ERROR:
            raise RuntimeError(f"{name}: gradient is off by {errors[name]:.2e} of its norm")
    return errors


def _masked_target(options: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """(target [N] with M rows that are not ignored, their positions [M])."""
    index = torch.randperm(options.rows, device=device)[: options.masked].sort().values
    target = torch.full((options.rows,), _IGNORED, device=device)
    target[index] = torch.randint(options.vocabulary, (options.masked,), device=device)
    return target, index


def _linear(
    options: argparse.Namespace, device: torch.device
) -> tuple[list[Tensor], dict[str, Loss]]:
    dtype = _DTYPES[options.dtype]
    hidden = torch.randn(options.rows, options.hidden, device=device).to(dtype).requires_grad_()
    head = torch.randn(options.vocabulary, options.hidden, device=device) / options.hidden**0.5
    head = head.to(dtype)
    target, index = _masked_target(options, device)
    leaves = [hidden, head.requires_grad_()] if options.trainable else [hidden]

    def of(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
        # In float64 a frozen head is widened too.
        return lambda hidden, weight=head: loss(hidden, weight.to(hidden.dtype))

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return masked_linear_cross_entropy(hidden, weight, target, reduction="mean")

    def ours_index(hidden: Tensor, weight: Tensor) -> Tensor:
        return masked_linear_cross_entropy(
            hidden, weight, target[index], index=index, reduction="mean"
        )

    def full_float(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.mT).float(), target)

    def full(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.mT, target)

    def gather_float(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden[index] @ weight.mT).float(), target[index])

    def gather(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(hidden[index] @ weight.mT, target[index])

    def gather_torch(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden[index], weight, target[index])

    variants = {
        "ours": of(ours),
        "ours, index": of(ours_index),
        "all rows, logits.float()": of(full_float),
        "all rows": of(full),
        "gather, logits.float()": of(gather_float),
    }
    if hasattr(F, "linear_cross_entropy"):
        variants["gather, F.linear_cross_entropy"] = of(gather_torch)
    return leaves, variants | {"gather": of(gather)}


def _logits(
    options: argparse.Namespace, device: torch.device
) -> tuple[list[Tensor], dict[str, Loss]]:
    logits = torch.randn(options.rows, options.vocabulary, device=device)
    logits = logits.to(_DTYPES[options.dtype]).requires_grad_()
    target, index = _masked_target(options, device)
    return [logits], {
        "ours": lambda logits: masked_cross_entropy(logits, target, reduction="mean"),
        "all rows, logits.float()": lambda logits: F.cross_entropy(logits.float(), target),
        "all rows": lambda logits: F.cross_entropy(logits, target),
        "gather": lambda logits: F.cross_entropy(logits[index], target[index]),
    }


_VARIANTS = {"masked_linear_cross_entropy": _linear, "masked_cross_entropy": _logits}


if __name__ == "__main__":
    main()
