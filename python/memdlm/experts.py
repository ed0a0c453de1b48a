"""A layer of stacked experts as grouped products, and the low-rank updates it reads.

transformers keeps the experts of a layer in two stacked parameters and lets the function that runs
them be chosen; importing this module registers ours as "memdlm". It computes the same as
transformers' "grouped_mm", takes updates of the weights in factored form, and works in float64.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from memdlm import gated_ffn
from memdlm_kernels import (
    combine_rows,
    grouped_linear,
    grouped_lora_linear,
    lora_swiglu,
    spread_rows,
)

IMPLEMENTATION = "memdlm"

# The stacked parameters: [E, 2 I, D] (gate and up) and [E, D, I].
PROJECTIONS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Update:
    """What is added to one stacked parameter W of a layer of experts, for every expert e.

    Attributes:
        projection: one of `PROJECTIONS`.
        tensors: (A [E, P R, in], B [E, out, R]) adds scale * B A to W, as `grouped_lora_linear`
            does; (delta [E, out, in],) adds delta. With a leading S, one set for each sequence.
        scale: see `tensors`; not read with a delta.
        B_is_zero: whether B is known to hold zeros; not read with a delta.
    """

    projection: str
    tensors: tuple[Tensor, ...]
    scale: float
    B_is_zero: bool = False

    @property
    def sets(self) -> int:
        """S, 1 where all sequences share the update."""
        return len(self.tensors[0]) if self.tensors[0].dim() == 4 else 1


@dataclass(frozen=True)
class _Order:
    """Rows sorted by expert, and within an expert by sequence.

    Attributes:
        places: [N, k], the sorted place of each row's choices.
        ends: [E, S] int32, where the rows of each expert and sequence end.
    """

    places: Tensor
    ends: Tensor


def run_experts(experts: Any, rows: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Run a layer of experts, also one under PEFT, whose LoRA is then computed in factored form.

    PEFT adapts a stacked parameter (`target_parameters`) by adding B A to it: a second copy of all
    experts in forward, and the gradient of a whole copy in backward. Its two factors are read here
    instead, so the numbers are the same (up to rounding) and the checkpoint is PEFT's.

    Args:
        experts: a module of stacked experts, or PEFT wrappers around one.
        rows: [N, D].
        weight, index: [N, k], of the router.

    Returns:
        [N, D], the weighted sum over each row's k experts.
    """
    updates = []
    while hasattr(experts, "base_layer"):
        updates += _peft_updates(experts)
        experts = experts.base_layer
    return experts(rows, index, weight, updates=tuple(updates))


def _peft_updates(wrapper: Any) -> list[Update]:
    if wrapper.disable_adapters or wrapper.merged:
        return []
    count = wrapper.num_experts
    updates = []
    for adapter in wrapper.active_adapters:
        if adapter in wrapper.lora_A:
            A = wrapper.lora_A[adapter].weight.unflatten(0, (count, -1))  # [E, R, in]
            B = wrapper.lora_B[adapter].weight.unflatten(1, (-1, count))  # [out, R, E]
            scale = wrapper.scaling[adapter]
            updates.append(Update(wrapper.parameter_name, (A, B.permute(2, 0, 1)), scale))
    return updates


def grouped_experts(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    updates: tuple[Update, ...] = (),
) -> Tensor:
    """transformers' experts interface: the k experts of each row, weighted and summed.

    Args:
        experts: with `num_experts`, `gate_up_proj` [E, 2 I, D], `down_proj` [E, D, I] and the
            gating that transformers gives it.
        hidden_states: [N, D]; with per-sequence updates of S sets, N / S rows of each sequence.
        top_k_index: [N, k] int64, experts of each row.
        top_k_weights: [N, k].
        updates: what is added to the parameters.

    Returns:
        [N, D] in hidden_states' dtype.
    """
    sets = max([update.sets for update in updates], default=1)
    order = _sort(top_k_index, experts.num_experts, sets)
    rows = spread_rows(hidden_states, order.places)  # [N k, D]
    inner = _activate(experts, rows, order, updates)  # [N k, I]
    out = _project("down_proj", experts, inner, order, updates)  # [N k, D]
    return combine_rows(out, order.places, top_k_weights, dtype=hidden_states.dtype)


