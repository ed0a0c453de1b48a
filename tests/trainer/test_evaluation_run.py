"""`memdlm eval`: its arms, its folder, going on after a kill, and what it refuses."""

import dataclasses
import json
import math
import re
import shutil
import sys
import types
from pathlib import Path

import matplotlib.image
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from memdlm.cli import main
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.demo.examples import BASE_FOLDER, load_tokenizer
from memdlm.evaluation import run
from memdlm.evaluation.files_hash import files_hash
from memdlm.evaluation.options import EvalOptions
from memdlm.evaluation.report import ARMS, make_cells
from memdlm.evaluation.run import run_eval
from memdlm.evaluation.scoring import score
from memdlm.evaluation.tasks import build
from memdlm.inference import load_checkpoint
from memdlm.prompt_memory import PromptMemory
from memdlm.sampler import Sampler, SamplerConfig

POSITIONS = 256
ROOM = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three small models with the demo's tokenizer; the last was trained with a memory."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "plain", "model")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(load_tokenizer()),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=POSITIONS,
            initializer_range=0.4,
        )
        LlamaForCausalLM(config).double().save_pretrained(root / name)
        load_tokenizer().save_pretrained(root / name)
    memory = MemoryConfig(rank=4, layer_fraction=0.5, inner_lr=5.0)
    method = {
        "mask_token_id": load_tokenizer().mask_token_id,
        "diffusion": dataclasses.asdict(DiffusionConfig()),
        "memory": dataclasses.asdict(memory),
    }
    (root / "model" / "memdlm.json").write_text(json.dumps(method))
    return root


def options(folders, out, **keys):
    chosen = {
        "base": str(folders / "base"),
        "plain": str(folders / "plain"),
        "model": str(folders / "model"),
        "tasks": "qa1,vt",
        "lengths": "160,512,200",
        "count": 3,
        "batch_size": 2,
        "out": str(out),
        "device": "cpu",
        "max_new_tokens": ROOM,
        "sampler": {"steps": 4},
    } | keys
    return EvalOptions(**chosen)


def read_rows(out):
    return [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]


def without_time(rows):
    return [{k: v for k, v in row.items() if k not in ("time", "seconds")} for row in rows]


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "out"
    return out, run_eval(options(folders, out))


def test_every_arm_answers_the_same_examples(finished):
    out, _ = finished
    rows = read_rows(out)
    assert len(rows) == len(ARMS) * 2 * 2 * 3
    asked = {
        arm: {
            (row["task"], row["length"], row["index"], tuple(row["references"]))
            for row in rows
            if row["arm"] == arm
        }
        for arm in ARMS
    }
    assert all(questions == asked["base"] for questions in asked.values())
    assert len(asked["base"]) == 12
    for row in rows:
        assert row["length"] - 32 < row["prompt_tokens"] + ROOM <= row["length"]
        assert row["seconds"] > 0


def test_scores_are_those_of_the_answers(finished):
    out, _ = finished
    for row in read_rows(out):
        examples = build(row["task"], load_tokenizer(), row["length"], 3, 0, answer_tokens=ROOM)
        assert row["score"] == score(examples[row["index"]], row["prediction"])


@pytest.mark.parametrize("arm", ["train-only", "train & inference"])
def test_an_answer_is_what_sampler_and_memory_give(folders, finished, arm):
    checkpoint = load_checkpoint(str(folders / "model"), device="cpu")
    prompts = [e.prompt_ids for e in build("vt", load_tokenizer(), 200, 3, 0, answer_tokens=ROOM)]
    config = SamplerConfig(max_new_tokens=ROOM, steps=4)
    sampler = Sampler.of(checkpoint)
    if arm == "train-only":
        written = sampler.generate(prompts, config)
    else:
        with PromptMemory.of(checkpoint).adapt(prompts):
            written = sampler.generate(prompts, config)
    expected = [load_tokenizer().decode(r, skip_special_tokens=True) for r in written.responses]
    rows = [row for row in read_rows(finished[0]) if row["arm"] == arm and row["task"] == "vt"]
    assert [row["prediction"] for row in rows if row["length"] == 200] == expected


