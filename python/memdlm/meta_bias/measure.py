"""The outer gradients of the same batches, first order and exact, side by side."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from memdlm.config import DiffusionConfig
from memdlm.meta_bias.groups import trained_groups
from memdlm.meta_bias.likeness import Groups, Scatter, cosine, likeness
from memdlm.meta_bias.options import Setting
from memdlm.objective import MemDLMObjective

Row = dict[str, Any]
MEAN = "mean"
# The truth, and what is compared with it.
EXACT: Literal["exact"] = "exact"
APPROXIMATE: tuple[Literal["first_order", "exact_suffix"], ...] = ("first_order", "exact_suffix")


@dataclass(frozen=True)
class Outer:
    """What one batch gives under one kind of outer gradient.

    Attributes:
        loss: the outer loss.
        gradient: trained parameter's name to its gradient, zeros where there is none.
        clipped_share: of the inner steps' gradients, tensor by tensor, in [0, 1].
        skipped: inner steps that were left out.
        time_ms: of forward and backward.
    """

    loss: float
    gradient: dict[str, Tensor]
    clipped_share: float
    skipped: int
    time_ms: float


def outer_gradient(objective: MemDLMObjective, batch: dict[str, Any]) -> Outer:
    """Run one batch forward and backward.

    Args:
        objective: in evaluation mode, so that nothing is drawn anew.
        batch: from a `MaskCollator` with the objective's memory, on its device.

    Returns:
        Loss, gradient and cost. The parameters' own `grad` is left None.
    """
    parameters = {n: p for n, p in objective.model.named_parameters() if p.requires_grad}
    start = time.perf_counter()
    output = objective(batch)
    output.loss.backward()
    loss = output.loss.item()  # waits for the device
    time_ms = 1e3 * (time.perf_counter() - start)
    gradient = {}
    for name, parameter in parameters.items():
        own = parameter.grad
        gradient[name] = torch.zeros_like(parameter) if own is None else own
        parameter.grad = None
    trace, memory = output.inner, objective.memory
    assert trace is not None
    clipped = torch.zeros_like(trace.norm)
    if memory.inner_clip == "tensor":
        clipped = trace.norm > memory.inner_max_norm
    elif memory.inner_clip == "global":
        clipped = trace.norm.norm(dim=-1) > memory.inner_max_norm
    return Outer(loss, gradient, clipped.double().mean().item(), int(trace.skipped.sum()), time_ms)


def compare_gradients(
    model: nn.Module,
    diffusion: DiffusionConfig,
    setting: Setting,
    batches: Iterable[dict[str, Any]],
) -> list[Row]:
    """Compare the outer gradients of one setting, batch by batch and of their mean.

    Args:
        model: in evaluation mode.
        diffusion: noise and outer loss.
        setting: the inner loop.
        batches: at least 2, on the model's device, from a collator with the setting's memory.

    Returns:
        A row for each batch: "loss", "clipped_share", "skipped", "time_ms" of each kind of
        gradient, "first_order" and "exact_suffix" with what `likeness` says of them beside the
        exact one, and from the second batch on "neighbour", group to the cosine between its exact
        gradient and that of the batch before. And one of the mean gradients: the same comparisons,
        and "noise", `Scatter.noise` of the exact gradients.

    Raises:
        ValueError: a model whose inner loop cannot be differentiated, or without a trained
            parameter.
    """
    with contextlib.ExitStack() as stack:
        objectives: dict[str, MemDLMObjective] = {}
        for kind in (*APPROXIMATE, EXACT):
            memory = dataclasses.replace(setting.memory, meta_gradient=kind)
            objective = MemDLMObjective(model, diffusion, memory).eval()
            stack.callback(objective.backbone.release)
            stack.callback(objective.fast_weights.detach)
            objectives[kind] = objective
        groups = trained_groups(model, objectives[EXACT].backbone)
        return _rows(objectives, groups, setting, batches)


def _rows(
    objectives: Mapping[str, MemDLMObjective],
    groups: Groups,
    setting: Setting,
    batches: Iterable[dict[str, Any]],
) -> list[Row]:
    about = {
        "varied": setting.varied,
        "inner_steps": setting.memory.inner_steps,
        "inner_lr": setting.memory.inner_lr,
        "inner_max_norm": setting.max_norm,
    }
    scatters = {kind: Scatter() for kind in objectives}
    rows, before = [], None
    for number, batch in enumerate(batches):
        found = {kind: outer_gradient(own, batch) for kind, own in objectives.items()}
        for kind, outer in found.items():
            scatters[kind].add(outer.gradient)
        exact = found[EXACT]
        row = {
            **about,
            "batch": number,
            "loss": exact.loss,
            "clipped_share": exact.clipped_share,
            "skipped": exact.skipped,
            "time_ms": {kind: outer.time_ms for kind, outer in found.items()},
        }
        row |= {
            kind: likeness(found[kind].gradient, exact.gradient, groups) for kind in APPROXIMATE
        }
        if before is not None:
            row["neighbour"] = {
                group: cosine(before, exact.gradient, names) for group, names in groups.items()
            }
        before = exact.gradient
        rows.append(row)
    truth = scatters[EXACT].mean()
    mean: Row = {kind: likeness(scatters[kind].mean(), truth, groups) for kind in APPROXIMATE}
    rows.append({**about, "batch": MEAN, **mean, "noise": scatters[EXACT].noise(groups)})
    return [_rounded(row) for row in rows]


def _rounded(value: Any) -> Any:
    """Floats to six significant digits, inside of whatever holds them."""
    if isinstance(value, dict):
        return {key: _rounded(own) for key, own in value.items()}
    if isinstance(value, list):
        return [_rounded(own) for own in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