def _sort(index: Tensor, expert_count: int, sets: int) -> _Order:
    count, top_k = index.shape
    # Of each choice: its expert, and among that expert's rows its sequence.
    group = index * sets
    if sets > 1:
        group = (
            group
            + torch.arange(sets, device=index.device).repeat_interleave(count // sets)[:, None]
        )
    group = group.flatten()
    chosen = group.argsort(stable=True)  # the row and choice n k + j that comes to each place
    places = torch.empty_like(chosen)
    places[chosen] = torch.arange(count * top_k, device=index.device)
    sizes = torch.zeros(expert_count * sets, dtype=torch.int32, device=index.device)
    sizes.scatter_add_(0, group, torch.ones_like(group, dtype=torch.int32))
    ends = sizes.cumsum(0, dtype=torch.int32)
    return _Order(places.view(count, top_k), ends.unflatten(0, (expert_count, sets)))


def _activate(experts: Any, rows: Tensor, order: _Order, updates: tuple[Update, ...]) -> Tensor:
    """The gated activation: [N k, D] to [N k, I]."""
    if not (gated_ffn.fuses(rows) and experts.config.hidden_act == "silu"):
        return experts._apply_gate(_project("gate_up_proj", experts, rows, order, updates))
    # The last update in factored form goes into the activation, the others before it.
    own = [update for update in updates if update.projection == "gate_up_proj"]
    last = own.pop() if own and len(own[-1].tensors) == 2 else None
    gate_up = _project("gate_up_proj", experts, rows, order, tuple(own))  # [N k, 2 I]
    if last is None:
        return lora_swiglu(None, gate_up, None, None, None, 1.0)
    A, B = last.tensors
    ends = _ends(last, order)
    return lora_swiglu(
        rows, gate_up, None, A, B, last.scale, offsets=ends, B_is_zero=last.B_is_zero
    )


def _project(
    name: str, experts: Any, rows: Tensor, order: _Order, updates: tuple[Update, ...]
) -> Tensor:
    ends = order.ends[:, -1]
    if is_four_bit(experts):
        out = _FourBitLinear.apply(rows, experts, name, ends, False)
    else:
        out = grouped_linear(rows, getattr(experts, name), ends)
    for update in updates:
        if update.projection == name:
            out = _add(update, rows, out, _ends(update, order))
    return out


def _ends(update: Update, order: _Order) -> Tensor:
    """Where the rows end that share a pair of A and B: [E, S], or [E]."""
    per_sequence = update.tensors[0].dim() == 4
    return order.ends if per_sequence else order.ends[:, -1].contiguous()


def _add(update: Update, rows: Tensor, out: Tensor, ends: Tensor) -> Tensor:
    if len(update.tensors) == 2:
        A, B = update.tensors
        return grouped_lora_linear(rows, out, A, B, ends, update.scale, B_is_zero=update.B_is_zero)
    delta = update.tensors[0].to(out.dtype)
    if delta.dim() == 4:
        delta = delta.transpose(0, 1).flatten(0, 1)  # [E S, out, in], as the rows are sorted
    return out + grouped_linear(rows, delta, ends.flatten())


class _FourBitLinear(torch.autograd.Function):
    """The same for a frozen 4-bit parameter, which is dequantised again in backward.

    All experts of a layer in 16 bits are what 4-bit loading is there to avoid.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, experts: Any, name: str, ends: Tensor, transposed: bool
    ) -> Tensor:
        ctx.experts, ctx.name, ctx.ends, ctx.transposed = experts, name, ends, transposed
        weight = getattr(experts, name)
        if transposed:
            weight = weight.to(rows.dtype).mT  # narrower after autocast
        return grouped_linear(rows, weight, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        rows = _FourBitLinear.apply(
            grad.contiguous(), ctx.experts, ctx.name, ctx.ends, not ctx.transposed
        )
        return rows, None, None, None, None


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, grouped_experts)


def is_four_bit(experts: nn.Module) -> bool:
    """Whether stacked experts are kept in 4 bits (`memdlm.four_bit`)."""
    return any(not parameter.is_floating_point() for parameter in experts.parameters())


def stacked_experts(module: nn.Module) -> Any:
    """The module of stacked experts that `module` is or that PEFT wraps; None if it is another."""
    base: Any = module
    while hasattr(base, "base_layer"):
        base = base.base_layer
    # Not hasattr: asking a 4-bit parameter for its value dequantises all of it.
    names = {*base._parameters, *getattr(base, "parametrizations", ())}
    return base if hasattr(base, "num_experts") and names >= set(PROJECTIONS) else None
