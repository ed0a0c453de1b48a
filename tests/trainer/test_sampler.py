"""The sampler against a slow one: one sequence, all logits, loops over tokens."""

import itertools
import math

import pytest
import torch

from memdlm.backbone import Backbone
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator
from memdlm.objective import MemDLMObjective
from memdlm.sampler import Sampler, SamplerConfig, row_seeds, sampler_config
from memdlm.sampler.confidence import guess
from memdlm.sampler.schedule import even_split, reveal_probabilities, time_grid_split
from tests.families import make_family_model
from tests.tiny import MASK, PAD, VOCABULARY, make_model

END = 58
PROMPTS = [[5, 9, 13, 2, 7], [3, 1], [11, 12, 14, 8, 30, 31, 32, 4]]
NEW = 12


def model_of(family):
    return (make_model() if family == "llama" else make_family_model(family)).eval()


def sampler_of(model, ends=()):
    return Sampler(model, mask_token_id=MASK, pad_token_id=PAD, end_token_ids=ends)


@pytest.fixture(scope="module")
def llama():
    return model_of("llama")


def all_logits(model, tokens, block):
    """[L, V] lists of a sequence alone, each of its own token."""
    at = torch.arange(len(tokens))
    seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool)
    if block is not None:
        seen = (at // block)[None, :] <= (at // block)[:, None]
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)
    with torch.no_grad():
        logits = model(
            torch.tensor([tokens]), attention_mask=added[None, None], is_causal=False
        ).logits[0]
    if getattr(model.config, "right_shift_logits", False):
        logits = torch.cat((logits[:1], logits[:-1]))
    return logits


def softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def filtered(logits, temperature, top_k, top_p):
    logits = [x / temperature for x in logits]
    if top_k is not None:
        least = sorted(logits, reverse=True)[top_k - 1]
        logits = [x if x >= least else -math.inf for x in logits]
    if top_p is not None:
        probability, kept, total = softmax(logits), set(), 0.0
        for token in sorted(range(len(logits)), key=lambda i: -logits[i]):
            if total <= top_p:
                kept.add(token)
            total += probability[token]
        logits = [x if i in kept else -math.inf for i, x in enumerate(logits)]
    return logits


def noise(generator, *shape):
    draws = torch.rand(*shape, dtype=torch.float64, generator=generator)
    return (-(-draws.log()).log()).tolist()


def slow(model, tokens, blocks, seed=0, ends=(), **options):
    """Fill the positions of each block, one block after the other."""
    c = SamplerConfig(**options)
    generator = torch.Generator().manual_seed(seed)
    tokens, given = list(tokens), [token != MASK for token in tokens]
    written = [at for block, _ in blocks for at in block]
    for block, steps in blocks:
        masked_at_first = len(block)
        steps = steps or masked_at_first
        epsilon = c.time_epsilon or 1e-3
        times = [1 + (epsilon - 1) * i / steps for i in range(steps + 1)]
        step = post_steps = 0
        while True:
            masked = [at for at in block if tokens[at] == MASK]
            if not masked:
                post_steps += 1
                if c.edit_threshold is None or post_steps > (c.max_post_steps or 16):
                    break
            looked_at, reveal = list(masked), None
            due = masked_at_first // steps + (step < masked_at_first % steps)
            if c.min_reveal:
                due = c.min_reveal
            if c.reveal == "time_grid" and masked:
                chance = 1 - times[step + 1] / times[step] if step < steps - 1 else 1
                due = math.floor(len(masked) * chance)
                if due == 0:
                    step += 1
                    continue
            if c.remasking == "random":
                draws = torch.rand(len(masked), dtype=torch.float64, generator=generator).tolist()
                least = sorted(draws)[:due]
                looked_at = reveal = [a for a, d in zip(masked, draws, strict=True) if d in least]
            if c.remasking == "origin":
                draws = torch.rand(len(masked), dtype=torch.float64, generator=generator).tolist()
                t, s = times[step], times[step + 1]
                chance = 1 - s / t if step < steps - 1 else 1
                looked_at = [a for a, d in zip(masked, draws, strict=True) if d < chance]
                reveal = looked_at
            if c.edit_threshold is not None:
                looked_at = list(block)
            step += 1
            if not looked_at:
                continue

            logits = all_logits(model, tokens, None)
            if c.cfg_scale:
                hidden = [MASK if known else t for t, known in zip(tokens, given, strict=True)]
                base = all_logits(model, hidden, None)
                logits = base + (c.cfg_scale + 1) * (logits - base)
            logits = logits.tolist()
            gumbels = noise(generator, len(looked_at), VOCABULARY) if c.temperature else None
            token, confidence = {}, {}
            for i, at in enumerate(looked_at):
                own = list(logits[at])
                for never in [MASK, *(c.suppress_tokens or [])]:
                    own[never] = -math.inf
                scores = own
                if c.temperature:
                    own_drawn = filtered(own, c.temperature, c.top_k, c.top_p)
                    scores = [x + g for x, g in zip(own_drawn, gumbels[i], strict=True)]
                    own = own_drawn if c.tempered_confidence else own
                token[at] = max(range(VOCABULARY), key=scores.__getitem__)
                p = softmax(own)
                for late in c.begin_suppress_tokens or []:
                    p[late] = 0
                confidence[at] = {
                    "entropy": sum(x * math.log(x) for x in p if x > 0),
                    "margin": sorted(p)[-1] - sorted(p)[-2],
                }.get(c.remasking, p[token[at]])
            if reveal is None and masked:
                order = {at: confidence[at] for at in masked}
                if c.remasking_temperature:
                    extra = noise(generator, len(masked))
                    for at, own in zip(masked, extra, strict=True):
                        order[at] = confidence[at] / c.remasking_temperature + own
                best = sorted(masked, key=lambda at: -order[at])[: max(due, 1)]
                if c.threshold is not None:
                    best += [a for a in masked if confidence[a] > c.threshold and a not in best]
                reveal = best
            edits = []
            if c.edit_threshold is not None:
                edits = [
                    at
                    for at in block
                    if at not in masked
                    and confidence[at] > c.edit_threshold
                    and token[at] != tokens[at]
                ]
            for at in [*(reveal or []), *edits]:
                tokens[at] = token[at]
            if c.edit_threshold is not None and not masked and not edits:
                break
            if c.edit_threshold is None and ended(tokens, written, ends):
                return tokens
        if ended(tokens, written, ends):
            return tokens
    return tokens


