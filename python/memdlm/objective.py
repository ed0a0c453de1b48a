"""The outer step: from a batch to a loss, for plain MDLM and for MemDLM.

Both are modules whose `forward` is the single call that a training loop, DDP or a compiler sees.
`record_function` marks the parts of a step in traces of `torch.profiler`.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from memdlm.backbone import Backbone, find_targets
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import State
from memdlm.fast_weights import FastWeights
from memdlm.inner_graph import InnerGraph
from memdlm.inner_loop import (
    Boundary,
    InnerTrace,
    Reuse,
    adapt,
    pre_anchor_boundaries,
    teacher_boundaries,
    untouched_generators,
)
from memdlm.recorded_keys import RecordedKeys
from memdlm.unroll import check_exact, unroll
from memdlm_kernels import masked_linear_cross_entropy


@dataclass
class ObjectiveOutput:
    """What one batch gives.

    Attributes:
        loss: [] float32 (float64 for a float64 model), connected to the model's parameters.
        inner: what the inner steps saw, None for plain MDLM or with memory off.
    """

    loss: Tensor
    inner: InnerTrace | None = None


class MDLMObjective(nn.Module):
    """The loss of masked diffusion: sum_b w(t_b) sum_{masked i} -log p(x0_i | x_t) / normaliser.

    Replaces `F.cross_entropy(model(x_t).logits, ...)` over all positions. Logits are never
    allocated, and the last layer runs on masked rows only.

    Args:
        model: a Hugging Face causal LM (see `Backbone`), made bidirectional.
        diffusion: noise and loss; the collator must have the same.

    Raises:
        ValueError: a model that cannot be split.
    """

    def __init__(self, model: nn.Module, diffusion: DiffusionConfig) -> None:
        super().__init__()
        self.model = model
        self.diffusion = diffusion
        self.backbone = Backbone(model, block_size=diffusion.block_size)

    def forward(self, batch: dict[str, Any], normalizer: float | None = None) -> ObjectiveOutput:
        """Loss of a batch.

        Args:
            batch: from `MaskCollator`, on the model's device.
            normalizer: what the weighted sum is divided by; None for this batch's own;
                under gradient accumulation it is the whole accumulated batch's.

        Returns:
            The loss, connected to the model's parameters also where no token is masked.
        """
        anchor = batch["anchor"]
        boundary = anchor_boundary(self.backbone, batch)
        loss = outer_loss(
            self.backbone,
            boundary,
            anchor,
            contextlib.nullcontext(),
            batch["normalizer"] if normalizer is None else normalizer,
        )
        return ObjectiveOutput(loss)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute each layer's activations in backward; the options are the model's own."""
        enable: Any = self.model.gradient_checkpointing_enable
        enable(**options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """The same, by the name that newer versions of transformers have for it."""
        enable: Any = self.model.activation_checkpointing_enable
        enable(**options)


class MemDLMObjective(MDLMObjective):
    """The same loss, conditioned on fast weights that an inner loop writes for every batch.

    The anchor's prefix runs once and serves the last inner step and the outer pass; the other
    states' prefixes run together, without a graph. The fast weights are constants of the outer loss
    (first order), unless `meta_gradient` says otherwise.

    With dropout in the prefix, the last inner step and the outer pass see one draw of it. Inner
    steps leave the default random generators as they found them, so that the outer pass draws what
    plain MDLM would.

    Args:
        model: as for `MDLMObjective`.
        diffusion: noise and loss; the collator must have the same.
        memory: the inner loop; the collator must have the same.

    Raises:
        ValueError: a model that cannot be split, or without a layer that the targets match.
    """

    def __init__(self, model: nn.Module, diffusion: DiffusionConfig, memory: MemoryConfig) -> None:
        super().__init__(model, diffusion)
        self.memory = memory
        targets, boundary = find_targets(model, memory.target, memory.layer_fraction)
        self.backbone = Backbone(model, boundary, diffusion.block_size)
        if memory.meta_gradient != "first_order":
            check_exact(self.backbone, memory.meta_gradient)
        self.fast_weights = FastWeights(targets, memory)
        self.fast_weights.guard(self.backbone.decoder.embed_tokens)
        self._graph = InnerGraph(self.backbone, self.fast_weights, memory)

    def forward(
        self,
        batch: dict[str, Any],
        normalizer: float | None = None,
        *,
        memory_enabled: bool = True,
    ) -> ObjectiveOutput:
        """Write the memory from the batch, then take the outer loss with it.

        Args:
            batch: from a `MaskCollator` with a memory config, on the model's device.
            normalizer: as for `MDLMObjective`.
            memory_enabled: False computes plain MDLM, bit for bit.

        Returns:
            The loss and the trace of the inner steps.
        """
        if not memory_enabled:
            return super().forward(batch, normalizer)
        recorded = RecordedKeys() if self._reuses(batch) else None
        anchor = anchor_boundary(self.backbone, batch, recorded)
        if self.memory.meta_gradient == "first_order" or not torch.is_grad_enabled():
            trace = self.write_memory(batch, anchor, recorded)
            reading = self.fast_weights.reading()
        else:
            written, trace = self._unroll(batch, anchor, recorded)
            reading = self.fast_weights.reading_of(written)
        loss = outer_loss(
            self.backbone,
            anchor,
            batch["anchor"],
            reading,
            batch["normalizer"] if normalizer is None else normalizer,
        )
        return ObjectiveOutput(loss, trace)

    @property
    def held_bytes(self) -> int:
        """What is kept between batches: the fast weights, and what `inner_graph` recorded."""
        return self.fast_weights.nbytes + self._graph.nbytes

    def _reuses(self, batch: dict[str, Any]) -> bool:
        """Whether noisier states will read the keys and values of the anchor's prefix."""
        noisier = any(not state["is_anchor"] for state in batch["trajectory"])
        return noisier and self.memory.prefix_reuse == "prompt_kv"

    def write_memory(
        self,
        batch: dict[str, Any],
        anchor: Boundary | None = None,
        recorded: RecordedKeys | None = None,
        *,
        reset: bool = True,
    ) -> InnerTrace:
        """Reset the fast weights and run the inner loop on a batch's trajectory.

        Args:
            batch: `trajectory`, `memory_seed`, and `attention_mask` where something is padded; with
                `prefix_reuse` also `changed`.
            anchor: the anchor's boundary, read without its graph; made here if it is None.
            recorded: what that anchor's prefix recorded, for `prefix_reuse`; closed afterwards.
            reset: False goes on from what was written before, in as many sets as the batch needs.

        Returns:
            The trace of the inner steps. The fast weights stay until the next reset.

        Raises:
            ValueError: an anchor without what its prefix recorded, where that is needed; going on
                with `inner_graph`, whose recorded graphs begin with the reset.
        """
        states: list[State] = batch["trajectory"]
        seeds = batch["memory_seed"]
        if self.memory.inner_graph and not reset:
            raise ValueError("reset must be True with inner_graph, got False")
        with untouched_generators(seeds.device):
            reuses = self._reuses(batch)
            if anchor is None:
                recorded = RecordedKeys() if reuses else None
                with torch.no_grad():
                    anchor = anchor_boundary(self.backbone, batch, recorded)
            elif reuses and recorded is None:
                raise ValueError(
                    "recorded must be what the anchor's prefix recorded with prefix_reuse "
                    "'prompt_kv', got None"
                )
            boundaries = self._boundaries(batch, anchor, recorded)
            teachers = self._teachers(batch)
            if self.memory.inner_graph:
                return self._graph(seeds, states, boundaries, teachers)
            if reset:
                with record_function("memdlm.reset"):
                    self.fast_weights.reset(seeds)
            return adapt(
                self.backbone, self.fast_weights, states, boundaries, teachers, self.memory
            )

    def _boundaries(
        self, batch: dict[str, Any], anchor: Boundary, recorded: RecordedKeys | None
    ) -> list[Boundary]:
        """Where the step on each state starts; the anchor's still has its graph."""
        states: list[State] = batch["trajectory"]
        reuse = None
        if recorded is not None:
            reuse = Reuse(batch["changed"], anchor.activations, recorded)
        others = [state for state in states if not state["is_anchor"]]
        mask = batch.get("attention_mask")
        made = iter(pre_anchor_boundaries(self.backbone, others, batch["input_ids"], mask, reuse))
        if recorded is not None:
            recorded.close()
        return [anchor if state["is_anchor"] else next(made) for state in states]

    def _teachers(self, batch: dict[str, Any]) -> list[Boundary | None]:
        return teacher_boundaries(
            self.backbone,
            batch["trajectory"],
            batch["anchor"]["input_ids"],
            batch["input_ids"],
            batch.get("attention_mask"),
            self.memory,
        )

    def _unroll(
        self, batch: dict[str, Any], anchor: Boundary, recorded: RecordedKeys | None
    ) -> tuple[Tensor, InnerTrace]:
        """The written fast weights [S, T], connected to what they were written with."""
        states: list[State] = batch["trajectory"]
        with untouched_generators(batch["memory_seed"].device):
            boundaries: list[Boundary | None]
            if self.memory.meta_gradient == "exact":
                boundaries = [anchor if state["is_anchor"] else None for state in states]
            else:
                boundaries = [*self._boundaries(batch, anchor, recorded)]
            teachers = self._teachers(batch)
            with record_function("memdlm.reset"):
                self.fast_weights.reset(batch["memory_seed"])
            return unroll(
                self.backbone,
                self.fast_weights,
                states,
                boundaries,
                teachers,
                batch["input_ids"],
                batch.get("attention_mask"),
                self.memory,
            )


def anchor_boundary(
    backbone: Backbone, batch: dict[str, Any], recorded: RecordedKeys | None = None
) -> Boundary:
    """Run the prefix of a batch's anchor state, with its graph.

    Args:
        backbone: the split model.
        batch: from `MaskCollator`.
        recorded: takes the keys and values of its layers.

    Returns:
        The boundary.

    Raises:
        ValueError: the collator reads other rows for a token's logits than the model does.
    """
    if batch["right_shift_logits"] != backbone.right_shift_logits:
        raise ValueError(
            "right_shift_logits of the collator must be the model's, "
            f"{backbone.right_shift_logits}, got {batch['right_shift_logits']}"
        )
    anchor: State = batch["anchor"]
    ids = anchor["input_ids"]
    with record_function("memdlm.anchor_prefix"):
        context = backbone.context(ids, batch.get("attention_mask"), anchor["rows"])
        activations = backbone.prefix(ids, context, batch["input_ids"], recorded)
        return Boundary(activations, context)


def outer_loss(
    backbone: Backbone,
    boundary: Boundary,
    anchor: State,
    memory: contextlib.AbstractContextManager[Any],
    normalizer: float,
) -> Tensor:
    """Weighted NLL of the anchor's masked rows, divided by the normaliser.

    Args:
        backbone: the split model.
        boundary: the anchor's, with its graph.
        anchor: targets and weights.
        memory: the context under which the suffix reads its fast weights.
        normalizer: above 0.

    Returns:
        [] loss.
    """
    weight, bias = backbone.head()
    with record_function("memdlm.outer_suffix"):
        rows = backbone.suffix(
            boundary.activations, anchor["valid"], boundary.context, memory
        )  # [M, D]
    with record_function("memdlm.outer_loss"):
        return masked_linear_cross_entropy(
            rows,
            weight,
            anchor["target"],
            bias=bias,
            token_weight=anchor["weight"].to(torch.promote_types(rows.dtype, torch.float32)),
            reduction="mean",
            normalizer=normalizer,
            # Ignored are at most the rows that fill up M: the step does not wait to count them.
            compact=False,
        )