def test_the_memory_changes_answers(finished):
    rows = read_rows(finished[0])
    on, off = (
        [row["prediction"] for row in rows if row["arm"] == arm]
        for arm in ("train & inference", "train-only")
    )
    assert on != off


def test_a_length_without_positions_is_left_out_and_says_why(finished):
    out, table = finished
    assert table == (out / "table.md").read_text().strip()
    lines = [line for line in table.split("## What")[0].splitlines() if line.startswith("| base")]
    assert len(lines) == 2
    assert all(line.endswith("| does not fit |") for line in lines)
    assert f"- train-only, 512 tokens: does not fit: the model has {POSITIONS} positions." in table
    assert {skip["arm"] for skip in json.loads((out / "summary.json").read_text())["skipped"]} == (
        set(ARMS)
    )


def test_summary_and_picture_are_of_the_answers(finished):
    out, table = finished
    summary = json.loads((out / "summary.json").read_text())
    rows = read_rows(out)
    assert len(summary["cells"]) == len(ARMS) * 4
    for cell in summary["cells"]:
        own = [
            100 * row["score"]
            for row in rows
            if all(row[key] == cell[key] for key in ("arm", "task", "length"))
        ]
        assert cell["mean"] == pytest.approx(sum(own) / 3)
        assert cell["examples"] == 3
        assert (cell["error"] is None) == (len(set(own)) == 1)
        error = "" if cell["error"] is None else f" ± {cell['error']:.1f}"
        section = table.split(f"## {cell['task']}: ")[1].split("##")[0]
        assert re.search(
            rf"\| {re.escape(cell['arm'])} \| 3 \|.* {cell['mean']:.1f}{error} \|", section
        )
    picture = matplotlib.image.imread(out / "heatmap.png")
    assert min(picture.shape[:2]) > 200
    assert picture.std() > 0.05


def test_a_run_that_was_killed_goes_on_where_it_was(folders, finished, tmp_path):
    whole = read_rows(finished[0])
    out = tmp_path / "out"
    out.mkdir()
    lines = (finished[0] / "examples.jsonl").read_text().splitlines(keepends=True)
    # Two batches in, and killed in the middle of a line.
    kept = lines[:17]
    (out / "examples.jsonl").write_text("".join(kept) + lines[17][:40])
    (out / "settings.json").write_text((finished[0] / "settings.json").read_text())
    run_eval(options(folders, out))
    assert (out / "examples.jsonl").read_text().startswith("".join(kept))
    by_key = sorted(without_time(read_rows(out)), key=str)
    assert by_key == sorted(without_time(whole), key=str)


def test_what_is_answered_is_not_asked_again_and_arms_and_lengths_are_added(
    folders, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    small = {"tasks": "qa1", "lengths": "160", "count": 1, "plain": None, "model": None}
    run_eval(options(folders, out, **small))
    loaded = []

    def load(folder, **keys):
        loaded.append(folder)
        return load_checkpoint(folder, **keys)

    monkeypatch.setattr(run, "load_checkpoint", load)
    run_eval(options(folders, out, **small))
    assert loaded == []
    more = small | {"lengths": "160,170", "plain": str(folders / "plain")}
    table = run_eval(options(folders, out, **more))
    assert loaded == [str(folders / "base"), str(folders / "plain")]
    assert [(row["arm"], row["length"]) for row in read_rows(out)] == [
        ("base", 160),
        ("base", 170),
        ("MDLM", 160),
        ("MDLM", 170),
    ]
    assert "| base | " in table
    assert "| MDLM | " in table


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seed": 1}, "answers with seed 0, got 1"),
        ({"sampler": {"steps": 2}}, r"answers with sampler {'steps': 4}, got {'steps': 2}"),
        ({"max_new_tokens": 4}, "answers with max_new_tokens 8, got 4"),
        ({"base": "plain"}, "answers of another model as 'base'"),
    ],
)
def test_answers_of_other_settings_are_not_mixed(folders, finished, keys, message):
    before = (finished[0] / "examples.jsonl").read_bytes()
    if "base" in keys:
        keys = {"base": str(folders / keys["base"])}
    with pytest.raises(ValueError, match=message):
        run_eval(options(folders, finished[0], **keys))
    assert (finished[0] / "examples.jsonl").read_bytes() == before


