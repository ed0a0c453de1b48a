"""Cases of lora_swiglu: the gated activation of an FFN with fast weights, alone and in its FFN."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.op_cases.case import (
    Case,
    Inputs,
    Make,
    Run,
    Variant,
    backends,
    copy_of,
    default_backend,
    differentiated,
    randn,
)
from bench.op_cases.experts import offsets_of
from bench.op_cases.lora import SCALE, gradients
from memdlm_kernels import grouped_linear, grouped_lora_linear, lora_linear, lora_swiglu

_FLOAT32_BYTES = 4
# Rounded to the dtype: A and B (kept in float32), the shrink, the two updates, times the scale,
# plus gate and up, the activation, the product; and the gradients of the last three.
_ROUNDINGS = 10
# Those, and of down's product, its own update, and the sums; and back.
_FFN_ROUNDINGS = 16


def activation_case(rows: int, inner: int, dtype: torch.dtype, *, bounds: bool = False) -> Case:
    """The activation without fast weights, as in the prefix and in plain MDLM.

    Args:
        rows, inner: N, I.
        dtype: of gate and up.
        bounds: also measure a copy of the bytes.
    """
    wanted = ("gate", "up")

    def inputs(generator: torch.Generator) -> Inputs:
        names = ("gate", "up", "grad_out")
        return {name: randn(generator, rows, inner, dtype=dtype) for name in names}

    def ours(backend: str) -> Make:
        def function(gate: Tensor, up: Tensor) -> Tensor:
            return lora_swiglu(None, gate, up, None, None, SCALE, backend=backend)

        return differentiated(function, wanted)

    op = "lora_swiglu"
    traffic = 6 * rows * inner * dtype.itemsize
    plain = Variant("silu(gate) * up", differentiated(lambda gate, up: F.silu(gate) * up, wanted))
    return Case(
        op=op,
        name=f"[{rows}, {inner}], no fast weights, {gradients(wanted)}",
        dtype=dtype,
        inputs=inputs,
        truth=ours("reference"),
        variants=backends(op, ours) + (plain,) + ((copy_of(traffic),) if bounds else ()),
        roundings=_ROUNDINGS,
        longest_sum=1,
        bytes=traffic,
    )


def dense_case(
    rows: int,
    columns: int,
    inner: int,
    dtype: torch.dtype,
    wanted: tuple[str, ...],
    *,
    rank: int = 32,
    bounds: bool = False,
) -> Case:
    """The activation with fast weights of a dense FFN.

    Args:
        rows, columns, inner, rank: N, in, I, R.
        dtype: of x, gate and up; A and B are float32.
        wanted: inputs that need a gradient, of "x", "gate", "up", "A", "B".
        bounds: also measure a copy of the bytes.
    """

    def inputs(generator: torch.Generator) -> Inputs:
        return {
            "x": randn(generator, rows, columns, dtype=dtype),
            "gate": randn(generator, rows, inner, dtype=dtype),
            "up": randn(generator, rows, inner, dtype=dtype),
            "A": randn(generator, 2 * rank, columns, scale=columns**-0.5),
            "B": randn(generator, 2 * inner, rank, scale=rank**-0.5),
            "grad_out": randn(generator, rows, inner, dtype=dtype),
        }

    def ours(backend: str) -> Make:
        return differentiated(lora_swiglu, wanted, scale=SCALE, backend=backend)

    op = "lora_swiglu"
    functions: dict[str, Callable[..., Tensor]] = {
        "silu(gate) * up written plainly": _plain,
        "lora_linear twice, silu(gate) * up": _two_updates,
    }
    peers = [Variant(name, differentiated(each, wanted)) for name, each in functions.items()]
    state = 2 * rank * (columns + inner) * _FLOAT32_BYTES
    traffic = rows * (columns + 3 * inner) * dtype.itemsize + state
    if wanted:
        written = columns * ("x" in wanted) + inner * len({"gate", "up"} & set(wanted))
        traffic += rows * (inner + written) * dtype.itemsize
        traffic += state if "A" in wanted else 0
    if bounds:
        peers.append(copy_of(traffic))
    return Case(
        op=op,
        name=f"[{rows}, {columns}] -> {inner}, rank {rank}, {gradients(wanted)}",
        dtype=dtype,
        inputs=inputs,
        truth=ours("reference"),
        variants=backends(op, ours) + tuple(peers),
        roundings=_ROUNDINGS,
        longest_sum=max(rows, columns, inner),
        bytes=traffic,
    )


def experts_case(
    rows: int,
    experts: int,
    columns: int,
    inner: int,
    dtype: torch.dtype,
    wanted: tuple[str, ...],
    *,
    rank: int = 32,
    bounds: bool = False,
) -> Case:
    """The activation with fast weights of stacked experts.

    Args:
        rows, experts, columns, inner, rank: N, E, in, I, R.
        dtype: of x and of gate and up, which are stacked; A and B are float32.
        wanted: inputs that need a gradient, of "x", "gate", "A", "B".
        bounds: also measure a copy of the bytes.
    """

    def inputs(generator: torch.Generator) -> Inputs:
        return {
            "x": randn(generator, rows, columns, dtype=dtype),
            "gate": randn(generator, rows, 2 * inner, dtype=dtype),
            "A": randn(generator, experts, 2 * rank, columns, scale=columns**-0.5),
            "B": randn(generator, experts, 2 * inner, rank, scale=rank**-0.5),
            "offsets": offsets_of(generator, rows, experts),
            "grad_out": randn(generator, rows, inner, dtype=dtype),
        }

    def ours(backend: str) -> Make:
        return differentiated(lora_swiglu, wanted, up=None, scale=SCALE, backend=backend)

    op = "lora_swiglu"
    peers = [Variant("grouped_lora_linear, silu(gate) * up", differentiated(_grouped, wanted))]
    state = 2 * experts * rank * (columns + inner) * _FLOAT32_BYTES
    traffic = rows * (columns + 3 * inner) * dtype.itemsize + state
    if wanted:
        written = columns * ("x" in wanted) + 2 * inner * ("gate" in wanted)
        traffic += rows * (inner + written) * dtype.itemsize
        traffic += state if "A" in wanted else 0
    if bounds:
        peers.append(copy_of(traffic))
    return Case(
        op=op,
        name=f"[{rows}, {columns}] -> {inner}, E {experts}, rank {rank}, {gradients(wanted)}",
        dtype=dtype,
        inputs=inputs,
        truth=ours("reference"),
        variants=backends(op, ours) + tuple(peers),
        roundings=_ROUNDINGS,
        longest_sum=max(rows // experts, columns, inner),
        bytes=traffic,
    )


def ffn_case(
    rows: int,
    experts: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype,
    *,
    backward: bool,
    rank: int = 32,
) -> Case:
    """The experts' whole FFN with fast weights, beside the products of the frozen experts alone.

    Args:
        rows, experts, hidden, inner, rank: N, E, D, I, R.
        dtype: of everything: the fast weights' copy for the products too.
        backward: measure the backward pass, of x and all fast weights; else forward without it.
    """

    def inputs(generator: torch.Generator) -> Inputs:
        shapes = {
            "A": (experts, 2 * rank, hidden),
            "B": (experts, 2 * inner, rank),
            "A_down": (experts, rank, inner),
            "B_down": (experts, hidden, rank),
        }
        return {
            "x": randn(generator, rows, hidden, dtype=dtype),
            "gate_up": randn(
                generator, experts, 2 * inner, hidden, dtype=dtype, scale=hidden**-0.5
            ),
            "down": randn(generator, experts, hidden, inner, dtype=dtype, scale=inner**-0.5),
            "offsets": offsets_of(generator, rows, experts),
            "grad_out": randn(generator, rows, hidden, dtype=dtype),
            **{
                name: randn(generator, *shape, dtype=dtype, scale=0.02)
                for name, shape in shapes.items()
            },
        }

    def run_of(inputs: Inputs, backend: Callable[[str], str]) -> Run:
        if not backward:
            return torch.no_grad()(lambda: (_ffn(inputs, backend),))
        wanted = ("x", "A", "B", "A_down", "B_down")
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items()}
        out = _ffn(leaves, backend)
        sources = [leaves[name] for name in wanted]
        return lambda: torch.autograd.grad(out, sources, inputs["grad_out"], retain_graph=True)

    def ours(inputs: Inputs) -> Run:
        device = inputs["x"].device
        return run_of(inputs, lambda op: default_backend(op, device))

    def products(inputs: Inputs) -> Run:
        offsets, options = inputs["offsets"], dict(device=inputs["x"].device, dtype=dtype)
        if backward:
            first, second = inputs["down"].mT, inputs["gate_up"].mT
            rows_in = (inputs["grad_out"], torch.randn(rows, 2 * inner, **options))
        else:
            first, second = inputs["gate_up"], inputs["down"]
            rows_in = (inputs["x"], torch.randn(rows, inner, **options))
        return lambda: (
            grouped_linear(rows_in[0], first, offsets),
            grouped_linear(rows_in[1], second, offsets),
        )

    weights = 3 * experts * hidden * inner
    state = experts * rank * 3 * (hidden + inner)
    activations = rows * (2 * hidden + 2 * inner if backward else 2 * hidden)
    return Case(
        op="lora_swiglu",
        name=f"FFN of experts, {rows} rows, E {experts}, {hidden} -> {inner}, rank {rank}, "
        + ("backward" if backward else "forward"),
        dtype=dtype,
        inputs=inputs,
        truth=lambda inputs: run_of(inputs, lambda op: "reference"),
        variants=(
            Variant("ours", ours, "ours"),
            Variant("bound: base products", products, "bound"),
        ),
        roundings=_FFN_ROUNDINGS,
        longest_sum=max(hidden, 2 * inner, rows // experts),
        bytes=(activations + weights + state * (2 if backward else 1)) * dtype.itemsize,
    )


def _ffn(inputs: Inputs, backend: Callable[[str], str]) -> Tensor:
    x, offsets = inputs["x"], inputs["offsets"]
    layer = backend("grouped_linear")
    wide = grouped_linear(x, inputs["gate_up"], offsets, backend=layer)
    activate = backend("lora_swiglu")
    A, B = inputs["A"], inputs["B"]
    h = lora_swiglu(x, wide, None, A, B, SCALE, offsets=offsets, backend=activate)
    out = grouped_linear(h, inputs["down"], offsets, backend=layer)
    A, B = inputs["A_down"], inputs["B_down"]
    update = backend("grouped_lora_linear")
    return grouped_lora_linear(h, out, A, B, offsets, SCALE, backend=update)


def _plain(x: Tensor, gate: Tensor, up: Tensor, A: Tensor, B: Tensor) -> Tensor:
    A, B = A.to(x.dtype), B.to(x.dtype)
    (a_gate, a_up), (b_gate, b_up) = A.chunk(2), B.chunk(2)
    gate = gate + SCALE * (x @ a_gate.mT @ b_gate.mT)
    return F.silu(gate) * (up + SCALE * (x @ a_up.mT @ b_up.mT))


def _two_updates(x: Tensor, gate: Tensor, up: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """What the trainer does where nothing fuses it."""
    (a_gate, a_up), (b_gate, b_up) = A.chunk(2), B.chunk(2)
    backend = default_backend("lora_linear", x.device)
    gate = lora_linear(x, gate, a_gate, b_gate, SCALE, backend=backend)
    return F.silu(gate) * lora_linear(x, up, a_up, b_up, SCALE, backend=backend)


def _grouped(x: Tensor, gate: Tensor, A: Tensor, B: Tensor, offsets: Tensor) -> Tensor:
    """What the trainer does where nothing fuses it."""
    backend = default_backend("grouped_lora_linear", x.device)
    gate, up = grouped_lora_linear(x, gate, A, B, offsets, SCALE, backend=backend).chunk(2, dim=-1)
    return F.silu(gate) * up
