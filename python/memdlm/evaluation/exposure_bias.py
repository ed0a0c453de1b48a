"""Exposure bias: what a model loses by reading its own predictions in place of the truth.

After the paper's figure 3 (arXiv 2603.22241): R = L_seq / L_static at each mask ratio.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdlm.backbone import Backbone
from memdlm.data.collator import IGNORE_INDEX
from memdlm.evaluation.held_out import Adapt, adapted_batches, no_memory
from memdlm.inference import token_hidden

STEPS = 10
_RESAMPLES = 1_000
_CONFIDENCE = 0.95
# Logits are made for so many rows at a time.
_LOGIT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ExposureBias:
    """Mean NLL of the masked response tokens of n examples at each of m mask ratios.

    The sequential trajectory leaves the tokens that the model is least sure of, which are harder
    than random ones, whatever stands beside them. `remaining` tells that apart: R is
    (L_remaining / L_static), which is the choice of tokens, times (L_seq / L_remaining), which is
    what reading predictions in place of the truth costs.

    Attributes:
        ratios: [m], the mask ratios of the trajectory, falling from 1.
        shares: [m], the share of the response tokens that is masked then, mean over the examples:
            a response has whole tokens, and one at least is masked.
        static: [n, m] float64, random tokens masked, the others true: the training condition.
        sequential: [n, m] float64, the response denoised from all masked down to the ratio; what is
            revealed are the model's own predictions, the surest first: the inference condition.
        remaining: [n, m] float64, the masked tokens of `sequential`, the others true.
    """

    ratios: tuple[float, ...]
    shares: tuple[float, ...]
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


def trajectory_ratios(steps: int) -> tuple[float, ...]:
    """The mask ratios of a trajectory of so many steps: 1, 1 - 1/steps, ..., 1/steps."""
    return tuple(1 - step / steps for step in range(steps))


def check_canvas(block_size: int | None) -> None:
    """Whether a model has the two conditions that are compared.

    Raises:
        ValueError: block diffusion, which finishes one block before it begins the next.
    """
    if block_size is not None:
        raise ValueError(
            "block_size must be None: the exposure bias is measured along a trajectory that "
            f"denoises the whole response, which block diffusion never does, got {block_size}"
        )


@torch.no_grad()
def exposure_bias(
    model: nn.Module,
    examples: Sequence[dict[str, Any]],
    *,
    mask_token_id: int,
    pad_token_id: int,
    steps: int = STEPS,
    adapt: Adapt = no_memory,
    batch_size: int = 8,
    seed: int = 0,
) -> ExposureBias:
    """Measure both losses on examples whose response is known.

    The trajectory takes `steps` steps, and every ratio that it passes is measured. A step reveals
    the tokens whose most likely token is most probable, which that token then fills (greedy,
    low-confidence remasking). R depends on the number of steps: in fewer, more is guessed at once.

    Args:
        model: as for `Backbone`, in evaluation mode; not one of block diffusion.
        examples: with `input_ids` and `labels`, -100 on the prompt; at least one label each.
        mask_token_id: the mask token, which is never predicted.
        pad_token_id: fills a batch.
        steps: of the trajectory, at least 2.
        adapt: `no_memory`, or `PromptMemory.adapt`: a memory of the prompt alone.
        batch_size: examples of a batch.
        seed: of the static masks.

    Returns:
        The losses.

    Raises:
        ValueError: no example, one without a response, or fewer than 2 steps.
    """
    if not examples:
        raise ValueError("examples must hold at least one, got none")
    for number, example in enumerate(examples):
        if all(label == IGNORE_INDEX for label in example["labels"]):
            raise ValueError(f"examples must each have a response, got none in number {number}")
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    backbone = Backbone(model)
    ratios = trajectory_ratios(steps)
    parts, shares = [], []
    for first, batch in adapted_batches(examples, batch_size, adapt, "exposure bias"):
        responses = _Responses(backbone, batch, mask_token_id, pad_token_id)
        priority = _priorities(responses.counts, responses.positions.shape[1], first, seed)
        parts.append(responses.measure(ratios, priority))
        shares.append(
            torch.stack([responses.masked_count(r) / responses.counts for r in ratios], dim=1)
        )
    losses = torch.cat(parts)  # [n, m, 3]
    mean_shares = torch.cat(shares).double().mean(0).tolist()
    return ExposureBias(ratios, tuple(mean_shares), *losses.unbind(-1))


def _priorities(counts: Tensor, width: int, first: int, seed: int) -> Tensor:
    """[B, W] float64: one draw per response token, of the example alone; the masks nest."""
    priority = torch.full((len(counts), width), torch.inf, dtype=torch.float64)
    for row, count in enumerate(counts.tolist()):
        draw = np.random.default_rng([seed, first + row]).random(count)
        priority[row, :count] = torch.from_numpy(draw)
    return priority


class _Predicted(NamedTuple):
    """Of each of W places, 0 where it is not masked.

    Keys: `nll` [B, W] float64 of the truth; `token` [B, W] int64, the most likely, and `sure`
    [B, W] float64, its log-probability.
    """

    nll: Tensor
    token: Tensor
    sure: Tensor


class _Responses:
    """A batch of examples, seen as W places for response tokens in each row."""

    def __init__(
        self, backbone: Backbone, batch: Sequence[dict[str, Any]], mask_id: int, pad_id: int
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
        self.counts = response.sum(1)  # [B], on the host
        width = int(self.counts.max())
        # Response tokens first, in order; surplus places hold the row's other positions.
        self.positions = (~response).int().argsort(dim=1, stable=True)[:, :width].to(device)
        self.real = (torch.arange(width) < self.counts[:, None]).to(device)  # [B, W]
        self.ids = ids.to(device)
        self.mask = None if bool(visible.all()) else visible.to(device)
        self.truth = self.ids.gather(1, self.positions)
        self.backbone = backbone
        self.mask_id = mask_id

    def masked_count(self, ratio: float) -> Tensor:
        """[B] int64 on the host: the nearest whole number of tokens, at least one."""
        return (ratio * self.counts).round().long().clamp_min(1)

    def measure(self, ratios: Sequence[float], priority: Tensor) -> Tensor:
        """Static, sequential and remaining loss at each ratio: [B, m, 3] float64."""
        priority = priority.to(self.truth.device)
        masked, filled = self.real, self.truth
        own = None
        losses = []
        for ratio in ratios:
            keep = self.masked_count(ratio).to(self.truth.device)
            if own is not None:
                still = _smallest(own.sure.masked_fill(~masked, torch.inf), keep) & masked
                filled = torch.where(masked & ~still, own.token, filled)
                masked = still
            own = self._predict(filled, masked)
            random = _smallest(priority, keep) & self.real
            nlls = (
                self._predict(self.truth, random).nll,
                own.nll,
                self._predict(self.truth, masked).nll,
            )
            losses.append(torch.stack([nll.sum(1) / keep for nll in nlls], dim=-1))
        return torch.stack(losses, dim=1).cpu()

    def _predict(self, tokens: Tensor, masked: Tensor) -> _Predicted:
        """Predict the masked tokens of a response from the others; only those pass the head."""
        noisy = tokens.masked_fill(masked, self.mask_id)
        own = torch.where(self.real, noisy, self.ids.gather(1, self.positions))
        ids = self.ids.scatter(1, self.positions, own)
        # Masked places first, so that as few as there are get a hidden state.
        width = int(masked.sum(1).max())
        order = (~masked).int().argsort(dim=1, stable=True)[:, :width]  # [B, width]
        hidden = token_hidden(self.backbone, ids, self.positions.gather(1, order), self.mask)
        wanted = masked.gather(1, order)
        found = self._read(hidden[wanted], self.truth.gather(1, order)[wanted])
        places = (torch.arange(len(order), device=order.device)[:, None] * masked.shape[1] + order)[
            wanted
        ]
        whole = [
            part.new_zeros(masked.numel()).index_copy(0, places, part).view_as(masked)
            for part in found
        ]
        return _Predicted(*(part.view(masked.shape) for part in whole))

    def _read(self, hidden: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[M] each: NLL of the truth, the most likely token, its log-probability."""
        weight, bias = self.backbone.head()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        rows = max(1, _LOGIT_BYTES // (weight.shape[0] * dtype.itemsize))
        parts = []
        for own, target in zip(hidden.split(rows), truth.split(rows), strict=True):
            logits = F.linear(own, weight, bias).to(dtype)
            logits[:, self.mask_id] = -torch.inf
            log_sum = logits.logsumexp(-1)
            best = logits.max(-1)
            nll = log_sum - logits.gather(1, target[:, None])[:, 0]
            parts.append((nll.double(), best.indices, (best.values - log_sum).double()))
        nll, token, sure = (torch.cat(part) for part in zip(*parts, strict=True))
        return nll, token, sure


def _smallest(values: Tensor, count: Tensor) -> Tensor:
    """The `count[b]` smallest values of each row, as a bool mask."""
    return values.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]
