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
from memdlm.sampler.schedule import even_split, reveal_probabilities
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


def slow(model, tokens, blocks, seed=0, canvas_block=None, ends=(), **options):
    """Fill the positions of each block, one block after the other."""
    c = SamplerConfig(**options)
    generator = torch.Generator().manual_seed(seed)
    tokens, given = list(tokens), [token != MASK for token in tokens]
    written = [at for block, _ in blocks for at in block]
    for block, steps in blocks:
        masked_at_first = len(block)
        steps = steps or masked_at_first
        times = [1 + (1e-3 - 1) * i / steps for i in range(steps + 1)]
        step = post_steps = 0
        while True:
            masked = [at for at in block if tokens[at] == MASK]
            if not masked:
                post_steps += 1
                if c.edit_threshold is None or post_steps > (c.max_post_steps or 16):
                    break
            looked_at, reveal = list(masked), None
            if c.remasking == "random":
                draws = torch.rand(len(masked), dtype=torch.float64, generator=generator).tolist()
                due = masked_at_first // steps + (step < masked_at_first % steps)
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

            logits = all_logits(model, tokens, canvas_block)
            if c.cfg_scale:
                hidden = [MASK if known else t for t, known in zip(tokens, given, strict=True)]
                base = all_logits(model, hidden, canvas_block)
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
                for late in c.begin_suppress_tokens or []:
                    own = [-math.inf if v == late else x for v, x in enumerate(own)]
                p = softmax(own)
                confidence[at] = {
                    "entropy": sum(x * math.log(x) for x in p if x > 0),
                    "margin": sorted(p)[-1] - sorted(p)[-2],
                }.get(c.remasking, p[token[at]])
            if reveal is None and masked:
                due = masked_at_first // steps + (step - 1 < masked_at_first % steps)
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


def response_blocks(start, new, length, steps, aligned=False):
    """(positions, steps) of each block of a response."""
    positions, first = range(start, start + new), 0 if aligned else start
    numbers = sorted({(at - first) // length for at in positions})
    return [([at for at in positions if (at - first) // length == n], steps) for n in numbers]


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
}


def expected_rows(model, prompts, options, *, aligned=None, ends=(), default_length=NEW):
    length = options.get("block_length") or default_length
    seeds = row_seeds(options.get("seed", 0), len(prompts))
    steps = options.get("steps")
    if steps:
        steps //= math.ceil(NEW / length)
    return [
        slow(
            model,
            [*prompt, *[MASK] * NEW],
            response_blocks(len(prompt), NEW, length, steps, aligned is not None),
            seed=seed,
            canvas_block=length if aligned else None,
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


@pytest.mark.parametrize(
    "options", [{}, CASES["threshold in blocks"], CASES["edits"]], ids=["default", "par", "edits"]
)
def test_llada2_attends_block_by_block_from_the_first_token(options):
    model = model_of("llada2")
    out = sampler_of(model).generate(PROMPTS, SamplerConfig(max_new_tokens=NEW, **options))
    assert rows_of(out) == expected_rows(model, PROMPTS, options, aligned=True, default_length=32)


def test_a_model_trained_by_block_diffusion_attends_block_by_block(llama):
    sampler = Sampler(llama, mask_token_id=MASK, pad_token_id=PAD, block_size=4)
    out = sampler.generate(PROMPTS, SamplerConfig(max_new_tokens=NEW))
    expected = expected_rows(llama, PROMPTS, {"block_length": 4}, aligned=True)
    assert rows_of(out) == expected
    whole = sampler_of(llama).generate(PROMPTS, SamplerConfig(max_new_tokens=NEW, block_length=4))
    assert rows_of(whole) != expected


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
            widths.append(len(x))
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remasking": "highest"}, "remasking must be one of 'low_confidence', .* got 'highest'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1, got 0"),
        ({"max_new_tokens": None}, "max_new_tokens must be .* got None"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"temperature": -1}, "temperature must be a number, at least 0, got -1"),
        ({"temperature": 1, "top_p": 1.5}, r"top_p must be in \(0, 1\), got 1.5"),
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
    )
    assert sampler_config({"alg": "maskgit_plus"}) == SamplerConfig()
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
            steps=32,
        )
    )
    assert sampler_config(llada2 | {"num_to_transfer": 3}).steps == 4 * 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_length": 4, "max_new_tokens": 4}, "gen_length and max_new_tokens must not both"),
        ({"alg": "entropy", "remasking": "entropy"}, "alg and remasking must not both"),
        ({"steps": 4, "steps_per_block": 2, "block_length": 4}, "steps and steps_per_block must"),
        ({"mask_id": 3}, "unknown option 'mask_id'"),
        ({"steps_per_block": 2}, "steps_per_block needs block_length"),
        ({"num_to_transfer": 0, "block_length": 4}, "num_to_transfer must be a whole number"),
        ({"alg": "other"}, "remasking must be one of"),
        ({"alg": "origin", "alg_temp": 0.2}, "remasking_temperature would not be read"),
    ],
)
def test_names_that_clash_or_do_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sampler_config(options)
