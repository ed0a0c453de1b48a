"""`memdlm ablate`: cells, what is trained once, what a killed run does again, and its report."""

import json
from pathlib import Path

import pytest

from memdlm.ablation import run as module
from memdlm.ablation.grid import Grid, make_cells, read_grid
from memdlm.ablation.report import ablation_table, spread
from memdlm.ablation.task import base_keys
from memdlm.cli import main
from tests.trainer.trainer_case import tiny_model, tiny_tokenizer

DOCS = Path(__file__).parents[2] / "docs"

# As small as the demo's task gets.
SMALL = """
run: {max_steps: 2, per_device_train_batch_size: 2, use_cpu: true, disable_tqdm: true, rank: 4}
examples: 2
recall_lengths: [96]
recall_examples: 2
exposure_bias: false
"""


def cells_of(**given):
    grid = Grid(**given)
    return make_cells(grid, base_keys(grid))


@pytest.fixture
def trained(monkeypatch):
    """The folders that were trained, in order."""
    folders = []
    train = module.train

    def counted(run):
        folders.append(run.arguments.output_dir)
        return train(run)

    monkeypatch.setattr(module, "train", counted)
    return folders


def test_cells_are_every_combination_with_every_seed():
    options = {"inner_clip": ["tensor", "none"], "inner_steps": [1, 2, 3]}
    cells = cells_of(ablations={"clip": options, "rank": {"rank": [8]}}, seeds=[0, 5])
    assert [cell.ablation for cell in cells] == ["clip"] * 12 + ["rank"] * 2
    values = {(c.values["inner_clip"], c.values["inner_steps"], c.seed) for c in cells[:12]}
    assert len(values) == 12
    assert all(cell.keys[key] == value for cell in cells for key, value in cell.values.items())
    assert len({cell.model_name for cell in cells}) == 14


def test_what_inference_alone_reads_is_trained_once():
    cells = cells_of(ablations={"ratio": {"prompt_ratio": [0.1, 0.2, 0.4]}})
    assert len({cell.model_name for cell in cells}) == 1
    assert len({cell.keys["prompt_ratio"] for cell in cells}) == 3


def test_plain_mdlm_takes_no_key_of_the_memory_from_the_others():
    plain, memory = cells_of(ablations={"o": {"objective": ["mdlm", "memdlm"]}}, run={"rank": 4})
    assert "rank" not in plain.keys
    assert memory.keys["rank"] == 4


def test_a_grid_runs_and_goes_on_where_it_was(tmp_path, capsys, trained):
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    text = SMALL + "ablations:\n  objective: {objective: [mdlm, memdlm]}\n"
    text += "  ratio: {prompt_ratio: [0.2, 0.5]}\n"
    grid.write_text(text)
    words = ["ablate", str(grid), "--out", str(out)]
    assert main(words) == 0
    assert len(trained) == 2
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    # mdlm off; memdlm off and on, with the ratio as it is, 0.2, and with 0.5.
    assert [row["memory"] for row in rows] == ["off", *["off", "on"] * 2]
    assert len({row["nll"] for row in rows if row["memory"] == "off"}) == 2
    assert len({row["nll"] for row in rows if row["memory"] == "on"}) == 2
    assert all({"nll", "recall_96_one", "recall_96_several"} <= row.keys() for row in rows)
    report = (out / "report.md").read_text()
    assert report.strip() in capsys.readouterr().out
    for name in ("objective", "ratio"):
        assert f"![{name}]({name}.png)" in report
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    # Killed in the middle of its last row, and of a training.
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20])
    assert main(words) == 0
    assert len(trained) == 2
    assert (out / "rows.jsonl").read_text() == "".join(lines)
    (out / "rows.jsonl").unlink()
    (out / "models" / rows[0]["model"] / "trained.json").unlink()
    assert main(words) == 0
    assert len(trained) == 3
    assert (out / "rows.jsonl").read_text() == "".join(lines)
    grid.write_text(text.replace("examples: 2\nrecall_l", "examples: 3\nrecall_l"))
    assert main(words) == 2
    assert "measured with examples 2, got 3" in capsys.readouterr().err