def test_a_model_that_was_trained_on_since_is_another(folders, tmp_path):
    small = {"tasks": "qa1", "lengths": "160", "count": 1, "plain": None, "model": None}
    out, folder = tmp_path / "out", tmp_path / "base"
    load_tokenizer().save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folders / "base", dtype="auto")
    model.save_pretrained(folder)
    run_eval(options(folders, out, **small | {"base": str(folder)}))
    with torch.no_grad():
        model.model.norm.weight += 0.5
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="another model"):
        run_eval(options(folders, out, **small | {"base": str(folder)}))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"base": None, "plain": None, "model": None}, "model, base or plain must be given"),
        ({"tasks": "mv,niah"}, "tasks must be of mv"),
        ({"tasks": "mv,mv"}, "tasks must be named once"),
        ({"tasks": "none"}, "tasks must not be none"),
        ({"lengths": "1k"}, "lengths must be whole numbers"),
        ({"lengths": ","}, "lengths must hold at least one"),
        ({"count": 0}, "count must be at least 1"),
        ({"budget_gib": 0.0}, "budget_gib must be above 0"),
        ({"budget_gib": 1.0, "model": None}, "budget_gib would not be read"),
        ({"sampler": {"seed": 1}}, "sampler must not hold seed"),
        ({"sampler": {"stepz": 4}}, "unknown option 'stepz'"),
        ({"sampler": {"steps": 3, "block_length": 4}}, "steps must be a multiple"),
        ({"lengths": "64"}, "length must be at least"),
        ({"chat": True}, "chat must be false"),
        ({"model": "plain"}, "must have been trained with a memory"),
        ({"base": "empty"}, "must each hold a model"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(folders, tmp_path, keys, message):
    (tmp_path / "empty").mkdir()
    places = {"plain": folders / "plain", "empty": tmp_path / "empty"}
    for key in {"base", "model"} & set(keys):
        keys = keys | {key: str(places[keys[key]])} if keys[key] in places else keys
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        run_eval(options(folders, out, **keys))
    assert not out.exists()


def test_standard_errors():
    rows = [
        {"arm": "base", "task": task, "length": 1, "score": value, "seconds": 2.0}
        for task, values in {"qa1": [1, 0, 0, 0, 1], "mv": [0.25, 0.75, 0.5], "vt": [1]}.items()
        for value in values
    ]
    cells = make_cells(rows)
    binomial = 100 * math.sqrt(0.4 * 0.6 / 4)
    assert cells["base", "qa1", 1] == (pytest.approx(40), pytest.approx(binomial), 5, 2)
    assert cells["base", "mv", 1].error == pytest.approx(100 * 0.25 / math.sqrt(3))
    assert cells["base", "vt", 1].error is None
    # Three right of three do not say that every answer is right.
    same = [{"arm": "base", "task": "vt", "length": 1, "score": 1.0, "seconds": 2.0}] * 3
    assert make_cells(same)["base", "vt", 1] == (100, None, 3, 2)


class _NoPromptError(ValueError):
    pass


@pytest.fixture
def harness(monkeypatch):
    """A plug-in that answers at once, and what it was asked: folder, memory, task and options."""
    asked = []

    class MemDLM:
        def __init__(self, folder, *, memory, **options):
            self.folder, self.memory, self.options = folder, memory, options

    def run_lm_eval(model, task, *, length, limit, **keys):
        if model.memory and task == "wikitext":
            raise _NoPromptError("there is no prompt")
        if task == "broken":
            raise ValueError("its data cannot be fetched")
        asked.append((model.folder, model.memory, task, length, limit, model.options | keys))
        name = "none" if length is None else length
        value = len(asked) / 8
        return {task: {"sample_len": limit, f"{name},none": value, f"{name}_stderr,none": 0.125}}

    def check_task(task, lengths):
        if task == "piqaa":
            raise ValueError("tasks must be of lm-evaluation-harness, got 'piqaa'")

    module = types.ModuleType("memdlm.evaluation.lm_eval")
    module.MemDLM, module.NoPromptError = MemDLM, _NoPromptError
    module.run_lm_eval, module.check_task = run_lm_eval, check_task
    module.reads_length = lambda task: task.startswith("ruler")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_the_harness_measures_every_arm_once(folders, tmp_path, harness):
    chosen = options(folders, tmp_path / "out", tasks="none", lm_eval="ruler_vt,piqa", base=None)
    table = run_eval(chosen)
    assert "| ruler_vt | 160 | 3 | 0.1250 ± 0.1250 | 0.5000 ± 0.1250 | 0.8750 ± 0.1250 |" in table
    assert "| ruler_vt | 200 | 3 | 0.2500 ± 0.1250 | 0.6250 ± 0.1250 | 1.0000 ± 0.1250 |" in table
    assert table.count("| piqa |") == 1
    runs = [("ruler_vt", 160), ("ruler_vt", 200), ("piqa", None)]
    folder_memory = [(chosen.plain, False), (chosen.model, False), (chosen.model, True)]
    assert [one[:4] for one in harness] == [(*arm, *run) for arm in folder_memory for run in runs]
    for *_, limit, keys in harness:
        assert limit == 3
        assert keys["sampler"] == {"steps": 4, "max_new_tokens": ROOM}
        assert keys["seed"] == 0
        assert keys["chat"] is False
    assert run_eval(chosen) == table
    assert len(harness) == 9


def test_the_harness_keeps_the_results_of_other_tasks_lengths_and_counts(
    folders, tmp_path, harness
):
    out = tmp_path / "out"
    run_eval(options(folders, out, tasks="none", lm_eval="piqa", model=None))
    few = {"tasks": "none", "plain": None, "model": None}
    table = run_eval(options(folders, out, lm_eval="arc_easy", **few))
    assert "| piqa | none | 3 | 0.1250 ± 0.1250 | 0.2500 ± 0.1250 |" in table
    assert "| arc_easy | none | 3 | 0.3750 ± 0.1250 |  |" in table
    table = run_eval(options(folders, out, lm_eval="piqa", count=2, **few))
    # Of two examples, and so not beside three of the other arm.
    assert "| piqa | none | 2 | 0.5000 ± 0.1250 |  |" in table
    assert "| piqa | none | 3 | 0.1250 ± 0.1250 | 0.2500 ± 0.1250 |" in table
    run_eval(options(folders, out, lm_eval="ruler_vt", lengths="160", **few))
    run_eval(options(folders, out, lm_eval="ruler_vt", lengths="160,200", **few))
    assert [one[2:4] for one in harness[4:]] == [("ruler_vt", 160), ("ruler_vt", 200)]


def test_a_task_without_a_prompt_is_left_out_of_the_memorys_arm_alone(folders, tmp_path, harness):
    chosen = options(
        folders, tmp_path / "out", tasks="none", lm_eval="wikitext,piqa", base=None, plain=None
    )
    table = run_eval(chosen)
    assert "- train & inference, wikitext: left out, there is no prompt." in table
    assert "| wikitext | none | 3 | 0.1250 ± 0.1250 |  |" in table
    assert "| piqa | none | 3 | 0.2500 ± 0.1250 | 0.3750 ± 0.1250 |" in table
    assert run_eval(chosen) == table
    assert len(harness) == 3


def test_what_was_measured_before_an_error_is_in_the_table(folders, tmp_path, harness):
    out = tmp_path / "out"
    keys = {"tasks": "qa1", "lengths": "160", "count": 1, "plain": None, "model": None}
    with pytest.raises(ValueError, match="its data cannot be fetched"):
        run_eval(options(folders, out, lm_eval="piqa,broken", **keys))
    table = (out / "table.md").read_text()
    assert "## qa1" in table
    assert "| piqa |" in table


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lm_eval": "piqa,piqaa"}, "tasks must be of lm-evaluation-harness, got 'piqaa'"),
        ({"lm_eval": "ruler_vt", "lengths": "512"}, "lengths must hold one for lm_eval within"),
    ],
)
def test_what_the_harness_cannot_do_is_refused_before_any_work(
    folders, tmp_path, harness, keys, message
):
    with pytest.raises(ValueError, match=message):
        run_eval(options(folders, tmp_path / "out", **keys))
    assert not (tmp_path / "out").exists()


