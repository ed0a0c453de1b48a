"""How probable a response is: the Monte-Carlo bound of masked diffusion on its log-likelihood.

After LLaDA (arXiv 2502.09992, equation 6).
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from memdlm.backbone import Backbone
from memdlm.data.collator import make_state
from memdlm.evaluation.held_out import Adapt, no_memory
from memdlm_kernels import masked_linear_cross_entropy

# As published: enough for stable results on multiple-choice tasks.
DRAWS = 128


@dataclass(frozen=True)
class LogLikelihood:
    """Estimates of the bound for n responses, in nats.

    Attributes:
        mean: [n] float64.
        standard_error: [n] float64, of `mean` over the masks that were drawn; 0 for a response of
            one token, where the bound is exact, and not a number after a single draw.
    """

    mean: Tensor
    standard_error: Tensor


@torch.no_grad()
def response_log_likelihood(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    mask_token_id: int,
    pad_token_id: int,
    block_size: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    batch_size: int = 8,
    adapt: Adapt = no_memory,
    title: str = "log-likelihood",
    on_batch: Callable[[Sequence[int], LogLikelihood], None] | None = None,
) -> LogLikelihood:
    """Estimate a lower bound on log p(response | prompt).

    The bound is the mean, over l ~ U{1..L} and every choice of l of the L response tokens, of
    (L / l) times the sum of log p of these l tokens, all l masked at once. The range of l is cut
    into as many strata as there are pairs of draws; the two of a pair are independent, so the
    square of the standard error is unbiased. Draws depend on the seed and the tokens alone.

    In block diffusion a masked token sees its own block and the clean blocks before it, as in
    training; masks are drawn over the whole response all the same. A random order of the response
    is one of each block too, so the mean is the sum of the blocks' own bounds.

    Replaces `model(noisy).logits.log_softmax(-1)` without logits: only masked tokens pass the head.

    Args:
        model: as for `Backbone`, in evaluation mode.
        prompts: n lists of token ids; an empty one for the likelihood of a text on its own.
        responses: n lists of token ids, at least one each.
        mask_token_id: the mask token, in no prompt or response.
        pad_token_id: fills a batch; nothing sees it.
        block_size: tokens of a block in block diffusion, counted from the first of the prompt.
        draws: masks for each response, 1 or an even number.
        seed: of the masks, at least 0.
        batch_size: rows of a forward: as many requests, and more draws of each where fewer are
            left.
        adapt: `no_memory`, or `PromptMemory.adapt`: then every forward has one row for each prompt.
        title: of the progress bar.
        on_batch: called after each batch with the numbers of its requests and their estimates.

    Returns:
        The bound and its standard error, in the order of the requests.

    Raises:
        ValueError: numbers of prompts and responses that differ, an empty response, a mask token
            or an unknown one in a request, a request longer than the model's positions, draws
            that are odd and not 1, a negative seed, a batch size below 1.

    Source:
        LLaDA (arXiv 2502.09992), equation 6 and appendix B.5.
    """
    backbone = Backbone(model, block_size=block_size)
    _check(backbone, prompts, responses, mask_token_id, draws, seed, batch_size)
    found = LogLikelihood(
        torch.zeros(len(prompts), dtype=torch.float64),
        torch.zeros(len(prompts), dtype=torch.float64),
    )
    # The longest first: what does not fit in memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]) - len(responses[i]))
    with tqdm(total=len(order), desc=title) as bar:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            pairs = [(prompts[i], responses[i]) for i in chosen]
            # One row for each prompt where a memory is read: row b has that of prompt b.
            copies = 1 if adapt is not no_memory else max(1, batch_size // len(chosen))
            with adapt([prompt for prompt, _ in pairs]):
                values = _draw_all(
                    backbone, pairs, mask_token_id, pad_token_id, draws, seed, copies
                )
            own = LogLikelihood(
                values.mean(1), _standard_error(values, [len(response) for _, response in pairs])
            )
            found.mean[chosen], found.standard_error[chosen] = own.mean, own.standard_error
            if on_batch is not None:
                on_batch(chosen, own)
            bar.update(len(chosen))
    return found


@torch.no_grad()
def masked_log_likelihood(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    masks: Sequence[np.ndarray],
    *,
    mask_token_id: int,
    pad_token_id: int,
) -> Tensor:
    """One term of the bound for each row: (L / l) times the log-likelihood of its l masked tokens.

    Args:
        backbone: the model, with any boundary.
        prompts: B lists of token ids.
        responses: B lists of token ids, L_b of row b.
        masks: B arrays [L_b] bool, with at least one True each.
        mask_token_id, pad_token_id: as for `response_log_likelihood`.

    Returns:
        [B] float64, on the CPU.
    """
    weight, bias = backbone.head()
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    whole = backbone.block_size or 1
    length = math.ceil(max(lengths) / whole) * whole
    ids = torch.full((len(prompts), length), pad_token_id)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, response, mask) in enumerate(zip(prompts, responses, masks, strict=True)):
        ids[row, : lengths[row]] = torch.tensor([*prompt, *response])
        masked[row, len(prompt) : lengths[row]] = torch.from_numpy(mask)
    visible = torch.arange(length) < torch.tensor(lengths)[:, None]
    scale = torch.tensor([len(mask) / mask.sum() for mask in masks], dtype=torch.float64)
    state = make_state(
        ids, masked, masked, scale, mask_token_id, right_shift_logits=backbone.right_shift_logits
    )
    device = weight.device
    noisy, rows = state["input_ids"].to(device), state["rows"].to(device)
    context = backbone.context(noisy, None if visible.all() else visible.to(device), rows)
    start = backbone.prefix(noisy, context, ids.to(device))
    hidden = backbone.suffix(
        start, state["valid"].to(device), context, contextlib.nullcontext()
    )  # [M, D]
    nll = masked_linear_cross_entropy(hidden, weight, state["target"].to(device), bias=bias)
    total = torch.zeros(len(prompts), dtype=torch.float64)
    return total.index_add_(0, state["sample"], -nll.double().cpu() * state["weight"])


def _draw_all(
    backbone: Backbone,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    mask_token_id: int,
    pad_token_id: int,
    draws: int,
    seed: int,
    copies: int,
) -> Tensor:
    """[B, draws] float64, `copies` draws of every request in a forward."""
    if all(len(response) == 1 for _, response in pairs):
        draws = 1  # there is one mask alone
    every = [response_masks(prompt, response, draws, seed) for prompt, response in pairs]
    values = torch.empty(len(pairs), draws, dtype=torch.float64)
    for some in _slices(draws, copies):
        count = some.stop - some.start
        own = masked_log_likelihood(
            backbone,
            [prompt for prompt, _ in pairs] * count,
            [response for _, response in pairs] * count,
            [masks[draw] for draw in range(some.start, some.stop) for masks in every],
            mask_token_id=mask_token_id,
            pad_token_id=pad_token_id,
        )
        values[:, some] = own.view(count, len(pairs)).T
    return values


def _slices(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def response_masks(
    prompt: Sequence[int], response: Sequence[int], draws: int, seed: int
) -> np.ndarray:
    """The masks of a request: draws 2h and 2h + 1 take l from stratum h of {1..L}.

    Args:
        prompt, response: token ids; with the seed they decide the draws.
        draws: how many masks.
        seed: at least 0.

    Returns:
        [draws, L] bool.
    """
    length = len(response)
    tokens = np.array([len(prompt), *prompt, *response], dtype="<i8").tobytes()
    words = np.frombuffer(hashlib.sha256(tokens).digest()[:16], dtype="<u4")
    generator = np.random.default_rng([seed, *map(int, words)])
    strata = max(1, draws // 2)
    masks = np.zeros((draws, length), dtype=bool)
    for draw in range(draws):
        share = (draw // 2 + generator.random()) / strata  # in [0, 1)
        count = 1 + min(int(share * length), length - 1)
        masks[draw, generator.permutation(length)[:count]] = True
    return masks


def _standard_error(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """[B] float64, from the difference of each pair of draws, [B, draws]."""
    if values.shape[1] == 1:
        error = torch.full((len(values),), torch.nan, dtype=torch.float64)
    else:
        error = (values[:, ::2] - values[:, 1::2]).norm(dim=1) / values.shape[1]
    return error.masked_fill(torch.tensor(lengths) == 1, 0.0)


def _check(
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    mask_token_id: int,
    draws: int,
    seed: int,
    batch_size: int,
) -> None:
    if len(prompts) != len(responses):
        raise ValueError(
            f"responses must be one for each of {len(prompts)} prompts, got {len(responses)}"
        )
    if draws < 1 or (draws > 1 and draws % 2):
        raise ValueError(f"draws must be 1 or an even number, got {draws}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    positions = backbone.config.max_position_embeddings
    vocabulary = backbone.head()[0].shape[0]
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if len(response) == 0:
            raise ValueError(f"responses must not be empty, got no token in number {number}")
        if len(prompt) + len(response) > positions:
            raise ValueError(
                f"a prompt and its response must be at most {positions} tokens together, got "
                f"{len(prompt)} + {len(response)} in number {number}"
            )
        for name, tokens in (("prompts", prompt), ("responses", response)):
            if mask_token_id in tokens:
                raise ValueError(
                    f"{name} must not hold the mask token, got {mask_token_id} in number {number}"
                )
            unknown = next((token for token in tokens if not 0 <= token < vocabulary), None)
            if unknown is not None:
                raise ValueError(
                    f"{name} must hold token ids in [0, {vocabulary}), got {unknown} in number "
                    f"{number}"
                )
