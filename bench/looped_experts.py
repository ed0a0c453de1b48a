"""Experts as published models run them: a linear layer each, one after another in Python."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdlm.models.decoder import DenseFFN


class LoopedExperts(nn.ModuleList):
    """Computes what a module of stacked experts does, with views of its weights.

    Args:
        stacked: with `gate_up_proj` [E, 2 I, D] and `down_proj` [E, D, I].
    """

    def __init__(self, stacked: Any) -> None:
        super().__init__()
        for gate_up, down in zip(stacked.gate_up_proj, stacked.down_proj, strict=True):
            with torch.device("meta"):  # its own weights are not used
                expert = DenseFFN(*down.shape)
            gate, up = gate_up.detach().chunk(2)
            for linear, weight in (
                (expert.gate_proj, gate),
                (expert.up_proj, up),
                (expert.down_proj, down.detach()),
            ):
                linear.weight = nn.Parameter(weight, requires_grad=gate_up.requires_grad)
            self.append(expert)

    def forward(self, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Rows [N, D], indices and weights [N, k] of their experts: the weighted sums [N, D]."""
        out = torch.zeros_like(rows)
        chosen = F.one_hot(index, len(self)).permute(2, 1, 0)  # [E, k, N]
        for number, expert in enumerate(self):
            place, row = torch.where(chosen[number])
            out.index_add_(0, row, expert(rows[row]) * weights[row, place, None])
        return out


def with_looped_experts(model: Any, *, share_weights: bool) -> Any:
    """A copy of a model, whose experts are looped over where it has some.

    Args:
        model: a causal LM.
        share_weights: whether both have one set of weights; they must then stay as they are.
    """
    shared = {id(own): own for own in model.parameters()} if share_weights else {}
    looped = copy.deepcopy(model, memo=shared)
    for layer in looped.get_decoder().layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = LoopedExperts(layer.mlp.experts)
    return looped