def test_a_length_that_words_cannot_fill_is_refused_before_any_work(folders, tmp_path):
    folder, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(folders / "base", folder)
    config = LlamaConfig.from_pretrained(folder)
    config.max_position_embeddings = 200_000
    config.save_pretrained(folder)
    keys = {"base": str(folder), "plain": None, "model": None, "tasks": "cwe"}
    with pytest.raises(ValueError, match="tokens only"):
        run_eval(options(folders, out, **keys, lengths="512,200000"))
    assert not out.exists()


def test_a_table_is_there_after_an_error_in_the_middle(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def load(folder, **keys):
        if folder.endswith("plain"):
            raise ValueError("out of memory")
        return load_checkpoint(folder, **keys)

    monkeypatch.setattr(run, "load_checkpoint", load)
    keys = {"tasks": "qa1", "lengths": "160", "count": 1, "model": None}
    with pytest.raises(ValueError, match="out of memory"):
        run_eval(options(folders, out, **keys))
    assert "| base | 1 |" in (out / "table.md").read_text()


def adapter(folders, folder):
    """An adapter of the plain model, without a tokenizer of its own."""
    model = LlamaForCausalLM.from_pretrained(folders / "plain")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    return folder


def test_the_lengths_of_an_adapter_are_checked(folders, tmp_path):
    folder, out = adapter(folders, tmp_path / "adapter"), tmp_path / "out"
    keys = {"base": str(folder), "plain": None, "model": None}
    with pytest.raises(ValueError, match="length must be at least"):
        run_eval(options(folders, out, **keys, lengths="64"))
    assert not out.exists()
    table = run_eval(options(folders, out, **keys, tasks="qa1", lengths="160", count=1))
    assert "| base | 1 |" in table


def test_a_finished_run_with_a_length_that_does_not_fit_loads_nothing(
    folders, finished, monkeypatch
):
    monkeypatch.setattr(run, "load_checkpoint", None)
    assert run_eval(options(folders, finished[0])) == finished[1]


def test_arms_are_asked_in_one_way(folders, tmp_path):
    plain, out = tmp_path / "plain", tmp_path / "out"
    shutil.copytree(folders / "plain", plain)
    (plain / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    keys = {"model": None, "tasks": "qa1", "lengths": "160", "count": 1, "plain": str(plain)}
    with pytest.raises(ValueError, match="chat must be given as false"):
        run_eval(options(folders, out, **keys))
    assert not out.exists()
    run_eval(options(folders, out, **keys, chat=False))
    run_eval(options(folders, tmp_path / "own", **keys | {"base": str(plain), "plain": None}))
    chosen = [json.loads((o / "settings.json").read_text()) for o in (out, tmp_path / "own")]
    assert [settings["settings"]["chat"] for settings in chosen] == [False, True]
    # The other arm cannot be added in another way.
    with pytest.raises(ValueError, match="answers with chat True, got False"):
        run_eval(options(folders, tmp_path / "own", **keys | {"base": None}, chat=False))


def test_the_hash_of_a_model_sees_all_of_it(folders, tmp_path):
    folder = tmp_path / "base"
    load_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(load_tokenizer()),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > 1 << 21
    hashes = [files_hash(folder)]
    with torch.no_grad():
        for parameter in model.model.layers[1].parameters():
            parameter += 1.0
    model.save_pretrained(folder)
    hashes.append(files_hash(folder))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    hashes.append(files_hash(folder))
    assert len(set(hashes)) == 3
    assert files_hash(folder) == hashes[-1]
    assert files_hash(tmp_path / "hub/name") is None


def test_the_hash_of_an_adapter_sees_its_base(folders, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folders / "plain", base)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base)})
    )
    before = files_hash(tmp_path / "adapter")
    (base / "tokenizer_config.json").write_text("{}")
    assert files_hash(tmp_path / "adapter") != before