def ended(tokens, written, ends):
    """Whether an end token stands before every mask; then the masks behind become that token."""
    shown = [tokens[at] for at in written]
    first = next((i for i, token in enumerate(shown) if token in ends), None)
    if first is None or MASK in shown[:first]:
        return False
    for at in written:
        tokens[at] = shown[first] if tokens[at] == MASK else tokens[at]
    return True


def response_blocks(start, new, length, steps):
    """(positions, steps) of each block of a response."""
    return [
        (list(range(first, min(first + length, start + new))), steps)
        for first in range(start, start + new, length)
    ]


def published_llada2(
    model,
    prompt,
    new,
    block,
    *,
    steps=None,
    threshold=None,
    least=1,
    edit_threshold=None,
    post_steps=16,
    end=None,
):
    """One sequence as LLaDA2.x's own `generate` writes it, greedily; its response and forwards.

    With `steps` the least number of a step is that of LLaDA2.0's schedule, else LLaDA2.1's.
    """
    count = -(-(len(prompt) + new) // block)
    x = torch.tensor([*prompt, *[MASK] * (count * block - len(prompt))])
    forwards = 0
    for number in range(len(prompt) // block, count):
        window = torch.arange(number * block, (number + 1) * block)
        step = after = 0
        while True:
            old = x[window].clone()
            active = old == MASK
            if not active.any():
                if edit_threshold is None:
                    break
                after += 1
                if after > post_steps:
                    break
            forwards += 1
            logits = all_logits(model, x[: (number + 1) * block].tolist(), block)[window].clone()
            logits[:, MASK] = -torch.inf
            best, token = logits.softmax(-1).max(-1)
            take = torch.zeros(block, dtype=torch.bool)
            if active.any():
                due = least if steps is None else block // steps + (step < block % steps)
                sure = active & (best > threshold) if threshold is not None else take
                if sure.sum() >= due:
                    take = sure
                else:
                    most = min(due, int(active.sum()))
                    take[best.masked_fill(~active, -1).topk(most).indices] = True
            edit = torch.zeros_like(take)
            if edit_threshold is not None:
                edit = ~active & (window >= len(prompt)) & (best > edit_threshold) & (token != old)
            x[window] = torch.where(take | edit, token, old)
            step += 1
            written = x[len(prompt) :].tolist()
            stopped = edit_threshold is None and end in written
            if stopped and MASK not in written[: written.index(end)]:
                return written[:new][: written.index(end)], forwards
            if not active.any() and not edit.any():
                break
        written = x[len(prompt) : (number + 1) * block].tolist()
        if end in written:
            return written[:new][: written.index(end)], forwards
    return x[len(prompt) : len(prompt) + new].tolist(), forwards


def published_dream(model, prompt, new, steps, alg, epsilon):
    """A response as Dream's own `diffusion_generate` writes it, greedily, and the tokens left."""
    x = torch.tensor([*prompt, *[MASK] * new])
    times = torch.linspace(1, epsilon, steps + 1)
    left = []
    for i in range(steps):
        masked = x == MASK
        logits = all_logits(model, x.tolist(), None).clone()
        logits[:, MASK] = -torch.inf
        p = logits.softmax(-1)
        best, token = p.max(-1)
        if alg == "entropy":
            best = (p * torch.log(p + 1e-10)).sum(-1)
        if alg == "topk_margin":
            best = p.topk(2).values[:, 0] - p.topk(2).values[:, 1]
        number = int(masked.sum())
        take = number if i == steps - 1 else int(number * (1 - times[i + 1] / times[i]))
        if take:
            chosen = best.masked_fill(~masked, -torch.inf).topk(take).indices
            x[chosen] = token[chosen]
            left.append(number - take)
    return x[len(prompt) :].tolist(), left


CASES = {
    "low confidence": {},
    "few steps": {"steps": 5},
    "entropy": {"remasking": "entropy", "steps": 6},
    "margin": {"remasking": "margin", "steps": 6},
    "random": {"remasking": "random", "steps": 5},
    "origin": {"remasking": "origin", "steps": 7, "temperature": 0.7},
    "origin, more steps than tokens": {"remasking": "origin", "steps": 30},
    "blocks": {"block_length": 4, "steps": 6},
    "blocks, the last one short": {"block_length": 5, "steps": 9},
    "temperature": {"temperature": 1.3},
    "top k and top p": {"temperature": 0.8, "top_k": 9, "top_p": 0.6},
    "tempered": {"temperature": 1.5, "top_p": 0.7, "tempered_confidence": True},
    "tempered entropy": {"temperature": 0.5, "remasking": "entropy", "tempered_confidence": True},
    "remasking temperature": {"remasking_temperature": 0.2, "steps": 4, "temperature": 0.3},
    "guidance": {"cfg_scale": 1.5, "steps": 4},
    "suppressed": {"suppress_tokens": list(range(30))},
    "revealed last, of a nucleus": {
        "begin_suppress_tokens": list(range(30)),
        "temperature": 0.9,
        "top_p": 0.2,
        "tempered_confidence": True,
    },
    "time grid": {"reveal": "time_grid", "steps": 5},
    "time grid, more steps than tokens": {
        "reveal": "time_grid",
        "steps": 20,
        "temperature": 0.9,
        "top_p": 1.0,
        "remasking": "entropy",
    },
    "time grid, random": {
        "reveal": "time_grid",
        "steps": 4,
        "remasking": "random",
        "time_epsilon": 0.2,
    },
    "steps of a block": {"block_length": 5, "steps_per_block": 2},
    "at least three": {"min_reveal": 3, "block_length": 8, "threshold": 0.3},
    "revealed last": {"begin_suppress_tokens": list(range(30)), "steps": 6},
    "threshold": {"threshold": 0.3, "steps": 6},
    "threshold in blocks": {"threshold": 0.2, "block_length": 6, "steps": 4},
    "edits": {"threshold": 0.15, "edit_threshold": 0.2, "block_length": 6, "steps": 4},
    "edits with temperature": {
        "threshold": 0.2,
        "edit_threshold": 0.1,
        "max_post_steps": 3,
        "temperature": 0.5,
    },
    "edits whatever the confidence": {"threshold": 0.2, "edit_threshold": 0.0},
}


def expected_rows(model, prompts, options, *, ends=()):
    length = options.get("block_length") or NEW
    seeds = row_seeds(options.get("seed", 0), len(prompts))
    steps = options.get("steps")
    if steps:
        steps //= math.ceil(NEW / length)
    steps = options.get("steps_per_block", steps)
    return [
        slow(
            model,
            [*prompt, *[MASK] * NEW],
            response_blocks(len(prompt), NEW, length, steps),
            seed=seed,
            ends=ends,
            **options,
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


def rows_of(out):
    return [row[:n].tolist() for row, n in zip(out.canvas, out.lengths, strict=True)]


@pytest.mark.parametrize("case", CASES)
def test_a_ragged_batch_is_what_the_slow_sampler_writes_one_by_one(llama, case):
    config = SamplerConfig(max_new_tokens=NEW, **CASES[case])
    out = sampler_of(llama).generate(PROMPTS, config)
    expected = expected_rows(llama, PROMPTS, CASES[case])
    assert rows_of(out) == expected
    assert out.responses == [
        row[len(prompt) :] for row, prompt in zip(expected, PROMPTS, strict=True)
    ]


@pytest.mark.parametrize("family", ["llada", "llada_moe", "dream"])
@pytest.mark.parametrize("case", ["blocks", "guidance", "temperature"])
def test_other_families_write_what_the_slow_sampler_writes(family, case):
    """Dream's logits are those of the next token."""
    model = model_of(family)
    out = sampler_of(model).generate(PROMPTS, SamplerConfig(max_new_tokens=NEW, **CASES[case]))
    assert rows_of(out) == expected_rows(model, PROMPTS, CASES[case])


LLADA2 = {
    "default": ({}, {}),
    "steps": ({"steps_per_block": 3}, {"steps": 3}),
    "threshold": ({"threshold": 0.15, "steps_per_block": 6}, {"threshold": 0.15, "steps": 6}),
    "least": ({"threshold": 0.4, "min_reveal": 3}, {"threshold": 0.4, "least": 3}),
    "edits": (
        {"threshold": 0.15, "edit_threshold": 0.2},
        {"threshold": 0.15, "edit_threshold": 0.2},
    ),
    "edits, speed": (
        {"threshold": 0.1, "edit_threshold": 0.0, "min_reveal": 2, "max_post_steps": 3},
        {"threshold": 0.1, "edit_threshold": 0.0, "least": 2, "post_steps": 3},
    ),
}


@pytest.mark.parametrize("case", LLADA2)
@pytest.mark.parametrize("family", ["llada2", "llama"])
@pytest.mark.parametrize("ended", [False, True])
def test_block_diffusion_writes_what_llada2_writes(family, case, ended):
    """Blocks counted from the first token, the last one of full length and then cut."""
    ours, published = LLADA2[case]
    model, block, end = model_of(family), 8, None
    # It gives the model experts that work in float64.
    sampler = Sampler(model, mask_token_id=MASK, pad_token_id=PAD, block_size=block)
    if ended:
        end = published_llada2(model, PROMPTS[0], NEW, block, **published)[0][4]
        sampler.end_token_ids = (end,)
    expected = [
        published_llada2(model, prompt, NEW, block, end=end, **published) for prompt in PROMPTS
    ]
    canvases = []
    out = sampler.generate(
        PROMPTS,
        SamplerConfig(max_new_tokens=NEW, **ours),
        on_step=lambda _, canvas: canvases.append(canvas.shape),
    )
    assert out.responses == [response for response, _ in expected]
    assert out.steps == max(forwards for _, forwards in expected)
    assert out.lengths == [len(prompt) + NEW for prompt in PROMPTS]
    assert {*canvases, out.canvas.shape} == {(3, 20)}


def test_the_bar_counts_the_tokens_that_are_asked_for(llama, capsys):
    sampler = Sampler(llama, mask_token_id=MASK, pad_token_id=PAD, block_size=8)
    sampler.generate(PROMPTS, SamplerConfig(max_new_tokens=NEW), progress=True)
    assert "36/36" in capsys.readouterr().err


def test_only_a_block_size_makes_a_model_attend_block_by_block():
    model = model_of("llada2")
    sampler = sampler_of(model)
    whole = sampler.generate(PROMPTS, SamplerConfig(max_new_tokens=NEW))
    assert rows_of(whole) == expected_rows(model, PROMPTS, {})


def test_block_diffusion_needs_positions_for_its_last_block_and_steps_for_each(llama):
    sampler = Sampler(llama, mask_token_id=MASK, pad_token_id=PAD, block_size=24)
    with pytest.raises(ValueError, match=r"model's 64 positions, got 40 . 20 .* 24 ends at 72"):
        sampler.generate([[3] * 40], SamplerConfig(max_new_tokens=20))
    for write, rows in ((sampler.generate, [[3]]), (sampler.infill, [[MASK]])):
        with pytest.raises(ValueError, match=r"steps must not be given .* steps_per_block"):
            write(rows, SamplerConfig(max_new_tokens=24, steps=24))
    short = Sampler(llama, mask_token_id=MASK, pad_token_id=PAD, block_size=24, max_length=20)
    assert short.generate([[3] * 10], SamplerConfig(max_new_tokens=10)).lengths == [20]


@pytest.mark.parametrize("alg", ["maskgit_plus", "entropy", "topk_margin"])
@pytest.mark.parametrize(("steps", "epsilon"), [(12, 1e-3), (6, 1e-3), (5, 0.3), (30, 1e-3)])
def test_dream_s_algorithms_write_what_dream_writes(alg, steps, epsilon):
    model, seen = model_of("dream"), []
    config = sampler_config({"alg": alg, "max_new_tokens": NEW, "steps": steps, "eps": epsilon})
    out = sampler_of(model).generate(
        PROMPTS[:1], config, on_step=lambda _, canvas: seen.append(int((canvas == MASK).sum()))
    )
    response, left = published_dream(model, PROMPTS[0], NEW, steps, alg, epsilon)
    assert out.responses == [response]
    assert seen == left


def test_a_suppressed_token_is_revealed_last_though_its_nucleus_is_itself():
    """No other token of its position has a probability: the confidence is 0, not undefined."""
    config = SamplerConfig(
        temperature=1.0, top_p=0.9, tempered_confidence=True, begin_suppress_tokens=[3]
    )
    logits = torch.zeros(3, 10)
    logits[0, 3], logits[1, 5], logits[2, 4] = 20, 9, 9
    guessed = guess(logits, config, torch.Generator().manual_seed(0))
    assert guessed.tokens.tolist() == [3, 5, 4]
    assert guessed.confidence[0] == 0
    assert (guessed.confidence[1:] > 0.9).all()


def test_edits_change_tokens_and_stop_after_the_post_steps(llama):
    """Else the comparison with the slow sampler would say nothing about them."""
    canvases = []
    config = SamplerConfig(max_new_tokens=NEW, **CASES["edits with temperature"])
    sampler_of(llama).generate(PROMPTS[:1], config, on_step=lambda _, x: canvases.append(x[0]))
    changed = [
        bool(((old != MASK) & (old != new)).any()) for old, new in itertools.pairwise(canvases)
    ]
    filled = [not bool((canvas == MASK).any()) for canvas in canvases]
    assert any(changed)
    assert len(canvases) - 1 - filled.index(True) <= 3


def test_a_row_does_not_depend_on_its_batch(llama):
    config = SamplerConfig(max_new_tokens=NEW, temperature=1.0, seed=3)
    together = sampler_of(llama).generate(PROMPTS, config)
    for prompt, seed, response in zip(
        PROMPTS, row_seeds(3, len(PROMPTS)), together.responses, strict=True
    ):
        assert sampler_of(llama).generate([prompt], config, seeds=[seed]).responses == [response]


def test_a_seed_repeats_and_another_differs(llama):
    def write(**options):
        config = SamplerConfig(max_new_tokens=NEW, temperature=1.0, **options)
        return sampler_of(llama).generate([PROMPTS[0]] * 2, config).responses

    assert write() == write()
    assert write() != write(seed=1)
    first, second = write()
    assert first != second


def test_drawn_tokens_have_the_model_s_distribution(llama):
    """One token is written 600 times: the share of each is its probability, filtered."""
    prompt, draws = [4, 8, 15], 600
    config = SamplerConfig(max_new_tokens=1, temperature=2.0, top_k=5)
    out = sampler_of(llama).generate([prompt] * draws, config)
    own = all_logits(llama, [*prompt, MASK], None)[-1].tolist()
    own[MASK] = -math.inf
    expected = torch.tensor(softmax(filtered(own, 2.0, 5, None)))
    share = torch.bincount(out.canvas[:, -1], minlength=VOCABULARY) / draws
    assert (share[expected == 0] == 0).all()
    # Four standard deviations of a share of 600 draws.
    assert (share - expected).abs().max() < 4 * 0.5 / draws**0.5


def test_suppressed_tokens_and_the_mask_are_never_written(llama):
    never = list(range(40))
    config = SamplerConfig(max_new_tokens=NEW, temperature=5.0, suppress_tokens=never)
    written = {
        token for own in sampler_of(llama).generate(PROMPTS, config).responses for token in own
    }
    assert written
    assert not written & {*never, MASK}


def end_case(model):
    """An end token that greedy writing reveals early, in the midst of the response."""
    config = SamplerConfig(max_new_tokens=NEW, block_length=3)
    whole = sampler_of(model).generate(PROMPTS, config)
    return config, whole, whole.responses[0][4]


def test_a_response_is_cut_at_its_end_and_its_row_stops(llama):
    config, whole, end = end_case(llama)
    sampler = sampler_of(llama, (end,))
    stopped = sampler.generate(PROMPTS[:1], config)
    response = whole.responses[0]
    assert stopped.responses == [response[: response.index(end)]]
    assert stopped.steps < NEW
    assert not (stopped.canvas == MASK).any()
    expected = expected_rows(llama, PROMPTS, {"block_length": 3}, ends=(end,))
    assert rows_of(sampler.generate(PROMPTS, config)) == expected


def test_without_the_early_stop_the_response_is_the_same(llama):
    config, whole, end = end_case(llama)
    every_step = SamplerConfig(max_new_tokens=NEW, block_length=3, stop_at_end=False)
    out = sampler_of(llama, (end,)).generate(PROMPTS, every_step)
    assert out.steps == NEW
    assert torch.equal(out.canvas, whole.canvas)
    assert out.responses == sampler_of(llama, (end,)).generate(PROMPTS, config).responses


CANVASES = [[MASK, 5, MASK, MASK, 9, 12, MASK, 3, MASK], [7, MASK, MASK, 8, 2]]


@pytest.mark.parametrize("family", ["llama", "dream"])
@pytest.mark.parametrize(
    "options", [{}, {"block_length": 4, "steps": 4}, {"cfg_scale": 0.5, "temperature": 1.0}]
)
def test_infill_writes_what_the_slow_sampler_writes_and_only_masks(family, options):
    model = model_of(family)
    out = sampler_of(model).infill(CANVASES, SamplerConfig(**options))
    seeds = row_seeds(0, 2)
    for canvas, seed, filled in zip(CANVASES, seeds, out.responses, strict=True):
        length = options.get("block_length") or len(canvas)
        masked = [at for at, token in enumerate(canvas) if token == MASK]
        numbers = sorted({at // length for at in masked})
        steps = options.get("steps")
        blocks = [
            ([at for at in masked if at // length == n], steps and math.ceil(steps / len(numbers)))
            for n in numbers
        ]
        assert filled == slow(model, canvas, blocks, seed=seed, **options)
        assert MASK not in filled
        kept = zip(canvas, filled, strict=True)
        assert all(old in (new, MASK) for old, new in kept)


def test_only_wanted_tokens_get_logits(llama, monkeypatch):
    """Blocks of three: never more than three positions of a row."""
    widths = []
    forward = torch.nn.functional.linear
    rows = Backbone(llama).head()[0].shape[0]

    def counted(x, weight, bias=None):
        if weight.shape[0] == rows:
            widths.append(x[..., 0].numel())
        return forward(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    sampler_of(llama).generate(PROMPTS, SamplerConfig(max_new_tokens=6, block_length=3))
    assert widths == [9, 6, 3, 9, 6, 3]


def test_steps_are_told_and_the_bar_counts_tokens(llama, capsys):
    seen = []
    config = SamplerConfig(max_new_tokens=NEW, steps=4)
    out = sampler_of(llama).generate(
        PROMPTS, config, progress=True, on_step=lambda step, canvas: seen.append((step, canvas))
    )
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    masked = [int((canvas == MASK).sum()) for _, canvas in seen]
    assert masked == [27, 18, 9, 0]
    assert torch.equal(seen[-1][1], out.canvas)
    assert out.steps == 4
    assert "36/36" in capsys.readouterr().err
    sampler_of(llama).generate(PROMPTS[:1], config)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_every_row_reads_the_memory_of_its_prompt(cfg_scale):
    """Also when other rows are done, and in the forward without the prompt."""
    model = make_model().eval()
    memory = MemoryConfig(scope="sample", inner_lr=3.0, rank=4, layer_fraction=0.5)
    objective = MemDLMObjective(model, DiffusionConfig(), memory)
    collator = MaskCollator(MASK, PAD, VOCABULARY, DiffusionConfig(), memory)

    def write(prompts, ends=()):
        features = [{"input_ids": p, "labels": p, "example": 0, "epoch": 0} for p in prompts]
        objective.write_memory(collator(features))
        config = SamplerConfig(max_new_tokens=6, cfg_scale=cfg_scale, block_length=3)
        with objective.fast_weights.reading():
            return sampler_of(model, ends).generate(prompts, config).responses

    plain = sampler_of(model).generate(
        PROMPTS, SamplerConfig(max_new_tokens=6, cfg_scale=cfg_scale, block_length=3)
    )
    alone = [write([prompt])[0] for prompt in PROMPTS]
    assert write(PROMPTS) == alone
    assert alone != plain.responses
    end = alone[0][0]
    cut = [own[: own.index(end)] if end in own else own for own in alone]
    assert write(PROMPTS, (end,)) == cut


def test_schedules():
    assert time_grid_split(12, 6, 1e-3) == [1, 2, 2, 2, 2, 3]
    assert time_grid_split(2, 5, 1e-3) == [2]
    assert time_grid_split(7, 1, 1e-3) == [7]
    assert even_split(12, 5) == [3, 3, 2, 2, 2]
    assert even_split(3, 5) == [1, 1, 1]
    assert even_split(0, 5) == []
    chances = reveal_probabilities(4, 1e-3)
    assert chances[-1] == 1
    left = 1.0
    for chance in chances[:3]:
        left *= 1 - chance
    assert left == pytest.approx(1 - 0.999 * 3 / 4)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts must hold at least one list of token ids, got none"),
        ([[3], []], {}, "prompts must not be empty, got no token in number 1"),
        (
            [[3], [4, MASK]],
            {"max_new_tokens": 4},
            f"must not hold the mask token, got {MASK} in prompt 1",
        ),
        ([[3, VOCABULARY]], {}, rf"token ids in \[0, {VOCABULARY}\), got {VOCABULARY}"),
        ([[3] * 60], {"max_new_tokens": 5}, "at most 64 tokens together, got 60 . 5 for prompt 0"),
        ([[3]], {"block_length": 4, "max_new_tokens": 12, "steps": 2}, "number of blocks, 3"),
        ([[3]], {"block_length": 4, "max_new_tokens": 12, "steps": 4}, "number of blocks, 3"),
        ([[3]], {"suppress_tokens": [99], "max_new_tokens": 4}, "suppress_tokens must be in"),
        (
            [[3]],
            {"suppress_tokens": list(range(VOCABULARY)), "max_new_tokens": 4},
            "suppress_tokens must leave a token to write",
        ),
        ([5, 6], {}, "prompts must be lists of token ids, got 5 in number 0"),
        (["abc"], {}, "prompts must be lists of token ids, got 'abc' in number 0"),
        ("abc", {}, "prompts must be lists of token ids, got 'abc'"),
        ([[1], [1.5, 2]], {}, "prompts must hold whole numbers, got 1.5 in number 1"),
        ([[True, 2]], {}, "prompts must hold whole numbers, got True in number 0"),
    ],
)
def test_bad_input_is_told_before_any_work(llama, monkeypatch, prompts, options, message):
    sampler = sampler_of(llama)
    monkeypatch.setattr("memdlm.sampler.denoise.token_logits", None)
    with pytest.raises(ValueError, match=message):
        sampler.generate(prompts, SamplerConfig(**options))


def test_bad_canvases_and_seeds_are_told(llama):
    sampler = sampler_of(llama)
    with pytest.raises(ValueError, match="must hold mask tokens, got none in canvas 1"):
        sampler.infill([[MASK], [3, 4]])
    with pytest.raises(ValueError, match="at most 64 tokens, got 65 for canvas 0"):
        sampler.infill([[MASK] * 65])
    with pytest.raises(ValueError, match="seeds must be one for each of 2 prompts, got 1"):
        sampler.generate([[3], [4]], SamplerConfig(max_new_tokens=2), seeds=[1])
    for seed in (-1, 2**63, 1.5):
        with pytest.raises(ValueError, match="seeds must be whole numbers in"):
            sampler.generate([[3]], SamplerConfig(max_new_tokens=2), seeds=[seed])


def test_tensors_are_prompts_too(llama):
    config = SamplerConfig(max_new_tokens=3)
    expected = sampler_of(llama).generate([[3, 4], [5, 6]], config)
    for prompts in (torch.tensor([[3, 4], [5, 6]]), [torch.tensor([3, 4]), (5, 6)]):
        out = sampler_of(llama).generate(prompts, config)
        assert out.responses == expected.responses
    (filled,) = sampler_of(llama).infill(torch.tensor([[5, MASK, 6]])).responses
    assert all(type(token) is int for token in filled)


def test_a_model_in_training_mode_is_refused():
    sampler = sampler_of(make_model().train())
    for write, rows in ((sampler.generate, [[3]]), (sampler.infill, [[MASK]])):
        with pytest.raises(ValueError, match="model must be in evaluation mode"):
            write(rows, SamplerConfig(max_new_tokens=2))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"block_size": 0}, "block_size must be at least 1, or None, got 0"),
        ("dream", {"block_size": 4}, "block_size must be None for a model with right-shifted"),
        (
            "llama",
            {"mask_token_id": 999},
            rf"mask_token_id must be in \[0, {VOCABULARY}\), got 999",
        ),
        ("llama", {"pad_token_id": -1}, "pad_token_id must be in"),
    ],
)
def test_a_sampler_that_could_not_write_is_refused(family, options, message):
    known = {"mask_token_id": MASK, "pad_token_id": PAD}
    with pytest.raises(ValueError, match=message):
        Sampler(model_of(family), **(known | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remasking": "highest"}, "remasking must be one of 'low_confidence', .* got 'highest'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1, got 0"),
        ({"max_new_tokens": None}, "max_new_tokens must be .* got None"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"temperature": -1}, "temperature must be a number, at least 0, got -1"),
        ({"remasking": ["random"]}, "remasking must be one of"),
        ({"reveal": "all"}, "reveal must be one of 'even', 'time_grid', got 'all'"),
        ({"temperature": 1, "top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"threshold": 0.5, "edit_threshold": 1.0}, r"edit_threshold must be in \[0, 1\), got 1.0"),
        ({"min_reveal": 0}, "min_reveal must be a whole number, at least 1, got 0"),
        ({"min_reveal": 2, "steps": 4}, "steps and min_reveal must not both be given"),
        ({"remasking": "origin", "min_reveal": 2}, "min_reveal would not be read"),
        ({"remasking": "origin", "reveal": "time_grid"}, "reveal would not be read"),
        ({"reveal": "time_grid", "min_reveal": 2}, "min_reveal would not be read"),
        ({"reveal": "time_grid", "threshold": 0.5}, "reveal would not be read: threshold"),
        ({"suppress_tokens": 3}, "suppress_tokens must be a list of token ids"),
        ({"suppress_tokens": []}, "suppress_tokens must be a list of token ids, not empty"),
        ({"top_p": 0.9}, "top_p would not be read: temperature is 0"),
        ({"top_k": 5}, "top_k would not be read: temperature is 0"),
        ({"tempered_confidence": True}, "tempered_confidence would not be read: temperature is 0"),
        (
            {"remasking": "random", "remasking_temperature": 0.1},
            "remasking_temperature would not be read: remasking 'random' has no confidence",
        ),
        (
            {"threshold": 0.9, "remasking_temperature": 0.1},
            "remasking_temperature would not be read: threshold",
        ),
        ({"remasking": "entropy", "threshold": 0.9}, "threshold would not be read"),
        ({"remasking": "random", "begin_suppress_tokens": [1]}, "begin_suppress_tokens would not"),
        ({"edit_threshold": 0.9}, "edit_threshold would not be read: threshold is not given"),
        ({"threshold": 0.9, "max_post_steps": 3}, "max_post_steps would not be read"),
        ({"time_epsilon": 0.1}, "time_epsilon would not be read: remasking is not 'origin'"),
    ],
)
def test_options_out_of_range_or_unread_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**options)


def test_names_of_other_samplers():
    llada = sampler_config({"gen_length": 64, "block_length": 32, "steps": 64, "cfg_scale": 0.5})
    assert llada == SamplerConfig(max_new_tokens=64, block_length=32, steps=64, cfg_scale=0.5)
    dream = sampler_config(
        {"alg": "topk_margin", "alg_temp": 0.2, "temperature": 0.4, "top_p": 0.95}
    )
    assert dream == SamplerConfig(
        remasking="margin",
        remasking_temperature=0.2,
        temperature=0.4,
        top_p=0.95,
        tempered_confidence=True,
        reveal="time_grid",
    )
    assert sampler_config({"alg": "maskgit_plus"}) == SamplerConfig(reveal="time_grid")
    assert sampler_config({"alg": "maskgit_plus", "threshold": 0.9}) == SamplerConfig(threshold=0.9)
    assert sampler_config({"alg": "entropy", "reveal": "even"}).reveal == "even"
    assert sampler_config({"remasking": "topk_margin"}) == SamplerConfig(remasking="margin")
    origin = sampler_config({"alg": "origin", "eps": 0.01, "temperature": 0.4})
    assert origin == SamplerConfig(remasking="origin", time_epsilon=0.01, temperature=0.4)
    llada2 = {"gen_length": 100, "block_size": 32, "threshold": 0.7, "editing_threshold": 0.5}
    assert sampler_config(llada2 | {"eos_early_stop": False, "steps_per_block": 8}) == (
        SamplerConfig(
            max_new_tokens=100,
            block_length=32,
            threshold=0.7,
            edit_threshold=0.5,
            stop_at_end=False,
            steps_per_block=8,
        )
    )
    assert sampler_config(llada2 | {"num_to_transfer": 3}).min_reveal == 3
    assert sampler_config({"num_inference_steps": 8}) == SamplerConfig(steps_per_block=8)


def test_calls_as_published():
    llada = {"steps": 128, "gen_length": 128, "block_length": 32, "temperature": 0.0}
    config = sampler_config(llada | {"cfg_scale": 0.0, "remasking": "low_confidence"})
    assert config == SamplerConfig(max_new_tokens=128, steps=128, block_length=32)
    assert config.steps_of_block(32) == 32
    dream = {"max_new_tokens": 256, "steps": 256, "temperature": 0.2, "top_p": 0.95}
    assert sampler_config(dream | {"alg": "entropy", "alg_temp": 0.0}) == SamplerConfig(
        max_new_tokens=256,
        steps=256,
        temperature=0.2,
        top_p=0.95,
        remasking="entropy",
        reveal="time_grid",
        tempered_confidence=True,
    )
    speed = {"gen_length": 512, "block_length": 32, "threshold": 0.5, "editing_threshold": 0.0}
    assert sampler_config(speed) == SamplerConfig(
        max_new_tokens=512, block_length=32, threshold=0.5, edit_threshold=0.0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_length": 4, "max_new_tokens": 4}, "gen_length and max_new_tokens must not both"),
        ({"alg": "entropy", "remasking": "entropy"}, "alg and remasking must not both"),
        ({"steps": 4, "steps_per_block": 2, "block_length": 4}, "steps and steps_per_block must"),
        ({"mask_id": 3}, "unknown option 'mask_id'"),
        ({"steps_per_block": 2, "num_inference_steps": 2}, "and num_inference_steps must not"),
        ({"steps": 2, "num_to_transfer": 2}, "steps and min_reveal must not both be given"),
        ({"num_to_transfer": 0, "block_length": 4}, "min_reveal must be a whole number"),
        ({"alg": ["entropy"]}, "remasking must be one of"),
        ({"alg": "other"}, "remasking must be one of"),
        ({"alg": "origin", "alg_temp": 0.2}, "remasking_temperature would not be read"),
    ],
)
def test_names_that_clash_or_do_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampler_config(options)
