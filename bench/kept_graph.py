"""The exact gradient the obvious way: the inner steps with all their graphs kept, one backward."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from memdlm.inner_loop import Boundary, step_loss
from memdlm.objective import MemDLMObjective, anchor_boundary, outer_loss
from memdlm_kernels import fast_weight_sgd, reference_ops


def kept_graph_loss(objective: MemDLMObjective, batch: dict[str, Any]) -> Tensor:
    """The outer loss, connected to everything that the inner steps read.

    Args:
        objective: with one inner epoch, `inner_loss` "cross_entropy" and `prefix_reuse` "none".
        batch: from `MaskCollator`.

    Returns:
        [] loss, what `objective` with `meta_gradient` "exact" returns.
    """
    backbone, store, config = objective.backbone, objective.fast_weights, objective.memory
    anchor = anchor_boundary(backbone, batch)
    store.reset(batch["memory_seed"])
    fast_weights = store.param.clone().requires_grad_()
    for state in batch["trajectory"]:
        start = anchor
        if not state["is_anchor"]:
            ids = state["input_ids"]
            context = backbone.context(ids, batch.get("attention_mask"), state["rows"])
            start = Boundary(backbone.prefix(ids, context, batch["input_ids"]), context)
        # What is differentiated twice: fused kernels are not.
        with reference_ops(), sdpa_kernel(SDPBackend.MATH):
            loss = step_loss(
                backbone,
                state,
                start,
                None,
                store.reading_of(fast_weights),
                backbone.head(),
                len(fast_weights),
                config,
                recompute=False,
            )
            (gradient,) = torch.autograd.grad(loss.sum(), fast_weights, create_graph=True)
        fast_weights, _, _ = fast_weight_sgd(
            fast_weights,
            gradient,
            store.segments,
            config.inner_lr,
            config.inner_max_norm,
            clip=config.inner_clip,
            loss=loss.detach(),
        )
    reading = store.reading_of(fast_weights)
    return outer_loss(backbone, anchor, batch["anchor"], reading, batch["normalizer"])
