"""Exposure bias: what a model loses by reading its own predictions in place of the truth.

After the paper's figure 3 (arXiv 2603.22241): R = L_seq / L_static at each mask ratio.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdlm.backbone import Backbone
from memdlm.data.collator import IGNORE_INDEX
from memdlm.evaluation.held_out import Adapt, adapted_batches, no_memory
from memdlm.inference import token_logits

RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
_RESAMPLES = 1_000
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class ExposureBias:
    """Mean NLL of the masked response tokens of n examples at each of m mask ratios.

    The sequential trajectory leaves the tokens that the model is least sure of, which are harder
    than random ones, whatever stands beside them. `remaining` tells that apart: R is
    (L_remaining / L_static), which is the choice of tokens, times (L_seq / L_remaining), which is
    what reading predictions in place of the truth costs.

    Attributes:
        ratios: [m], the share of response tokens that is masked, falling from 1.
        static: [n, m] float64, random tokens masked, the others true: the training condition.
        sequential: [n, m] float64, the response denoised from all masked down to the ratio; what is
            revealed are the model's own predictions, the surest first: the inference condition.
        remaining: [n, m] float64, the masked tokens of `sequential`, the others true.
    """

    ratios: tuple[float, ...]
    static: Tensor
    sequential: Tensor
    remaining: Tensor

    def ratio(self, over: str = "static") -> tuple[Tensor, Tensor, Tensor]:
        """R at each mask ratio, with its confidence band.

        Args:
            over: what L_seq is divided by: "static", or "remaining" for the part that the choice
                of tokens does not explain.

        Returns:
            The ratio of means, and the ends of its 95 % band, by resampling the examples; each [m]
            float64. Not a number where the denominator is 0.

        Raises:
            ValueError: `over` is neither.
        """
        if over not in ("static", "remaining"):
            raise ValueError(f"over must be 'static' or 'remaining', got {over!r}")
        below = self.static if over == "static" else self.remaining
        chosen = np.random.default_rng(0).integers(
            len(below), size=(_RESAMPLES, len(below))
        )  # [resamples, n]
        draws = torch.from_numpy(chosen)
        resampled = self.sequential[draws].mean(1) / below[draws].mean(1)  # [resamples, m]
        tail = (1 - _CONFIDENCE) / 2
        ends = resampled.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
        return self.sequential.mean(0) / below.mean(0), ends[0], ends[1]


@torch.no_grad()
def exposure_bias(
    model: nn.Module,
    examples: Sequence[dict[str, Any]],
    *,
    mask_token_id: int,
    pad_token_id: int,
    ratios: Sequence[float] = RATIOS,
    adapt: Adapt = no_memory,
    canvas_block: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> ExposureBias:
    """Measure both losses on examples whose response is known.

    One forward for each ratio and loss. Between two ratios the sequential trajectory reveals, all
    at once, as many tokens as it takes: those whose most likely token is most probable, which that
    token then fills (greedy, low-confidence remasking).

    Args:
        model: as for `Backbone`, in evaluation mode.
        examples: with `input_ids` and `labels`, -100 on the prompt; at least one label each.
        mask_token_id: the mask token, which is never predicted.
        pad_token_id: fills a batch.
        ratios: mask ratios in (0, 1]; 1 is measured first, whether it is asked for or not.
        adapt: `no_memory`, or `PromptMemory.adapt`: a memory of the prompt alone.
        canvas_block: for a model of block diffusion, which sees no later block: see
            `Backbone.context`.
        batch_size: examples of a batch; [batch, response, vocabulary] logits are made of it.
        seed: of the static masks.

    Returns:
        The losses.

    Raises:
        ValueError: no example, one without a response, or a ratio outside (0, 1].
    """
    if not examples:
        raise ValueError("examples must hold at least one, got none")
    for number, example in enumerate(examples):
        if all(label == IGNORE_INDEX for label in example["labels"]):
            raise ValueError(f"examples must each have a response, got none in number {number}")
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise ValueError(f"ratios must be in (0, 1], got {ratio}")
    asked = tuple(sorted({1.0, *ratios}, reverse=True))
    backbone = Backbone(model)
    parts = []
    for first, batch in adapted_batches(examples, batch_size, adapt, "exposure bias"):
        responses = _Responses(backbone, batch, mask_token_id, pad_token_id, canvas_block)
        priority = _priorities(responses.counts, responses.positions.shape[1], first, seed)
        parts.append(responses.measure(asked, priority))
    losses = torch.cat(parts)  # [n, m, 3]
    return ExposureBias(asked, *losses.unbind(-1))


def _priorities(counts: Tensor, width: int, first: int, seed: int) -> Tensor:
    """[B, W] float64: one draw per response token, of the example alone; the masks nest."""
    priority = torch.full((len(counts), width), torch.inf, dtype=torch.float64)
    for row, count in enumerate(counts.tolist()):
        draw = np.random.default_rng([seed, first + row]).random(count)
        priority[row, :count] = torch.from_numpy(draw)
    return priority


class _Responses:
    """A batch of examples, seen as W places for response tokens in each row."""

    def __init__(
        self,
        backbone: Backbone,
        batch: Sequence[dict[str, Any]],
        mask_id: int,
        pad_id: int,
        canvas_block: int | None,
    ) -> None:
        device = backbone.head()[0].device
        length = max(len(example["input_ids"]) for example in batch)
        ids = torch.full((len(batch), length), pad_id)
        labels = torch.full_like(ids, IGNORE_INDEX)
        visible = torch.zeros_like(ids, dtype=torch.bool)
        for row, example in enumerate(batch):
            own = len(example["input_ids"])
            ids[row, :own] = torch.as_tensor(example["input_ids"])
            labels[row, :own] = torch.as_tensor(example["labels"])
            visible[row, :own] = True
        response = labels != IGNORE_INDEX
        self.counts = response.sum(1)  # [B]
        width = int(self.counts.max())
        # Response tokens first, in order; surplus places hold the row's other positions.
        self.positions = (~response).int().argsort(dim=1, stable=True)[:, :width].to(device)
        self.real = (torch.arange(width) < self.counts[:, None]).to(device)  # [B, W]
        self.ids = ids.to(device)
        self.mask = None if bool(visible.all()) else visible.to(device)
        self.truth = self.ids.gather(1, self.positions)
        self.backbone = backbone
        self.mask_id = mask_id
        self.canvas_block = canvas_block

    def measure(self, ratios: Sequence[float], priority: Tensor) -> Tensor:
        """Static, sequential and remaining loss at each ratio: [B, m, 3] float64."""
        priority = priority.to(self.truth.device)
        counts = self.counts.to(self.truth.device)
        masked, filled = self.real, self.truth
        logits = torch.empty(0)
        losses = []
        for number, ratio in enumerate(ratios):
            keep = (ratio * counts + 1e-9).long().clamp_min(1)  # masked tokens of each row
            if number > 0:
                guess = logits.max(-1)
                surest = (guess.values - logits.logsumexp(-1)).masked_fill(~masked, torch.inf)
                still = _smallest(surest, keep) & masked
                filled = torch.where(masked & ~still, guess.indices, filled)
                masked = still
            logits = self._logits(filled, masked)
            truth_beside = self._logits(self.truth, masked)
            random = _smallest(priority, keep) & self.real
            losses.append(
                torch.stack(
                    [
                        self._loss(self._logits(self.truth, random), random),
                        self._loss(logits, masked),
                        self._loss(truth_beside, masked),
                    ],
                    dim=-1,
                )
            )
        return torch.stack(losses, dim=1).cpu()

    def _logits(self, tokens: Tensor, masked: Tensor) -> Tensor:
        """[B, W, V] in float32 or wider, from a response of these tokens with some masked."""
        noisy = tokens.masked_fill(masked, self.mask_id)
        own = torch.where(self.real, noisy, self.ids.gather(1, self.positions))
        ids = self.ids.scatter(1, self.positions, own)
        logits = token_logits(
            self.backbone, ids, self.positions, self.mask, canvas_block=self.canvas_block
        )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits[..., self.mask_id] = -torch.inf
        return logits

    def _loss(self, logits: Tensor, masked: Tensor) -> Tensor:
        """Mean NLL of the truth at the masked tokens of each row: [B] float64."""
        nll = F.cross_entropy(logits.flatten(0, 1), self.truth.flatten(), reduction="none")
        kept = nll.view_as(self.truth).double() * masked
        return kept.sum(1) / masked.sum(1)


def _smallest(values: Tensor, count: Tensor) -> Tensor:
    """The `count[b]` smallest values of each row, as a bool mask."""
    return values.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]
