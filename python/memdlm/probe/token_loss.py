"""Which of a prompt's tokens are predicted better under its memory."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memdlm.backbone import Backbone
from memdlm.data.collator import make_state
from memdlm.evaluation.held_out import Adapt
from memdlm.inference import Checkpoint
from memdlm.prompt_memory import PromptMemory
from memdlm_kernels import masked_linear_cross_entropy

# Each token's NLL is its mean over so many masks.
_DRAWS = 2


def partition(length: int, ratio: float, generator: np.random.Generator) -> list[np.ndarray]:
    """Masks of about `ratio` of the tokens, at random, that mask every token once.

    Args:
        length: tokens, at least 1.
        ratio: in (0, 1].
        generator: of the order.

    Returns:
        ceil(1 / ratio) arrays [length] bool, or fewer, where there are fewer tokens.
    """
    group = np.empty(length, dtype=np.int64)
    group[generator.permutation(length)] = np.arange(length) % math.ceil(1 / ratio)
    return [group == number for number in range(int(group.max()) + 1)]


@torch.no_grad()
def masked_nll(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    masks: Sequence[np.ndarray],
    *,
    mask_token_id: int,
    pad_token_id: int,
) -> list[Tensor]:
    """NLL of the masked tokens of each prompt, under whatever memory is being read.

    In block diffusion a masked token sees its own block and the clean blocks before it.

    Args:
        backbone: the model, with any boundary.
        prompts: B lists of token ids.
        masks: B arrays [L_b] bool.
        mask_token_id: stands for a masked token.
        pad_token_id: fills a batch; nothing sees it.

    Returns:
        B tensors [L_b] float64 on the CPU, nan where a token is not masked.
    """
    lengths = [len(prompt) for prompt in prompts]
    whole = backbone.block_size or 1
    length = math.ceil(max(lengths) / whole) * whole
    ids = torch.full((len(prompts), length), pad_token_id)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, mask) in enumerate(zip(prompts, masks, strict=True)):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        masked[row, : len(prompt)] = torch.from_numpy(mask)
    visible = torch.arange(length) < torch.tensor(lengths)[:, None]
    even = torch.ones(len(prompts), dtype=torch.float64)
    shift = backbone.right_shift_logits
    state = make_state(ids, masked, masked, even, mask_token_id, right_shift_logits=shift)
    weight, bias = backbone.head()
    device = weight.device
    noisy, rows = state["input_ids"].to(device), state["rows"].to(device)
    context = backbone.context(noisy, None if visible.all() else visible.to(device), rows)
    start = backbone.prefix(noisy, context, ids.to(device))
    hidden = backbone.suffix(start, state["valid"].to(device), context, contextlib.nullcontext())
    nll = masked_linear_cross_entropy(hidden, weight, state["target"].to(device), bias=bias)
    found = torch.full(ids.shape, torch.nan, dtype=torch.float64)
    found[masked] = nll.double().cpu()
    return [row[:own] for row, own in zip(found, lengths, strict=True)]


def measure_tokens(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    adapt: Adapt,
    ratio: float,
    batch_size: int,
    seed: int,
) -> list[Tensor]:
    """NLL of every token of each prompt, masked among others.

    Args:
        checkpoint: the model.
        prompts: n lists of token ids.
        adapt: `no_memory`, or `PromptMemory.adapt`.
        ratio: share of the tokens that is masked at once.
        batch_size: prompts of a forward.
        seed: of the masks, which are not those that a memory is written with.

    Returns:
        n tensors [L] float64, nats, mean over the masks.
    """
    backbone = Backbone(checkpoint.model, block_size=checkpoint.diffusion.block_size)
    found = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        sums = [torch.zeros(len(prompt), dtype=torch.float64) for prompt in batch]
        draws = []
        for number, prompt in enumerate(batch, first):
            generator = np.random.default_rng([seed, number])
            own = [partition(len(prompt), ratio, generator) for _ in range(_DRAWS)]
            draws.append([mask for masks in own for mask in masks])
        with adapt(batch):
            for step in range(max(map(len, draws))):
                # A short prompt has fewer masks than others.
                masks = [own[step] if step < len(own) else np.zeros_like(own[0]) for own in draws]
                nll = masked_nll(
                    backbone,
                    batch,
                    masks,
                    mask_token_id=checkpoint.mask_token_id,
                    pad_token_id=checkpoint.pad_token_id,
                )
                for total, own_nll in zip(sums, nll, strict=True):
                    total += own_nll.nan_to_num()
        found += [total / _DRAWS for total in sums]
    backbone.release()
    return found


def masked_counts(
    memory: PromptMemory, prompts: Sequence[Sequence[int]], mask_token_id: int
) -> list[Tensor]:
    """In how many of the K states that write a prompt's memory each of its tokens is masked.

    Args:
        memory: writes it.
        prompts: n lists of token ids.
        mask_token_id: stands for a masked token.

    Returns:
        n tensors [L] int64.
    """
    found = []
    for prompt in prompts:
        states = memory.inner_batch([prompt])["trajectory"]
        masked = sum(state["input_ids"][0].cpu() == mask_token_id for state in states)
        found.append(torch.as_tensor(masked)[: len(prompt)])
    return found


def token_rows(
    model: str,
    kinds: Sequence[Sequence[str]],
    off: Sequence[Tensor],
    on: Sequence[Tensor],
    masked: Sequence[Tensor],
) -> list[dict[str, Any]]:
    """JSON rows: of each kind of token, apart for those that the memory was written to predict.

    Args:
        model: its name.
        kinds: of the tokens of each prompt.
        off, on: their NLL without the memory and with it.
        masked: from `masked_counts`.

    Returns:
        Means are over prompts of means over a prompt's tokens; `change_of_prompts` lists them, None
        where a prompt has no such token. `fell` is the share of the tokens whose NLL fell,
        `quantiles` those of the change at 5, 25, 50, 75 and 95 %.
    """
    rows = []
    for kind in dict.fromkeys(each for own in kinds for each in own):
        for written in (False, True):
            chosen = [
                torch.tensor([each == kind for each in own]) & ((count > 0) == written)
                for own, count in zip(kinds, masked, strict=True)
            ]
            if not any(own.any() for own in chosen):
                continue
            before = [nll[own] for nll, own in zip(off, chosen, strict=True)]
            after = [nll[own] for nll, own in zip(on, chosen, strict=True)]
            change = torch.cat(after) - torch.cat(before)
            at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
            rows.append(
                {
                    "measure": "tokens",
                    "model": model,
                    "kind": kind,
                    "written": written,
                    "tokens": len(change),
                    "off": _mean([own.mean().item() for own in before if len(own)]),
                    "on": _mean([own.mean().item() for own in after if len(own)]),
                    "fell": round((change < 0).double().mean().item(), 4),
                    "quantiles": [round(value, 5) for value in change.quantile(at).tolist()],
                    "change_of_prompts": [
                        round((own - old).mean().item(), 5) if len(own) else None
                        for own, old in zip(after, before, strict=True)
                    ],
                }
            )
    return rows


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 5)
