"""Static and sequential losses, against a plain loop over examples and tokens."""

import json

import pytest
import torch

from memdlm.bias import BiasOptions, bias_table, run_bias
from memdlm.cli import main
from memdlm.demo.examples import BASE_FOLDER
from memdlm.evaluation import exposure_bias as module
from memdlm.evaluation.exposure_bias import (
    ExposureBias,
    check_canvas,
    exposure_bias,
    trajectory_ratios,
)
from tests.families import make_family_model
from tests.tiny import MASK, PAD, make_features, make_model
from tests.trainer.trainer_case import tiny_model, tiny_tokenizer

STEPS = 4
RATIOS = (1.0, 0.75, 0.5, 0.25)
IDS = {"mask_token_id": MASK, "pad_token_id": PAD}


def examples():
    # Each with a prompt: where all is masked every token is predicted alike, and any may go first.
    return make_features([(12, 4), (9, 2), (5, 4), (11, 3)])


def plain_nll(model, ids, masked, truth, shift):
    """Mean NLL of the truth at the masked positions, and each position's prediction."""
    logits = model(torch.tensor([ids]), is_causal=False, use_cache=False).logits[0].clone()
    logits[:, MASK] = -torch.inf
    log_p = logits.log_softmax(-1)
    rows = {i: max(i - 1, 0) if shift else i for i in masked}
    nll = sum(-log_p[rows[i], truth[i]].item() for i in masked) / len(masked)
    return nll, {i: log_p[rows[i]].max(-1) for i in masked}


@torch.no_grad()
def plain_curves(model, example, static_masks, shift=False):
    """[m, 3]: static, sequential, remaining."""
    truth = list(example["input_ids"])
    response = [i for i, label in enumerate(example["labels"]) if label >= 0]
    masked, tokens, found, guesses = list(response), list(truth), [], None
    for ratio, static in zip(RATIOS, static_masks, strict=True):
        keep = max(1, round(ratio * len(response)))
        if guesses is not None:
            for i in sorted(masked, key=lambda i: -guesses[i].values)[: len(masked) - keep]:
                tokens[i] = guesses[i].indices.item()
                masked.remove(i)
        noisy = [MASK if i in masked else token for i, token in enumerate(tokens)]
        sequential, guesses = plain_nll(model, noisy, masked, truth, shift)
        beside = [MASK if i in masked else token for i, token in enumerate(truth)]
        remaining, _ = plain_nll(model, beside, masked, truth, shift)
        random = [MASK if i in static else token for i, token in enumerate(truth)]
        own, _ = plain_nll(model, random, static, truth, shift)
        found.append((own, sequential, remaining))
    return torch.tensor(found, dtype=torch.float64)


def static_masks(example, number, seed=0):
    response = [i for i, label in enumerate(example["labels"]) if label >= 0]
    draw = torch.from_numpy(module.np.random.default_rng([seed, number]).random(len(response)))
    order = draw.argsort().tolist()
    counts = [max(1, round(ratio * len(response))) for ratio in RATIOS]
    return [[response[place] for place in order[:count]] for count in counts]


@pytest.mark.parametrize("family", ["llama", "llada_moe", "dream"])
def test_the_losses_are_those_of_a_plain_loop(family):
    model = (make_model() if family == "llama" else make_family_model(family)).eval()
    own = exposure_bias(model, examples(), steps=STEPS, batch_size=3, **IDS)
    assert own.ratios == RATIOS
    counts = [[max(1, round(r * n)) / n for r in RATIOS] for n in (8, 7, 1, 8)]
    torch.testing.assert_close(torch.tensor(own.shares), torch.tensor(counts).mean(0))
    for number, example in enumerate(examples()):
        masks = static_masks(example, number)
        plain = plain_curves(model, example, masks, shift=family == "dream")
        for column, part in enumerate((own.static, own.sequential, own.remaining)):
            torch.testing.assert_close(part[number], plain[:, column], rtol=1e-6, atol=1e-9)


def test_a_batch_does_not_change_an_example():
    model = make_model().eval()
    together = exposure_bias(model, examples(), batch_size=4, **IDS)
    alone = exposure_bias(model, examples(), batch_size=1, **IDS)
    for part in ("static", "sequential", "remaining"):
        torch.testing.assert_close(getattr(together, part), getattr(alone, part))


