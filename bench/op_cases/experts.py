"""Cases of grouped_linear, grouped_lora_linear, combine_rows and spread_rows: stacked experts."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

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
from bench.op_cases.lora import SCALE, gradients
from memdlm.experts import IMPLEMENTATION, PROJECTIONS, run_experts
from memdlm_kernels import combine_rows, grouped_linear, grouped_lora_linear, spread_rows

_FLOAT32_BYTES, _INT32_BYTES, _INT64_BYTES = 4, 4, 8
# Rounded to the dtype: A and B (kept in float32), the shrink, its product with B, times the scale,
# plus the base.
_LORA_ROUNDINGS = 6
# The result alone: the products' sums are in float32.
_LINEAR_ROUNDINGS = 1
# Of the rows weighted and of their sum; ours rounds the sum alone.
_COMBINE_ROUNDINGS = 2
# Of a layer: gate and up with its LoRA, their activation and product, down with its LoRA, the
# weighted sum; and back.
_LAYER_ROUNDINGS = 12


def offsets_of(generator: torch.Generator, rows: int, groups: int) -> Tensor:
    """Ends of uneven groups of rows: [groups] int32."""
    device = generator.device
    group = torch.randint(groups, (rows,), generator=generator, device=device)
    return torch.bincount(group, minlength=groups).cumsum(0).int()


def linear_case(
    rows: int,
    experts: int,
    columns: int,
    out: int,
    dtype: torch.dtype,
    wanted: tuple[str, ...],
    *,
    bounds: bool = False,
) -> Case:
    """Stacked frozen experts on sorted rows.

    Args:
        rows, experts, columns, out: N, E, in, out.
        dtype: of rows and weights.
        wanted: ("x",) for its gradient too, or ().
        bounds: also measure one dense product of as many operations.
    """

    def inputs(generator: torch.Generator) -> Inputs:
        return {
            "x": randn(generator, rows, columns, dtype=dtype),
            "weight": randn(generator, experts, out, columns, dtype=dtype, scale=columns**-0.5),
            "offsets": offsets_of(generator, rows, experts),
            "grad_out": randn(generator, rows, out, dtype=dtype),
        }

    def ours(backend: str) -> Make:
        return differentiated(grouped_linear, wanted, backend=backend)

    def one_product(inputs: Inputs) -> Run:
        x, weight, grad_out = inputs["x"], inputs["weight"][0], inputs["grad_out"]
        if wanted:
            return lambda: (x @ weight.mT, grad_out @ weight)
        return lambda: (x @ weight.mT,)

    op = "grouped_linear"
    peers = [
        Variant("F.grouped_mm", differentiated(_grouped_mm, wanted)),
        Variant("loop over experts", differentiated(_loop, wanted)),
    ]
    if bounds:
        peers.append(Variant("bound: one dense product", one_product, "bound"))
    passes = 1 + len(wanted)
    return Case(
        op=op,
        name=f"[{rows}, {columns}] -> {out}, E {experts}, {gradients(wanted)}",
        dtype=dtype,
        inputs=inputs,
        truth=ours("reference"),
        variants=backends(op, ours) + tuple(peers),
        roundings=_LINEAR_ROUNDINGS,
        longest_sum=max(columns, out),
        bytes=(passes * rows * (columns + out) + experts * out * columns) * dtype.itemsize
        + experts * _INT32_BYTES,
    )


def lora_case(
    sets: int,
    experts: int,
    rows: int,
    columns: int,
    out: int,
    projections: int,
    dtype: torch.dtype,
    wanted: tuple[str, ...],
    *,
    rank: int = 32,
    bounds: bool = False,
) -> Case:
    """The low-rank updates of stacked experts.

    Args:
        sets, experts, rows, columns, out, projections, rank: S, E, N, in, out, P, R.
        dtype: of x and base; A and B are float32.
        wanted: inputs that need a gradient, of "x", "base", "A", "B".
        bounds: also measure a copy of the bytes.
    """
    own = (sets,) if sets > 1 else ()

    def inputs(generator: torch.Generator) -> Inputs:
        return {
            "x": randn(generator, rows, columns, dtype=dtype),
            "base": randn(generator, rows, out, dtype=dtype),
            "A": randn(generator, *own, experts, projections * rank, columns, scale=columns**-0.5),
            "B": randn(generator, *own, experts, out, rank),
            "offsets": offsets_of(generator, rows, experts * sets).view(experts, *own),
            "grad_out": randn(generator, rows, out, dtype=dtype),
        }

    def ours(backend: str) -> Make:
        return differentiated(grouped_lora_linear, wanted, scale=SCALE, backend=backend)

    op = "grouped_lora_linear"
    functions: dict[str, Callable[..., Tensor]] = {
        "F.grouped_mm written plainly": _plain,
        "loop over experts": _lora_loop,
    }
    peers = [Variant(name, differentiated(each, wanted)) for name, each in functions.items()]
    state = sets * experts * rank * _FLOAT32_BYTES
    traffic = rows * (columns + 2 * out) * dtype.itemsize
    traffic += state * (projections * columns + out)
    if wanted:
        traffic += rows * out * dtype.itemsize
        traffic += rows * columns * dtype.itemsize if "x" in wanted else 0
        traffic += state * projections * columns if "A" in wanted else 0
        traffic += state * out if "B" in wanted else 0
    if bounds:
        peers.append(copy_of(traffic))
    return Case(
        op=op,
        name=f"[{rows}, {columns}] -> {projections} x {out // projections}, E {experts}, "
        f"S {sets}, rank {rank}, {gradients(wanted)}",
        dtype=dtype,
        inputs=inputs,
        truth=ours("reference"),
        variants=backends(op, ours) + tuple(peers),
        roundings=_LORA_ROUNDINGS,
        longest_sum=max(columns, out, rows // (experts * sets)),
        bytes=traffic,
    )


def combine_case(
    tokens: int, hidden: int, top_k: int, dtype: torch.dtype, *, bounds: bool = False
) -> Case:
    """The weighted sum of each token's experts, gathered from where they left their outputs.

    Args:
        tokens, hidden, top_k: N, D, k.
        dtype: of rows and weights.
        bounds: also measure a copy of the bytes.
    """
    wanted, places = ("rows", "weight"), tokens * top_k

    def inputs(generator: torch.Generator) -> Inputs:
        return {
            "rows": randn(generator, places, hidden, dtype=dtype),
            "index": _places_of(generator, tokens, top_k),
            "weight": randn(generator, tokens, top_k).softmax(-1).to(dtype),
            "grad_out": randn(generator, tokens, hidden, dtype=dtype),
        }

    def ours(backend: str) -> Make:
        return differentiated(combine_rows, wanted, backend=backend)

    op = "combine_rows"
    functions: dict[str, Callable[..., Tensor]] = {
        "gather, products of one row": _gather_and_multiply,
        "gather, weigh, sum": _gather_and_sum,
    }
    peers = [Variant(name, differentiated(each, wanted)) for name, each in functions.items()]
    traffic = 2 * (places + tokens) * hidden * dtype.itemsize
    traffic += places * (_INT64_BYTES + 2 * dtype.itemsize)
    if bounds:
        peers.append(copy_of(traffic))
    return Case(
        op=op,
        name=f"[{places}, {hidden}] -> {tokens}, top {top_k}, {gradients(wanted)}",
        dtype=dtype,
        inputs=inputs,
        truth=ours("reference"),
        variants=backends(op, ours) + tuple(peers),
        roundings=_COMBINE_ROUNDINGS,
        longest_sum=max(hidden, top_k),
        bytes=traffic,
    )


def spread_case(
    tokens: int, hidden: int, top_k: int, dtype: torch.dtype, *, bounds: bool = False
) -> Case:
    """Each token's row to its experts, and the sum of what comes back.

    Args:
        tokens, hidden, top_k: N, D, k.
        dtype: of rows.
        bounds: also measure a copy of the bytes.
    """
    wanted, places = ("rows",), tokens * top_k

    def inputs(generator: torch.Generator) -> Inputs:
        return {
            "rows": randn(generator, tokens, hidden, dtype=dtype),
            "index": _places_of(generator, tokens, top_k),
            "grad_out": randn(generator, places, hidden, dtype=dtype),
        }

    def ours(backend: str) -> Make:
        return differentiated(spread_rows, wanted, backend=backend)

    op = "spread_rows"
    peers = [Variant("sort, gather", differentiated(_sort_and_gather, wanted))]
    traffic = 2 * (places + tokens) * hidden * dtype.itemsize + places * _INT64_BYTES
    if bounds:
        peers.append(copy_of(traffic))
    return Case(
        op=op,
        name=f"[{tokens}, {hidden}] -> {places}, top {top_k}, {gradients(wanted)}",
        dtype=dtype,
        inputs=inputs,
        truth=ours("reference"),
        variants=backends(op, ours) + tuple(peers),
        # The peer's gradient is added up in the dtype, row by row.
        roundings=top_k,
        longest_sum=top_k,
        bytes=traffic,
    )


def layer_case(
    tokens: int,
    hidden: int,
    width: int,
    experts: int,
    top_k: int,
    dtype: torch.dtype,
    *,
    rank: int = 32,
) -> Case:
    """A whole layer of experts under an outer LoRA, forward and backward: ours and PEFT's own.

    Args:
        tokens, hidden, width, experts, rank: N, D, I, E, R.
        top_k: experts of each token.
        dtype: of everything.
    """

    def inputs(generator: torch.Generator) -> Inputs:
        scores = randn(generator, tokens, experts).softmax(-1)
        weight, index = scores.topk(top_k)
        return {
            "rows": randn(generator, tokens, hidden, dtype=dtype),
            "weight": weight.to(dtype),
            "index": index,
            "gate_up_proj": randn(
                generator, experts, 2 * width, hidden, dtype=dtype, scale=hidden**-0.5
            ),
            "down_proj": randn(generator, experts, hidden, width, dtype=dtype, scale=width**-0.5),
            "A_gate_up": randn(generator, experts * rank, hidden, dtype=dtype, scale=hidden**-0.5),
            "B_gate_up": randn(generator, 2 * width, experts * rank, dtype=dtype, scale=0.1),
            "A_down": randn(generator, experts * rank, width, dtype=dtype, scale=width**-0.5),
            "B_down": randn(generator, hidden, experts * rank, dtype=dtype, scale=0.1),
            "grad_out": randn(generator, tokens, hidden, dtype=dtype),
        }

    def frozen(inputs: Inputs) -> Run:
        layer = _layer(inputs, top_k)
        rows = inputs["rows"].detach().requires_grad_()
        arguments = (rows, inputs["index"], inputs["weight"])
        return lambda: torch.autograd.grad(layer(*arguments), rows, inputs["grad_out"])

    chosen, factors = tokens * top_k, experts * rank * (2 * hidden + 3 * width)
    moved = 4 * tokens * hidden + 3 * experts * hidden * width + 2 * factors
    return Case(
        op="grouped_lora_linear",
        name=f"layer of experts, {tokens} tokens, {hidden} -> {width}, E {experts}, top {top_k}, "
        f"outer LoRA of rank {rank}, all gradients",
        dtype=dtype,
        inputs=inputs,
        # PEFT adds B A to the weights: nothing of how ours lays out the factors.
        truth=partial(_under_peft, top_k, rank, _run_peft),
        variants=(
            Variant("ours", partial(_under_peft, top_k, rank, _run_ours), "ours"),
            Variant("PEFT target_parameters", partial(_under_peft, top_k, rank, _run_peft)),
            Variant("bound: frozen layer", frozen, "bound"),
        ),
        roundings=_LAYER_ROUNDINGS,
        longest_sum=max(hidden, 2 * width, chosen // experts),
        bytes=moved * dtype.itemsize,
    )


def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.mT, offs=offsets)


def _loop(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    parts, begin = [], 0
    for own, end in zip(weight, offsets.tolist(), strict=True):
        parts.append(x[begin:end] @ own.mT)
        begin = end
    return torch.cat(parts)


def _plain(x: Tensor, base: Tensor, A: Tensor, B: Tensor, offsets: Tensor) -> Tensor:
    A, B, offs, rank = *_by_group(x, A, B), offsets.flatten(), B.shape[-1]
    shrinks = F.grouped_mm(x, A.mT, offs=offs).split(rank, dim=-1)
    blocks = B.chunk(len(shrinks), dim=1)
    update = [F.grouped_mm(s, b.mT, offs=offs) for s, b in zip(shrinks, blocks, strict=True)]
    return base + SCALE * (torch.cat(update, dim=-1) if len(update) > 1 else update[0])


def _lora_loop(x: Tensor, base: Tensor, A: Tensor, B: Tensor, offsets: Tensor) -> Tensor:
    parts, begin, rank = [], 0, B.shape[-1]
    ends = offsets.flatten().tolist()
    for a, b, end in zip(*_by_group(x, A, B), ends, strict=True):
        shrinks = (x[begin:end] @ a.mT).split(rank, dim=-1)
        blocks = b.chunk(len(shrinks))
        update = torch.cat([s @ block.mT for s, block in zip(shrinks, blocks, strict=True)], dim=-1)
        parts.append(base[begin:end] + SCALE * update)
        begin = end
    return torch.cat(parts)


def _by_group(x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A and B in x's dtype, one for each group of rows: by expert, then by sequence."""
    A, B = A.to(x.dtype), B.to(x.dtype)
    if A.dim() == 4:
        A, B = A.transpose(0, 1).flatten(0, 1), B.transpose(0, 1).flatten(0, 1)
    return A, B


