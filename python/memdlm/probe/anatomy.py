"""The fast weights of prompts: norms, spectra, and which experts were written."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memdlm.config import MemoryConfig
from memdlm.experts import PROJECTIONS
from memdlm.prompt_memory import PromptMemory


@dataclass(frozen=True)
class Projection:
    """The fast weights of one projection of one layer, for S prompts and E experts.

    Attributes:
        name: of the layer, and of the projection where the layer has several.
        experts: whether it has experts; E is 1 where not.
        factors: (A [S, E, R, in], B [S, E, out, R]), or (delta [S, E, out, in],).
        weight: [E, out, in], what the update is added to.
    """

    name: str
    experts: bool
    factors: tuple[Tensor, ...]
    weight: Tensor


@dataclass(frozen=True)
class Anatomy:
    """What was written into one projection by S prompts; all float64, on the CPU.

    Attributes:
        name, experts: as for `Projection`.
        update: [S, E], Frobenius norm of the update, scale * B A or delta.
        moved: [S, E], norm of A's change over A's norm before; nan without A.
        weight: [E], norm of the weight that the update is added to.
        singular: [S, E, k], singular values of the update, falling.
        routed: [S, E], choices of each expert in the passes of the inner loop, or None.
    """

    name: str
    experts: bool
    update: Tensor
    moved: Tensor
    weight: Tensor
    singular: Tensor
    routed: Tensor | None


def projections(
    modules: Mapping[str, nn.Module], named: Mapping[str, tuple[Tensor, ...]]
) -> list[Projection]:
    """Fast weights by projection: those of experts are stacked, gate and up in one tensor.

    Args:
        modules: layer name to linear layer or stacked experts, `FastWeights.modules`.
        named: layer name to tensors with S before all else, `FastWeights.named()`.

    Returns:
        In the order of the layers.
    """
    found = []
    for name, tensors in named.items():
        module: Any = modules[name]
        if isinstance(module, nn.Linear):
            factors = tuple(tensor[:, None] for tensor in tensors)
            found.append(Projection(name, False, factors, module.weight.detach()[None]))
            continue
        half = len(tensors) // 2
        stacked, down = (getattr(module, each).detach() for each in PROJECTIONS)
        pairs = zip(*(tensor.chunk(2, 2) for tensor in tensors[:half]), strict=True)
        own = zip(("gate_proj", "up_proj"), pairs, stacked.chunk(2, 1), strict=True)
        found += [Projection(f"{name}.{kind}", True, *both) for kind, *both in own]
        found.append(Projection(f"{name}.down_proj", True, tensors[half:], down))
    return found


def singular_values(factors: tuple[Tensor, ...], scale: float) -> Tensor:
    """Singular values of an update, from its factors: no [out, in] product is made of two.

    Args:
        factors: (A [*, R, in], B [*, out, R]), or (delta [*, out, in],).
        scale: of B A; not read with a delta.

    Returns:
        [*, k] float64, falling: k is the least of R, in and out, or of in and out.
    """
    if len(factors) == 1:
        return torch.linalg.svdvals(factors[0].double())
    A, B = (factor.double() for factor in factors)
    left = torch.linalg.qr(B, mode="r").R  # [*, R or out, R]
    right = torch.linalg.qr(A.mT, mode="r").R  # [*, R or in, R]
    return scale * torch.linalg.svdvals(left @ right.mT)


def effective_rank(singular: Tensor) -> Tensor:
    """exp of the entropy of the squared singular values' shares: [*, k] to [*]; 0 for all zeros.

    Source:
        Roy and Vetterli, The effective rank, EUSIPCO 2007, there of the values themselves.
    """
    square = singular.square()
    total = square.sum(-1, keepdim=True)
    share = square / total.masked_fill(total == 0, 1)
    return torch.special.entr(share).sum(-1).exp() * (total[..., 0] > 0)


def measure_anatomy(
    memory: PromptMemory, config: MemoryConfig, prompts: Sequence[Sequence[int]], batch_size: int
) -> list[Anatomy]:
    """Write a memory from each prompt and look at its fast weights.

    Args:
        memory: written anew.
        config: its options.
        prompts: S lists of token ids.
        batch_size: prompts that are written together.

    Returns:
        One for each projection.
    """
    parts = [
        _measure(memory, config, prompts[first : first + batch_size])
        for first in range(0, len(prompts), batch_size)
    ]
    return [_joined(own) for own in zip(*parts, strict=True)]


@torch.no_grad()
def _measure(
    memory: PromptMemory, config: MemoryConfig, prompts: Sequence[Sequence[int]]
) -> list[Anatomy]:
    store = memory.fast_weights
    store.reset(memory.inner_batch(prompts)["memory_seed"])
    before = [own.factors[0].clone() for own in projections(store.modules, store.named())]
    with _routing(store.modules, len(prompts)) as routed, memory.adapt(prompts, merge=False):
        after = projections(store.modules, store.named())
        found = []
        for first, own in zip(before, after, strict=True):
            singular = singular_values(own.factors, config.lora_alpha / config.rank).cpu()
            A, old = own.factors[0].double(), first.double()
            moved = (A - old).norm(dim=(-2, -1)) / old.norm(dim=(-2, -1))
            if len(own.factors) == 1:
                moved = torch.full_like(moved, torch.nan)
            found.append(
                Anatomy(
                    own.name,
                    own.experts,
                    singular.square().sum(-1).sqrt(),
                    moved.cpu(),
                    own.weight.double().norm(dim=(-2, -1)).cpu(),
                    singular,
                    routed[own.name.rpartition(".")[0]].cpu() if own.experts else None,
                )
            )
    return found


@contextlib.contextmanager
def _routing(modules: Mapping[str, nn.Module], prompts: int) -> Iterator[dict[str, Tensor]]:
    """Count the choices of each expert: layer name to [S, E] float64."""
    counts: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            if isinstance(module, nn.Linear):
                continue
            stacked: Any = module
            device = next(stacked.parameters()).device
            own = torch.zeros(prompts, stacked.num_experts, dtype=torch.float64, device=device)
            counts[name] = own

            def count(_: nn.Module, inputs: tuple[Tensor, ...], own: Tensor = own) -> None:
                chosen = inputs[1].reshape(prompts, -1)  # rows come sequence by sequence
                own.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=own.dtype))

            stack.callback(module.register_forward_pre_hook(count).remove)
        yield counts


def _joined(parts: Sequence[Anatomy]) -> Anatomy:
    first = parts[0]
    update, moved, singular = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("update", "moved", "singular")
    )
    routed = None
    if first.routed is not None:
        routed = torch.cat([part.routed for part in parts if part.routed is not None])
    return Anatomy(first.name, first.experts, update, moved, first.weight, singular, routed)


def anatomy_rows(model: str, parts: Sequence[Anatomy]) -> list[dict[str, Any]]:
    """JSON rows: one for each projection, all its experts together, and one for each expert.

    Args:
        model: its name.
        parts: from `measure_anatomy`.

    Returns:
        `..._of_prompts` lists the prompts, and of experts means over those that were written, but
        for the norm; all else is a mean over the prompts.
    """
    rows: list[dict[str, Any]] = []
    for own in parts:
        update = own.update.square().sum(1).sqrt()  # [S]
        written = own.update > 0
        rank = effective_rank(own.singular)  # [S, E]
        count = written.sum(1).clamp_min(1)
        head = {"model": model, "projection": own.name}
        rows.append(
            {
                "measure": "projection",
                **head,
                "experts": own.singular.shape[1] if own.experts else None,
                "weight": _rounded(own.weight.square().sum().sqrt()),
                "relative_of_prompts": _rounded(update / own.weight.square().sum().sqrt()),
                "moved_of_prompts": _rounded((own.moved * written).sum(1) / count),
                "effective_rank_of_prompts": _rounded((rank * written).sum(1) / count),
                "written_of_prompts": _rounded(written.double().mean(1)),
                "spectrum": _rounded(own.singular.sum((0, 1)) / written.sum().clamp_min(1)),
            }
        )
        if own.routed is None:
            continue
        share = own.routed / own.routed.sum(1, keepdim=True).clamp_min(1)
        for expert in range(own.update.shape[1]):
            rows.append(
                {
                    "measure": "expert",
                    **head,
                    "expert": expert,
                    "relative": _rounded(own.update[:, expert].mean() / own.weight[expert]),
                    "written": _rounded(written[:, expert].double().mean()),
                    "routed": _rounded(share[:, expert].mean()),
                }
            )
    return rows


def _rounded(values: Tensor) -> Any:
    """As Python's numbers, with five significant digits; None for what is not a number."""
    if values.dim():
        return [_rounded(value) for value in values]
    own = values.item()
    return None if own != own else float(f"{own:.5g}")
