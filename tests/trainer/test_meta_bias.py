"""The comparison of first-order and exact outer gradients, against plain arithmetic."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from memdlm.cli import main
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.inference import load_checkpoint
from memdlm.meta_bias.groups import trained_groups
from memdlm.meta_bias.likeness import Scatter, cosine, likeness
from memdlm.meta_bias.measure import compare_gradients, outer_gradient
from memdlm.meta_bias.options import CENTRE, MetaBiasOptions, Setting
from memdlm.meta_bias.report import by_setting, meta_bias_report
from memdlm.objective import MemDLMObjective
from tests.families import FAMILIES, make_family_model
from tests.tiny import make_batch, make_features, make_model
from tests.trainer.trainer_case import tiny_examples, tiny_model, tiny_tokenizer
from tests.trainer.twin_case import MEMORY, build

DIFFUSION = DiffusionConfig()
GROUPS = {"one": ["a"], "two": ["b", "c"], "all": ["a", "b", "c"]}


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3,), "b": (2, 4), "c": (5,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def flat(gradient, names):
    return torch.cat([gradient[name].flatten() for name in names]).double()


def batches(memory, count=3):
    return [make_batch(DIFFUSION, memory, make_features(epoch=epoch)) for epoch in range(count)]


def compare(memory, model=None, count=3):
    model = (make_model() if model is None else model).eval()
    setting = Setting(CENTRE, memory)
    return compare_gradients(model, DIFFUSION, setting, batches(memory, count))


def test_likeness_is_that_of_the_concatenated_vectors():
    own, truth = draw(0), draw(1)
    for group, (angle, ratio, difference) in likeness(own, truth, GROUPS).items():
        a, b = flat(own, GROUPS[group]), flat(truth, GROUPS[group])
        assert angle == pytest.approx(torch.cosine_similarity(a, b, dim=0).item())
        assert angle == cosine(own, truth, GROUPS[group])
        assert ratio == pytest.approx((a.norm() / b.norm()).item())
        assert difference == pytest.approx(((a - b).norm() / b.norm()).item())


def test_a_gradient_is_like_itself():
    for angle, ratio, difference in likeness(draw(0), draw(0), GROUPS).values():
        assert (angle, ratio, difference) == (pytest.approx(1), 1, 0)


def test_nothing_is_said_of_what_is_zero():
    zero = {name: value * 0 for name, value in draw(0).items()}
    assert likeness(draw(0), zero, GROUPS)["all"] == [None, None, None]
    assert likeness(zero, draw(0), GROUPS)["all"] == [None, 0, 1]
    scatter = Scatter()
    scatter.add(zero)
    scatter.add(zero)
    assert scatter.noise(GROUPS)["all"] is None


def test_the_noise_is_the_standard_deviation_over_the_norm_of_the_mean():
    scatter, drawn = Scatter(), [draw(seed) for seed in range(5)]
    for gradient in drawn:
        scatter.add(gradient)
    for group, names in GROUPS.items():
        stacked = torch.stack([flat(gradient, names) for gradient in drawn])
        torch.testing.assert_close(flat(scatter.mean(), names), stacked.mean(0))
        deviation = stacked.var(0).sum().sqrt() / stacked.mean(0).norm()
        assert scatter.noise(GROUPS)[group] == pytest.approx(deviation.item())


def model_of(family, outer):
    if family in FAMILIES:
        return make_family_model(family)
    return build(family, outer=outer)


@pytest.mark.parametrize("target", ["ffn", "ffn+attention"])
@pytest.mark.parametrize(
    ("family", "outer"),
    [*((family, "full") for family in FAMILIES), ("qwen3", "full"), ("llama", "full")]
    + [("llama", "lora"), ("llama", "lora and head")],
)
def test_the_groups_part_every_trained_parameter(family, outer, target):
    model = model_of(family, outer)
    memory = MemoryConfig(rank=2, layer_fraction=0.5, target=target)
    groups = trained_groups(model, MemDLMObjective(model, DIFFUSION, memory).backbone)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert groups.pop("all") == trained
    named = [name for names in groups.values() for name in names]
    assert sorted(named) == sorted(trained)
    for name in groups["adapted attention"]:
        assert "self_attn" in name
        assert "norm" not in name
    for name in groups["adapted FFN"]:
        assert ".mlp." in name
    for names in (groups["adapted attention"], groups["adapted FFN"]):
        assert not any(f"layers.{below}." in name for name in names for below in (0, 1))
    below = groups["layers below"]
    assert all("layers.0." in name or "layers.1." in name for name in below)
    assert ("head" in groups) == (outer != "lora")
    assert ("final norm" in groups) == (outer == "full")


def test_a_tied_head_is_one_group_with_the_embedding():
    model = make_model(tied=True)
    groups = trained_groups(model, MemDLMObjective(model, DIFFUSION, MemoryConfig()).backbone)
    assert groups["embedding and head"] == ["model.embed_tokens.weight"]
    assert not {"embedding", "head"} & set(groups)


def test_a_parameter_in_no_group_is_refused():
    model = make_model()
    backbone = MemDLMObjective(model, DIFFUSION, MemoryConfig()).backbone
    model.extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="no trained parameter in no group, got extra"):
        trained_groups(model, backbone)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="must have a trained parameter, got none"):
        trained_groups(model, backbone)


@pytest.mark.parametrize("clip", ["tensor", "global", "none"])
def test_the_rows_are_those_of_plain_arithmetic(clip):
    memory = MemoryConfig(**MEMORY, inner_clip=clip)
    *rows, mean = compare(memory)
    model, found = make_model().eval(), {}
    for kind in ("first_order", "exact", "exact_suffix"):
        own = dataclasses.replace(memory, meta_gradient=kind)
        objective = MemDLMObjective(model, DIFFUSION, own)
        found[kind] = []
        for batch in batches(own):
            model.zero_grad()
            output = objective(batch)
            output.loss.backward()
            gradient = [p.grad.flatten() for p in model.parameters()]
            found[kind].append((output.loss.item(), torch.cat(gradient), output.inner.norm))
        objective.fast_weights.detach()
    for number, row in enumerate(rows):
        loss, truth, norms = found["exact"][number]
        assert row["batch"] == number
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        counted = norms.norm(dim=-1) if clip == "global" else norms
        share = (counted > memory.inner_max_norm).double().mean().item() * (clip != "none")
        assert row["clipped_share"] == pytest.approx(share, rel=1e-5)
        assert row["skipped"] == 0
        for kind in ("first_order", "exact_suffix"):
            own = found[kind][number][1]
            angle, ratio, difference = row[kind]["all"]
            assert angle == pytest.approx(torch.cosine_similarity(own, truth, dim=0).item())
            assert ratio == pytest.approx((own.norm() / truth.norm()).item(), rel=1e-5)
            assert difference == pytest.approx(
                ((own - truth).norm() / truth.norm()).item(), rel=1e-4
            )
        assert ("neighbour" in row) == (number > 0)
        if number:
            angle = torch.cosine_similarity(found["exact"][number - 1][1], truth, dim=0).item()
            assert row["neighbour"]["all"] == pytest.approx(angle, rel=1e-4)
    stacked = {kind: torch.stack([own[1] for own in each]) for kind, each in found.items()}
    truth, own = stacked["exact"].mean(0), stacked["first_order"].mean(0)
    assert mean["batch"] == "mean"
    assert mean["first_order"]["all"][0] == pytest.approx(
        torch.cosine_similarity(own, truth, dim=0).item()
    )
    noise = stacked["exact"].var(0).sum().sqrt() / truth.norm()
    assert mean["noise"]["all"] == pytest.approx(noise.item(), rel=1e-4)


def test_the_bias_is_of_the_order_of_the_inner_learning_rate():
    gaps = []
    for rate in (1e-6, 1e-5):
        *rows, _ = compare(MemoryConfig(**MEMORY | {"inner_lr": rate}))
        for row in rows:
            assert row["first_order"]["all"][0] == pytest.approx(1, abs=1e-6)
        gaps.append(torch.tensor([row["first_order"]["all"][2] for row in rows]))
    assert (gaps[0] > 0).all()
    torch.testing.assert_close(gaps[1] / gaps[0], torch.full((3,), 10.0), rtol=1e-2, atol=0)


def test_one_step_at_the_anchor_has_no_noisier_state_to_leave_out():
    *rows, _ = compare(MemoryConfig(**MEMORY, inner_steps=1))
    for row in rows:
        assert row["exact_suffix"]["all"][2] < 1e-12
        assert row["first_order"]["all"][2] > 1e-4


def test_leaving_out_the_layers_below_changes_nothing_above_them():
    *rows, _ = compare(MemoryConfig(**MEMORY, inner_steps=3))
    for row in rows:
        for group in ("adapted FFN", "final norm", "head"):
            assert row["exact_suffix"][group][2] < 1e-12
            assert row["first_order"][group][2] > 1e-4
        for group in ("embedding", "layers below", "adapted attention"):
            assert row["exact_suffix"][group][2] > 1e-6


def test_afterwards_the_model_is_as_it_was():
    model = make_model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compare(MemoryConfig(**MEMORY), model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_batch_without_a_masked_row_has_no_gradient():
    memory = MemoryConfig(**MEMORY)
    objective = MemDLMObjective(make_model().eval(), DIFFUSION, memory)
    outer = outer_gradient(objective, make_batch(DIFFUSION, memory, make_features(((7, 7),))))
    assert outer.loss == 0
    assert not any(value.any() for value in outer.gradient.values())


def test_the_settings_are_each_once_around_the_models_own():
    options = MetaBiasOptions("x", inner_steps="1, 2", inner_lr="0.1,1", inner_max_norm="1,3,none")
    found = options.settings(
        MemoryConfig(meta_gradient="exact", inner_graph=False, inner_max_norm=3.0, rank=5)
    )
    assert [(s.varied, s.memory.inner_steps, s.memory.inner_lr, s.max_norm) for s in found] == [
        (CENTRE, 2, 0.1, 3.0),
        ("inner_steps", 1, 0.1, 3.0),
        ("inner_lr", 2, 1.0, 3.0),
        ("inner_max_norm", 2, 0.1, 1.0),
        ("inner_max_norm", 2, 0.1, None),
    ]
    assert {s.memory.meta_gradient for s in found} == {"first_order"}
    assert {s.memory.rank for s in found} == {5}
    reused = MemoryConfig(prefix_reuse="prompt_kv", inner_clip="none")
    own, *_, clipped = MetaBiasOptions("x", inner_max_norm="2").settings(reused)
    assert (own.memory.prefix_reuse, own.max_norm) == ("none", None)
    assert (clipped.memory.inner_clip, clipped.max_norm) == ("tensor", 2)


def save_tiny(folder, **options):
    tiny_model(**options).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = (json.dumps(example) + "\n" for example in tiny_examples(6))
    (folder / "data.jsonl").write_text("".join(rows))
    return ["meta-bias", "--models", str(folder / "model"), "--out", str(folder / "out")] + [
        f"--dataset={folder / 'data.jsonl'}",
        *("--count", "2", "--batch_size", "3", "--device", "cpu"),
    ]


def read_rows(folder):
    return [json.loads(line) for line in (folder / "meta_bias.jsonl").read_text().splitlines()]


def test_the_command_writes_rows_tables_and_pictures(tmp_path, capsys):
    words = save_tiny(tmp_path)
    words[2] += f",{words[2]}"
    less = ["--inner_steps", "1", "--inner_lr", "0.5", "--inner_max_norm", "none"]
    assert main([*words, "--names", "first, again", *less]) == 0
    rows = read_rows(tmp_path / "out")
    settings = [CENTRE, "inner_steps", "inner_lr", "inner_max_norm"]
    assert [(row["model"], row["varied"], row["batch"]) for row in rows] == [
        (model, setting, batch)
        for model in ("first", "again")
        for setting in settings
        for batch in (0, 1, "mean")
    ]
    half = len(rows) // 2
    for one, other in zip(rows[:half], rows[half:], strict=True):
        for key in set(one) - {"model", "time_ms"}:
            assert one[key] == other[key]
    assert list(by_setting(rows[:half])) == ["K 2, lr 0.1, clip 1", "K 1", "lr 0.5", "clip none"]
    report = (tmp_path / "out" / "meta_bias.md").read_text().strip()
    assert report == meta_bias_report(rows)
    assert report in capsys.readouterr().out
    for name in ("settings.png", "training.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_an_adapter_is_compared_by_what_it_trains(tmp_path):
    words = save_tiny(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj", "down_proj"],
        modules_to_save=["lm_head"],
        init_lora_weights=False,
        base_model_name_or_path=str(tmp_path / "model"),
    )
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    words[2] = str(tmp_path / "adapter")
    assert main([*words, "--inner_steps", "2", "--inner_lr", "0.1", "--inner_max_norm", "1"]) == 0
    rows = read_rows(tmp_path / "out")
    assert set(rows[0]["first_order"]) == {
        "layers below",
        "adapted attention",
        "adapted FFN",
        "head",
        "all",
    }
    assert all(value[0] is not None for value in rows[0]["first_order"].values())
    # What is loaded for inference stays frozen.
    adapter = load_checkpoint(str(tmp_path / "adapter")).model
    assert not any(parameter.requires_grad for parameter in adapter.parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "1"], "count must be at least 2, got 1"),
        (["--names", "a,b"], "names must be as many as models, 1, got 2"),
        (["--inner_steps", "1,2.5"], "inner_steps must be whole numbers with a comma in between"),
        (["--inner_lr", "fast"], "inner_lr must be numbers with a comma in between, got 'fast'"),
        (["--inner_lr", "none"], "inner_lr must be numbers with a comma in between, got 'none'"),
        (["--inner_max_norm", "0"], "inner_max_norm must be a number above 0, got 0.0"),
        (["--inner_steps", "0"], "inner_steps must be a whole number, at least 1, got 0"),
        (["--count", "3"], "dataset must have count * batch_size = 9 examples, got 6"),
    ],
)
def test_bad_options_are_one_line(words, message, tmp_path, capsys):
    assert main([*save_tiny(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "meta_bias.jsonl").exists()


def test_what_would_not_be_read_is_refused(tmp_path, capsys):
    words = ["meta-bias", "--models", "demo", "--out", str(tmp_path), "--max_length", "3"]
    assert main(words) == 2
    assert "max_length would not be read: dataset is not given" in capsys.readouterr().err


def test_the_demos_examples_are_for_its_tokenizer(tmp_path, capsys):
    words = [word for word in save_tiny(tmp_path) if not word.startswith("--dataset=")]
    assert main(words) == 2
    assert "its tokenizer is not the demo's" in capsys.readouterr().err


def test_a_model_whose_inner_loop_has_no_second_derivative_is_refused(tmp_path, capsys):
    assert main(save_tiny(tmp_path, dropout=0.1)) == 2
    assert "attention_dropout above 0" in capsys.readouterr().err
