"""The bound on a response's log-likelihood, against every mask that there is."""

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch

from memdlm.backbone import Backbone
from memdlm.evaluation.likelihood import (
    masked_log_likelihood,
    response_log_likelihood,
    response_masks,
)
from tests.families import make_family_model
from tests.tiny import MASK, PAD, make_model

IDS = {"mask_token_id": MASK, "pad_token_id": PAD}
# Ragged, with a response of one token and one without a prompt.
PROMPTS = ([3, 1, 4, 1, 5], [2, 7], [], [1, 6, 1, 8, 0, 3, 3])
RESPONSES = ([9, 2, 6, 5], [1], [8, 2, 8, 1, 8], [5, 7])


def every_mask(length):
    """Each mask of a response, with its probability under l ~ U{1..L} and a random choice of l."""
    for count in range(1, length + 1):
        for places in itertools.combinations(range(length), count):
            mask = np.zeros(length, dtype=bool)
            mask[list(places)] = True
            yield mask, 1 / (length * math.comb(length, count))


@torch.no_grad()
def plain_term(model, prompt, response, mask, shift=False):
    """(L / l) log p of the masked tokens, from all logits of one sequence."""
    truth = torch.tensor([*prompt, *response])
    noisy = truth.clone()
    noisy[len(prompt) :][torch.from_numpy(mask)] = MASK
    logits = model(noisy[None], is_causal=False, use_cache=False).logits[0]
    if shift:
        logits = torch.cat((logits[:1], logits[:-1]))
    log_p = logits.log_softmax(-1)
    at = [len(prompt) + int(i) for i in mask.nonzero()[0]]
    return len(mask) / len(at) * sum(log_p[i, truth[i]].item() for i in at)


def exact_bound(term, length):
    """Mean and standard deviation of a term over every mask."""
    weighted = [(term(mask), share) for mask, share in every_mask(length)]
    mean = sum(value * share for value, share in weighted)
    return mean, math.sqrt(sum(share * (value - mean) ** 2 for value, share in weighted))