def _places_of(generator: torch.Generator, tokens: int, top_k: int) -> Tensor:
    """[N, k] int64, where rows sorted by expert are; here in any order."""
    places = torch.randperm(tokens * top_k, generator=generator, device=generator.device)
    return places.view(tokens, top_k)


def _gather_and_multiply(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    chosen = rows.index_select(0, index.flatten()).unflatten(0, index.shape)
    return (weight[:, None] @ chosen)[:, 0]


def _gather_and_sum(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return (weight[..., None] * rows[index]).sum(1)


def _sort_and_gather(rows: Tensor, index: Tensor) -> Tensor:
    return rows[index.flatten().argsort() // index.shape[1]]


def _layer(inputs: Inputs, top_k: int) -> OlmoeExperts:
    """The frozen layer; its parameters are the inputs themselves."""
    experts, hidden, width = inputs["down_proj"].shape
    config = OlmoeConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = IMPLEMENTATION
    with torch.device("meta"):
        layer = OlmoeExperts(config)
    for name in PROJECTIONS:
        setattr(layer, name, nn.Parameter(inputs[name], requires_grad=False))
    return layer


def _under_peft(
    top_k: int, rank: int, call: Callable[[nn.Module, Tensor, Inputs], Tensor], inputs: Inputs
) -> Run:
    config = LoraConfig(
        r=rank,
        lora_alpha=int(SCALE * rank),
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in PROJECTIONS],
    )
    modules = nn.ModuleDict({"experts": _layer(inputs, top_k)})
    model = get_peft_model(modules, config, autocast_adapter_dtype=False)
    wrapper = model.base_model.model["experts"]
    factors = []
    each = wrapper
    while hasattr(each, "base_layer"):
        name = each.parameter_name.removesuffix("_proj")
        for side, layers in (("A", each.lora_A), ("B", each.lora_B)):
            tensor = inputs[f"{side}_{name}"]
            layers["default"].weight = nn.Parameter(tensor.clone())
            factors.append(layers["default"].weight)
        each = each.base_layer
    rows = inputs["rows"].detach().requires_grad_()

    def run() -> Results:
        # Not the leaf: the hooks with which FLOPs are counted cannot stand one as a module's input.
        out = call(wrapper, rows.view_as(rows), inputs)
        return (out.detach(), *torch.autograd.grad(out, [rows, *factors], inputs["grad_out"]))

    return run


def _run_ours(wrapper: nn.Module, rows: Tensor, inputs: Inputs) -> Tensor:
    return run_experts(wrapper, rows, inputs["weight"], inputs["index"])


def _run_peft(wrapper: nn.Module, rows: Tensor, inputs: Inputs) -> Tensor:
    return wrapper(rows, inputs["index"], inputs["weight"])