def test_a_folder_is_the_same_model_under_any_path(folders, tmp_path, monkeypatch):
    keys = {"plain": None, "model": None, "tasks": "qa1", "lengths": "160", "count": 1}
    run_eval(options(folders, tmp_path / "out", **keys))
    monkeypatch.chdir(folders)
    run_eval(options(folders, tmp_path / "out", **keys | {"base": "base"}))
    assert len(read_rows(tmp_path / "out")) == 1


@pytest.mark.parametrize("name", ["settings.json", "examples.jsonl"])
def test_a_file_that_cannot_be_read_is_named(folders, finished, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / name).write_text((out / name).read_text()[:40] + "\n")
    with pytest.raises(ValueError, match=name):
        run_eval(options(folders, out))


def test_settings_are_whole_after_a_kill(folders, finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    before = (out / "settings.json").read_text()
    whole = Path.write_text

    def die(self, text, **keys):
        whole(self, text[:20], **keys)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", die)
    with pytest.raises(KeyboardInterrupt):
        run_eval(options(folders, out))
    assert (out / "settings.json").read_text() == before


def test_each_row_says_of_how_many_examples_it_is(folders, tmp_path):
    out = tmp_path / "out"
    keys = {"model": None, "tasks": "qa1", "lengths": "160"}
    run_eval(options(folders, out, **keys | {"base": None}, count=3))
    table = run_eval(options(folders, out, **keys | {"plain": None}, count=1))
    assert "| base | 1 |" in table
    assert "| MDLM | 3 |" in table
    keys |= {"plain": None, "lengths": "160,170"}
    run_eval(options(folders, out, **keys | {"lengths": "170"}, count=2))
    assert "| base | 1, 2 |" in (out / "table.md").read_text()


def test_the_command_line_reads_the_samplers_options(tmp_path, capsys):
    out = tmp_path / "out"
    words = f"eval --base {BASE_FOLDER} --tasks mv --lengths 256 --count 2 --out {out}"
    assert main([*words.split(), "--gen-steps", "4"]) == 2
    assert "unknown key 'gen_steps'" in capsys.readouterr().err
    words += " --max_new_tokens 16 --block_length 8 --alg entropy --steps_per_block 2"
    assert main([*words.split(), "--device", "cpu"]) == 0
    assert "| base | " in capsys.readouterr().out
    rows = read_rows(out)
    assert len(rows) == 2
    assert all(row["prediction"] for row in rows)
    settings = json.loads((out / "settings.json").read_text())["settings"]
    assert settings["sampler"] == {"block_length": 8, "alg": "entropy", "steps_per_block": 2}


def test_help_names_every_option(capsys):
    assert main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(EvalOptions):
        assert f"--{field.name}: " in text
    for name in ("threshold", "block_size", "alg", "steps"):
        assert f" {name}" in text