@pytest.mark.parametrize("family", ["llama", "llada_moe", "dream"])
def test_each_term_is_that_of_a_plain_sum(family):
    model = (make_model() if family == "llama" else make_family_model(family)).eval()
    masks = [response_masks(p, r, 2, 0)[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    own = masked_log_likelihood(Backbone(model), PROMPTS, RESPONSES, masks, **IDS)
    plain = [
        plain_term(model, *request, shift=family == "dream")
        for request in zip(PROMPTS, RESPONSES, masks, strict=True)
    ]
    torch.testing.assert_close(own, torch.tensor(plain, dtype=torch.float64), rtol=1e-9, atol=0)


def test_the_mean_of_many_draws_is_the_exact_bound():
    model = make_model(layers=2).eval()
    prompt, response = [3, 1, 4], [9, 2, 6, 5, 3]
    exact, spread = exact_bound(
        lambda mask: plain_term(model, prompt, response, mask), len(response)
    )
    found = response_log_likelihood(model, [prompt], [response], draws=4000, batch_size=500, **IDS)
    error = found.standard_error.item()
    assert 0 < error < 1.1 * spread / math.sqrt(4000)  # strata vary no more than plain draws
    assert abs(found.mean.item() - exact) < 4 * error


def test_block_diffusion_bounds_the_sum_of_its_blocks():
    """With masks over the whole response the mean is that of each block's own bound."""
    model = make_family_model("llada2").eval()
    backbone = Backbone(model, block_size=2)
    prompt, response = [3, 1, 4], [9, 2, 6]  # the first block of the response is half prompt

    def term(prompt, response):
        def of(mask):
            return masked_log_likelihood(backbone, [prompt], [response], [mask], **IDS).item()

        return of

    whole, _ = exact_bound(term(prompt, response), 3)
    first, _ = exact_bound(term(prompt, response[:1]), 1)
    second, _ = exact_bound(term([*prompt, *response[:1]], response[1:]), 2)
    assert whole == pytest.approx(first + second, rel=1e-9)


@pytest.mark.parametrize("block_size", [None, 4])
def test_a_request_does_not_depend_on_its_batch(block_size):
    family = make_family_model("llada2") if block_size else make_model()
    model = family.eval()
    options = {"draws": 6, "block_size": block_size, **IDS}
    alone = [
        response_log_likelihood(model, [p], [r], batch_size=1, **options)
        for p, r in zip(PROMPTS, RESPONSES, strict=True)
    ]
    for batch_size in (2, 4, 64):
        together = response_log_likelihood(
            model, PROMPTS, RESPONSES, batch_size=batch_size, **options
        )
        for name in ("mean", "standard_error"):
            own = torch.cat([getattr(each, name) for each in alone])
            torch.testing.assert_close(getattr(together, name), own, rtol=1e-9, atol=1e-12)
    assert alone[1].standard_error.item() == 0  # one token, one mask


def test_padding_is_never_seen():
    model = make_model().eval()
    other = IDS | {"pad_token_id": 0}
    one = response_log_likelihood(model, PROMPTS, RESPONSES, draws=4, batch_size=4, **IDS)
    two = response_log_likelihood(model, PROMPTS, RESPONSES, draws=4, batch_size=4, **other)
    torch.testing.assert_close(one.mean, two.mean, rtol=0, atol=0)


def test_the_standard_error_is_that_of_repeated_estimates():
    model = make_model(layers=1).eval()
    options = {"draws": 8, "batch_size": 64, **IDS}
    runs = [
        response_log_likelihood(model, PROMPTS[:1], RESPONSES[:1], seed=seed, **options)
        for seed in range(300)
    ]
    means = torch.cat([run.mean for run in runs])
    reported = torch.cat([run.standard_error for run in runs]).square().mean()
    # The variance of 300 means is known to about 8 %.
    assert means.var().item() == pytest.approx(reported.item(), rel=0.35)


def test_draws_are_of_the_seed_and_the_request():
    prompt, response = PROMPTS[0], RESPONSES[0]
    masks = response_masks(prompt, response, 8, 0)
    np.testing.assert_array_equal(masks, response_masks(prompt, response, 8, 0))
    assert (masks != response_masks(prompt, response, 8, 1)).any()
    # The same tokens, cut elsewhere, are another request.
    assert (masks != response_masks([*prompt[:-1]], [prompt[-1], *response[1:]], 8, 0)).any()
    # Four strata over four counts: each pair masks the count of its stratum.
    assert masks.sum(1).tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_with_a_memory_every_forward_has_the_prompts_as_its_rows(monkeypatch):
    model = make_model().eval()
    seen = []
    entered = []

    @contextlib.contextmanager
    def adapt(prompts):
        entered.append([list(prompt) for prompt in prompts])
        yield

    forward = Backbone.prefix

    def spy(self, input_ids, *arguments, **options):
        seen.append(input_ids)
        return forward(self, input_ids, *arguments, **options)

    monkeypatch.setattr(Backbone, "prefix", spy)
    prompts, responses = [*PROMPTS[:2], PROMPTS[3]], [*RESPONSES[:2], RESPONSES[3]]
    response_log_likelihood(model, prompts, responses, draws=4, batch_size=8, adapt=adapt, **IDS)
    (order,) = entered
    assert sorted(order) == sorted(prompts)
    assert len(seen) == 4
    for ids in seen:
        assert [row[: len(own)].tolist() for row, own in zip(ids, order, strict=True)] == order


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"responses": [[1]]}, "responses must be one for each of 2 prompts, got 1"),
        ({"responses": [[1], []]}, "responses must not be empty, got no token in number 1"),
        ({"prompts": [[1], [MASK]]}, "prompts must not hold the mask token"),
        ({"responses": [[1], [MASK]]}, "responses must not hold the mask token"),
        ({"responses": [[1], [1000]]}, "responses must hold token ids in"),
        ({"prompts": [[1], [1] * 64]}, "must be at most 64 tokens together, got 64 \\+ 1"),
        ({"draws": 3}, "draws must be 1 or an even number, got 3"),
        ({"draws": 0}, "draws must be 1 or an even number, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(change, named):
    options = {"prompts": [[1], [2]], "responses": [[3], [4]], **IDS} | change
    with pytest.raises(ValueError, match=named):
        response_log_likelihood(make_model(layers=1), **options)
