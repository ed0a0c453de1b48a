"""Cases of lora_linear: fast weights on the output of a frozen linear layer, and an outer LoRA."""

import contextlib
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bench.op_cases.case import (
    Case,
    Inputs,
    Make,
    Results,
    Run,
    Variant,
    backends,
    copy_of,
    differentiated,
    randn,
)
from memdlm_kernels import lora_linear

SCALE = 2.0
_FLOAT32_BYTES = 4
# Rounded to the dtype: A and B (kept in float32), the shrink, its product with B, times the scale,
# plus the base.
_ROUNDINGS = 6
# The gradients of an inner step, of the outer pass through fast weights, of an outer LoRA; forward
# alone.
GRADIENTS = (("A", "B"), ("x", "base"), ("x", "base", "A", "B"), ())


def lora_case(
    sets: int,
    length: int,
    columns: int,
    out: int,
    dtype: torch.dtype,
    wanted: tuple[str, ...],
    *,
    rank: int = 32,
    B_is_zero: bool = False,
    bounds: bool = False,
) -> Case:
    """A low-rank update of a layer's output.

    Args:
        sets, length, columns, out, rank: S, L, in, out, R; above 1 each of the S sequences has its
            own fast weights.
        dtype: of x and base; A and B are float32.
        wanted: inputs that need a gradient, of "x", "base", "A", "B".
        B_is_zero: B holds zeros, as in the first inner step, and the op is told so.
        bounds: also measure a copy of the bytes.
    """
    own = (sets,) if sets > 1 else ()
    rows = sets * length

    def inputs(generator: torch.Generator) -> Inputs:
        B = randn(generator, *own, out, rank)
        return {
            "x": randn(generator, *own, length, columns, dtype=dtype),
            "base": randn(generator, *own, length, out, dtype=dtype),
            "A": randn(generator, *own, rank, columns, scale=columns**-0.5),
            "B": B.zero_() if B_is_zero else B,
            "grad_out": randn(generator, *own, length, out, dtype=dtype),
        }

    def ours(backend: str) -> Make:
        return differentiated(
            lora_linear, wanted, scale=SCALE, B_is_zero=B_is_zero, backend=backend
        )

    op = "lora_linear"
    peers = [Variant("x A^T B^T written plainly", differentiated(_plain, wanted))]
    if sets == 1:
        peers.append(Variant("PEFT", partial(_peft, wanted, dtype)))
    traffic = rows * (columns + 2 * out) * dtype.itemsize
    traffic += sets * rank * (columns + out) * _FLOAT32_BYTES
    if wanted:
        traffic += rows * out * dtype.itemsize
        traffic += rows * columns * dtype.itemsize if "x" in wanted else 0
        traffic += sets * rank * columns * _FLOAT32_BYTES if "A" in wanted else 0
        traffic += sets * rank * out * _FLOAT32_BYTES if "B" in wanted else 0
    zero = ", B zero" if B_is_zero else ""
    return Case(
        op=op,
        name=f"[{sets}, {length}, {columns}] -> {out}, rank {rank}{zero}, {gradients(wanted)}",
        dtype=dtype,
        inputs=inputs,
        truth=ours("reference"),
        variants=backends(op, ours) + tuple(peers) + ((copy_of(traffic),) if bounds else ()),
        roundings=_ROUNDINGS,
        longest_sum=max(length, columns, out),
        bytes=traffic,
        # The reference multiplies by a B of zeros all the same.
        flops=2 * rows * rank * (columns + out) if B_is_zero else None,
    )


def gradients(wanted: tuple[str, ...]) -> str:
    """How a case's name says which gradients are computed."""
    return f"gradients of {' '.join(wanted)}" if wanted else "forward"


def _plain(x: Tensor, base: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return base + (x @ A.to(x.dtype).mT @ B.to(x.dtype).mT) * SCALE


def _peft(wanted: tuple[str, ...], dtype: torch.dtype, inputs: Inputs) -> Run:
    """PEFT's own layer around a base that is given, as it is to ours."""
    x, base, A, B = (inputs[name] for name in ("x", "base", "A", "B"))
    rank, columns = A.shape
    frozen = nn.Linear(columns, len(B), bias=False, device="meta", dtype=dtype)
    config = LoraConfig(r=rank, lora_alpha=int(SCALE * rank), target_modules=["linear"])
    model = get_peft_model(nn.ModuleDict({"linear": frozen}), config)
    layer = model.base_model.model["linear"]
    factors = {"A": layer.lora_A["default"], "B": layer.lora_B["default"]}
    for name, tensor in (("A", A), ("B", B)):
        factors[name].weight = nn.Parameter(tensor.clone(), requires_grad=name in wanted)
    given: list[Tensor] = []
    frozen.forward = lambda _: given[0]
    # As a trainer runs it: PEFT keeps the factors in float32.
    narrow = dtype != torch.float32

    def run() -> Results:
        leaves = {
            "x": x.detach().requires_grad_("x" in wanted),
            "base": base.detach().requires_grad_("base" in wanted),
            "A": factors["A"].weight,
            "B": factors["B"].weight,
        }
        given[:] = [leaves["base"]]
        with torch.autocast(x.device.type, dtype) if narrow else contextlib.nullcontext():
            out = layer(leaves["x"])
        if not wanted:
            return (out,)
        sources = [leaves[name] for name in wanted]
        return (out.detach(), *torch.autograd.grad(out, sources, inputs["grad_out"]))

    return run