def test_inner_losses_are_compared(tmp_path, trained):
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    names = ["cross_entropy", "kl", "hidden_cosine"]
    grid.write_text(SMALL + f"ablations:\n  inner_loss: {{inner_loss: [{', '.join(names)}]}}\n")
    assert main(["ablate", str(grid), "--out", str(out)]) == 0
    assert len(trained) == len(names)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["memory"] for row in rows] == ["off", "on"] * len(names)
    assert len({row["nll"] for row in rows if row["memory"] == "on"}) == len(names)
    report = (out / "report.md").read_text()
    assert all(f"| inner_loss {name} | on |" in report for name in names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {}", "ablations must be given"),
        ("ablations: {}", "at least one"),
        ("ablations: {clip: [1]}", "must map clip to options"),
        ("ablations: {clip: {inner_clip: tensor}}", "clip.inner_clip must be a list of values"),
        ("ablations: {clip: {iner_clip: [none]}}", "did you mean inner_clip"),
        ("ablations: {clip: {inner_clip: [never]}}", "ablation clip, inner_clip never"),
        ("ablations: {s: {seed: [1]}}", "seed cannot be set"),
        ("ablations: {s: {rank: [1]}}\nseeds: [1, 1]", "seeds must be different"),
        ("ablations: {s: {rank: [1]}}\nexamples: 1", "examples must be at least 2"),
        ("ablations: {s: {rank: [1]}}\nexample: 1", "unknown key 'example'"),
        ("ablations: {a/b: {rank: [1]}}", "must have names of letters"),
        ("ablations: {s: {rank: [1]}}\nrecall_lengths: [16]", "at least 96, got 16"),
        ("ablations: {s: {rank: [1]}}\nrun: {max_steps: -1}", "max_steps must be at least 1"),
        ("ablations: {s: {dataset: [a.jsonl]}}", "dataset must be the same for all runs"),
        (
            "ablations: {s: {rank: [1]}}\nrun: {dataset: a.jsonl, model: m}",
            "run.eval_dataset must be given",
        ),
        (
            "ablations: {s: {objective: [mdlm], rank: [1]}}",
            "ablation s, objective mdlm, rank 1: rank would not be read",
        ),
        (
            "ablations: {s: {inner_loss: [hidden_mse], inner_temperature: [2.0]}}",
            "inner_temperature would not be read: inner_loss is neither 'kl' nor 'reverse_kl'",
        ),
        (
            "ablations: {s: {rank: [1]}}\nrun: {dataset: a.jsonl, eval_dataset: b.jsonl}\n"
            "recall_lengths: [96]",
            "recall_lengths is read with the demo's data alone",
        ),
    ],
)
def test_a_bad_grid_is_one_line_before_any_training(text, message, tmp_path, capsys, trained):
    grid = tmp_path / "grid.yaml"
    grid.write_text(text)
    assert main(["ablate", str(grid), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not trained


def test_data_and_a_model_of_ones_own(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"the magic number {i}", "response": "one two three"} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset: {tmp_path / 'data.jsonl'}, eval_dataset: {tmp_path / 'data.jsonl'}, "
    run = f"run: {{model: {tmp_path / 'model'}, {data}max_steps: 1, use_cpu: true, rank: 2}}\n"
    grid = tmp_path / "grid.yaml"
    grid.write_text(run + "examples: 3\nablations: {steps: {inner_steps: [1, 2]}}\n")
    assert main(["ablate", str(grid), "--out", str(tmp_path / "out")]) == 0
    report = capsys.readouterr().out
    assert "| inner_steps 2 | on |" in report
    assert "| NLL | R | R_exposure | NLL minus the first row's |" in report
    # The demo's examples are of no use to this model.
    grid.write_text(run.replace(data, "") + "ablations: {steps: {inner_steps: [1]}}\n")
    assert main(["ablate", str(grid), "--out", str(tmp_path / "other")]) == 2
    assert "its tokenizer is not the demo's" in capsys.readouterr().err


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("ablations: {rank: {rank: [1, 2]}}\nseeds: [1]\n")
    assert read_grid(str(path), {"seeds": [3]}).seeds == [3]


def test_differences_are_paired_by_seed_and_example():
    cells = cells_of(ablations={"rank": {"rank": [1, 2]}}, seeds=[0, 1])
    nlls = {1: [[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]], 2: [[1.0, 3.0, 6.0], [3.0, 3.0, 4.0]]}
    rows = [
        {"model": cell.model_name, "prompt_ratio": cell.prompt_ratio, "seed": cell.seed}
        | {"memory": "off", "nll": 1.0, "keys": {}}
        | {"nll_of_examples": nlls[cell.values["rank"]][cell.seed]}
        for cell in cells
    ]
    table = ablation_table("rank", cells, rows)
    assert table[2].endswith("|  |")
    assert table[3].endswith("| +1.0000 ± 0.0000 |")


def test_a_mean_has_its_spread_where_there_are_seeds():
    assert spread("nll", [1.0]) == "1.000"
    assert spread("nll", [1.0, 2.0]) == "1.500 ± 0.707"
    assert spread("recall_96_one", [0.5, 0.5]) == "50.0 ± 0.0"


@pytest.mark.parametrize("name", ["evidence", "evidence_why", "inner_losses", "paper_ablations"])
def test_the_grids_of_the_docs_are_runs_that_exist(name):
    grid = read_grid(str(DOCS / f"{name}.yaml"), {})
    cells = make_cells(grid, base_keys(grid))
    assert {cell.ablation for cell in cells} == set(grid.ablations)
    # What several ablations share is trained once.
    assert len({cell.model_name for cell in cells}) < len(cells) or len(grid.ablations) == 1