def test_every_loss_is_one_where_all_is_masked():
    own = exposure_bias(make_model().eval(), examples(), steps=2, **IDS)
    assert own.ratios == (1.0, 0.5)
    for part in (own.sequential, own.remaining):
        torch.testing.assert_close(part[:, 0], own.static[:, 0])


def test_the_ratio_and_its_band():
    static = torch.tensor([[1.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    sequential = torch.tensor([[2.0, 4.0], [2.0, 4.0]], dtype=torch.float64)
    ratio, low, high = ExposureBias((1.0, 0.5), (1.0, 0.5), static, sequential, sequential).ratio()
    assert ratio.tolist() == [2.0, 2.0]
    assert (low[0], high[0]) == (2.0, 2.0)
    assert low[1] == pytest.approx(4 / 3)  # the second example twice
    assert high[1] == pytest.approx(4.0)  # the first one twice
    with pytest.raises(ValueError, match="over must be"):
        ExposureBias((1.0,), (1.0,), static, sequential, static).ratio("random")


def test_padding_may_be_the_mask_token():
    model = make_model().eval()
    ragged = make_features([(3, 1), (9, 2)])
    same = exposure_bias(model, ragged, mask_token_id=MASK, pad_token_id=MASK)
    other = exposure_bias(model, ragged, **IDS)
    torch.testing.assert_close(same.ratio()[0], other.ratio()[0])
    assert same.ratio()[0].isfinite().all()


def test_logits_are_made_for_some_rows_at_a_time(monkeypatch):
    model = make_model().eval()
    whole = exposure_bias(model, examples(), **IDS)
    monkeypatch.setattr(module, "_LOGIT_BYTES", 3 * 61 * 8)
    parts = exposure_bias(model, examples(), **IDS)
    torch.testing.assert_close(parts.sequential, whole.sequential)


def test_block_diffusion_has_no_such_trajectory():
    check_canvas(None)
    with pytest.raises(ValueError, match=r"block_size must be None.*got 32"):
        check_canvas(32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"examples": []}, "at least one"),
        ({"examples": [{"input_ids": [1, 2], "labels": [-100, -100]}]}, "none in number 0"),
        ({"steps": 1}, "steps must be at least 2, got 1"),
    ],
)
def test_bad_arguments(given, message):
    own = given.pop("examples", None)
    with pytest.raises(ValueError, match=message):
        exposure_bias(make_model(), examples() if own is None else own, **given, **IDS)


def test_the_command_writes_rows_a_table_and_a_figure(tmp_path, capsys):
    words = ["bias", "--models", str(BASE_FOLDER), "--names", "base", "--count", "2"]
    assert main([*words, "--steps", "2", "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "bias.jsonl").read_text().splitlines()]
    assert [(row["name"], row["mask_ratio"]) for row in rows] == [
        ("base, memory off", 1.0),
        ("base, memory off", 0.5),
    ]
    assert rows[1]["R"][0] == pytest.approx(
        rows[1]["sequential_nll"] / rows[1]["static_nll"], rel=1e-4
    )
    assert (tmp_path / "bias.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "bias.md").read_text().strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "1"], "count must be at least 2"),
        (["--names", "a,b"], "names must be as many as models, 1, got 2"),
        (["--models", "a/x,b/x"], "names must all be different, got x, x"),
        (["--max_length", "16"], "max_length would not be read"),
        (["--memory", "on"], "memory must be off"),
        (["--memory", "maybe"], "memory must be one of"),
    ],
)
def test_bad_options_of_the_command_are_one_line(words, message, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["bias", "--models", str(BASE_FOLDER), *words, *out]) == 2
    assert message in capsys.readouterr().err


def test_a_table_has_a_row_for_each_curve():
    losses = torch.ones(3, 10, dtype=torch.float64)
    ratios = trajectory_ratios(10)
    curve = ExposureBias(ratios, ratios, losses, 2 * losses, losses)
    lines = bias_table({"a": curve, "b": curve}).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| a | 2.000 | 2.000 (2.000 to 2.000)")


def test_a_dataset_file_is_measured(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "A cat.", "response": " It sleeps on a mat."}\n' * 2)
    options = BiasOptions(
        models=str(BASE_FOLDER), dataset=str(data), count=2, steps=2, out=str(tmp_path / "out")
    )
    assert "memory off" in run_bias(options)


def test_the_demos_examples_are_for_its_tokenizer(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = ["bias", "--models", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "dataset must be given" in capsys.readouterr().err
