"""`memdlm train`: its keys, its errors, and that it trains, saves and resumes."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time

import datasets
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from memdlm.cli import main, train_help
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.key_values import read_command_line, read_yaml
from memdlm.models import LLaDA2MoeConfig
from memdlm.options import REJECTED_ARGUMENTS, RunOptions, key_hints, make_run
from memdlm.training import _lora_config
from memdlm_kernels import list_backends
from tests.trainer.trainer_case import VOCABULARY, WORDS, tiny_model, tiny_tokenizer

PAIRS = [
    {"prompt": f"the magic number of {WORDS[i % 4]} is", "response": " ".join(WORDS[i % 7 : 12])}
    for i in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, and data of two prompts' forms."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model(dropout=0.1).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (folder / "other.jsonl").write_text('{"question": "one", "answer": "two"}\n')
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def arguments(folder, output, **keys):
    """The command line of a short run; a key of None is left out."""
    chosen = {
        "model": folder / "model",
        "dataset": folder / "pairs.jsonl",
        "output_dir": output,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": "1e-2",
        "logging_steps": 1,
        "use_cpu": "true",
        "disable_tqdm": "true",
        "rank": 2,
        "layer_fraction": 0.5,
    } | keys
    words = ["train"]
    for key, value in chosen.items():
        words += [] if value is None else [f"--{key}", str(value)]
    return words


def losses(output):
    state = json.loads((output / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_help_tells_every_key_with_its_default_and_meaning(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == train_help().strip()
    for kind in (RunOptions, DiffusionConfig, MemoryConfig):
        assert {field.name for field in dataclasses.fields(kind)} <= set(key_hints())
    entries = text.split("\n  --")[1:]
    assert {entry.partition(":")[0] for entry in entries} == set(key_hints())
    for entry in entries:
        head, _, meaning = entry.partition("\n")
        assert re.search(r"\((default .*|required)\)$", head), head
        assert meaning.strip(), head
    assert "--inner_steps: a whole number (default 2)" in text
    assert "--model: text (required)" in text


def test_the_commands_are_told(capsys):
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["fly"]) == 2
    assert "command must be one of " in capsys.readouterr().err


def test_text_of_the_command_line_stays_as_it_is():
    hints = {"prompt": str | None, "count": int | None, "names": str, "flag": bool}
    for text in ("What is C# ? # really", '"Hello"', "  two\n\n lines ", "~", "1e3", ""):
        assert read_command_line(["--prompt", text], hints) == {"prompt": text}
        assert read_command_line([f"--names={text}"], hints) == {"names": text}
    assert read_command_line(["--prompt", "null", "--count", "3", "--flag"], hints) == {
        "prompt": None,
        "count": 3,
        "flag": True,
    }
    for words in (["--prompt"], ["--prompt", "--flag"]):
        with pytest.raises(ValueError, match="prompt needs a value"):
            read_command_line(words, hints)


def test_every_rejected_argument_has_one_of_the_trainers_names():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    newer = {name for name in REJECTED_ARGUMENTS if name.startswith("activation_checkpointing")}
    assert set(REJECTED_ARGUMENTS) - newer <= names


def test_yaml_words_and_numbers_mean_what_they_look_like(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "save_strategy: no\nlearning_rate: 1e-4\nlora: true\nrank: 3\n"
    )
    assert read_yaml(str(tmp_path / "run.yaml")) == {
        "save_strategy": "no",
        "learning_rate": 1e-4,
        "lora": True,
        "rank": 3,
    }


def test_the_command_line_wins_over_the_file(folder, tmp_path):
    (tmp_path / "run.yaml").write_text("max_steps: 50\nsave_strategy: no\nobjective: mdlm\n")
    words = arguments(folder, tmp_path / "out", rank=None, layer_fraction=None, max_steps=2)
    assert main([*words, "--config", str(tmp_path / "run.yaml")]) == 0
    assert len(losses(tmp_path / "out")) == 2
    assert json.loads((tmp_path / "out" / "memdlm.json").read_text())["objective"] == "mdlm"


def test_full_fine_tuning_ends_with_a_model_and_an_evaluation(folder, tmp_path, capsys):
    output = tmp_path / "out"
    keys = {"eval_fraction": 0.25, "memory_gap_steps": 2, "save_strategy": "no"}
    assert main(arguments(folder, output, **keys)) == 0
    printed = capsys.readouterr().out
    metrics = json.loads(printed[printed.rindex("{\n") :])
    assert metrics["eval_loss"] != metrics["eval_loss_with_memory"]
    AutoModelForCausalLM.from_pretrained(output)
    state = json.loads((output / "trainer_state.json").read_text())
    assert {"loss_with_memory", "inner_skipped"} <= set(state["log_history"][1])


def test_an_outer_lora_and_the_options_of_padding_and_bfloat16(folder, tmp_path):
    output = tmp_path / "out"
    keys = {
        "lora": "true",
        "lora_rank": 2,
        "lora_targets": "[q_proj, up_proj]",
        "padding": "max_length",
        "max_length": 24,
        "bf16": "true",
        "gradient_checkpointing": "true",
        "report_to": "tensorboard",
        "max_steps": 2,
    }
    assert main(arguments(folder, output, **keys)) == 0
    saved = json.loads((output / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (2, 4)
    assert set(saved["target_modules"]) == {"q_proj", "up_proj"}
    assert list(output.rglob("events.out.tfevents.*"))


# Key to value (None: left out), and what the message says.
BAD = [
    ({"inner_stpes": 2}, "unknown key 'inner_stpes'; did you mean inner_steps"),
    ({"inner_steps": 0}, "inner_steps must be a whole number, at least 1, got 0"),
    ({"inner_steps": 1.5}, "inner_steps must be a whole number, got '1.5'"),
    ({"rank": 0}, "rank must be a whole number, at least 1, got 0"),
    ({"rank": "many"}, "rank must be a whole number, got 'many'"),
    ({"lora": "true", "lora_rank": 0}, "lora_rank must be at least 1, got 0"),
    ({"lora": "perhaps"}, "lora must be true or false, got 'perhaps'"),
    ({"time_epsilon": 0}, r"time_epsilon must be a number in \(0, 1\), got 0"),
    ({"layer_fraction": 1.5}, r"layer_fraction must be in \(0, 1\], got 1.5"),
    ({"eval_fraction": 1}, r"eval_fraction must be in \(0, 1\), got 1"),
    ({"schedule": "quadratic"}, "schedule must be one of linear, cosine, got 'quadratic'"),
    ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"eval_fraction": 0.2, "eval_strategy": "often"}, "often"),
    ({"model": None}, "model must be given"),
    ({"dataset": None}, "dataset must be given"),
    ({"output_dir": None}, "output_dir must be given"),
    ({"objective": "mdlm"}, "would not be read: objective is 'mdlm'"),
    ({"lora_rank": 4}, "lora_rank would not be read: lora is false"),
    ({"adapter": "full"}, "rank would not be read: adapter is 'full'"),
    ({"inner_clip": "none", "inner_max_norm": 2}, "inner_max_norm would not be read"),
    ({"strategy": "progressive", "pre_anchor_scale": 2}, "pre_anchor_scale would not be read"),
    (
        {"inner_steps": 1, "prefix_reuse": "prompt_kv"},
        "prefix_reuse would not be read: the anchor is the only state",
    ),
    ({"pad_to_multiple_of": 8}, "pad_to_multiple_of would not be read"),
    ({"num_train_epochs": 3}, "num_train_epochs would not be read: max_steps is given"),
    ({"eval_strategy": "steps"}, "eval_strategy would not be read: there is no evaluation data"),
    ({"mask_token": "<mask>", "mask_token_id": 1}, "mask_token would not be read"),
    ({"dataset_split": "test"}, "dataset_split would not be read: a JSON file has no splits"),
    ({"block_size": 0}, "block_size must be a whole number, at least 1, or None, got 0"),
    ({"block_size": 4}, "block_size must divide .* got block_size 4 and padding 'longest'"),
    (
        {"block_size": 4, "padding": "multiple", "pad_to_multiple_of": 6},
        "block_size must divide .* got block_size 4 and padding 'multiple' to 6",
    ),
    ({"load_in_4bit": "true"}, "lora must be true with load_in_4bit: .*, got false"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor cannot be set"),
    ({"remove_unused_columns": "true"}, "remove_unused_columns cannot be set"),
    ({"mask_token": "<hidden>"}, "mask_token '<hidden>' is not a token of"),
    ({"mask_token_id": VOCABULARY}, f"mask_token_id must be a token id in .*got {VOCABULARY}"),
    ({"dataset": "other.jsonl"}, "prompt and response.*it has answer, question"),
    ({"dataset": "none.jsonl"}, r"none\.jsonl cannot be read: no such file"),
    ({"model": "/no/such/model"}, "model /no/such/model cannot be read"),
    ({"config": "none.yaml"}, r"config must be a readable YAML file, got .*none\.yaml"),
    ({"resume_from_checkpoint": "true"}, "has no complete checkpoint"),
    ({"resume_from_checkpoint": "model"}, r"has no trainer_state\.json: not of this run"),
]


@pytest.mark.parametrize(("keys", "message"), BAD, ids=[" ".join(keys) for keys, _ in BAD])
def test_bad_input_is_one_clear_line_before_any_work(
    folder, tmp_path, capsys, monkeypatch, keys, message
):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # never reached
    output = tmp_path / "out"
    keys = {"layer_fraction": None} | keys if "adapter" in keys else keys
    assert main(arguments(folder, output, **keys)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("memdlm: error: ")
    assert re.search(message, error), error
    assert not list(output.glob("*"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model must be one of llama, .*whose model_type is 'gpt2'"),
        ({"model_type": "nothing"}, "model .* cannot be read: .*nothing"),
        ({"model_type": "llada"}, "architectures of a config of type 'llada' must be one of"),
    ],
)
def test_a_model_of_no_known_family_is_an_error(folder, tmp_path, capsys, config, message):
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert main(arguments(folder, tmp_path / "out", model=tmp_path / "model")) == 2
    assert re.search(message, capsys.readouterr().err.strip().splitlines()[-1])


def sparse_config():
    return LLaDA2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        max_position_embeddings=64,
        pad_token_id=0,
        mask_token_id=1,
    )


def test_a_sparse_model_trains_in_blocks_with_an_outer_lora_on_its_experts(
    folder, tmp_path, capsys
):
    config = sparse_config()
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    keys = {"model": tmp_path / "model", "lora": "true", "lora_rank": 2, "block_size": 4}
    keys |= {"padding": "multiple", "pad_to_multiple_of": 8, "scope": "sample"}
    assert main(arguments(folder, tmp_path / "out", **keys)) == 0
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(saved["target_parameters"]) == {"experts.gate_up_proj", "experts.down_proj"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "out")
    trained = [
        p for name, p in adapted.named_parameters() if "experts" in name and "lora_B" in name
    ]
    assert len(trained) == 2 * 2 + 2 * 3  # stacked of two layers, and their shared experts
    assert all(parameter.any() for parameter in trained)
    bad = keys | {"lora_dropout": 0.1}
    assert main(arguments(folder, tmp_path / "other", **bad)) == 2
    assert "lora_dropout must be 0 where stacked experts get a LoRA" in capsys.readouterr().err


ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ALL_STACKED = {"experts.gate_up_proj", "experts.down_proj"}


@pytest.mark.parametrize(
    ("keys", "modules", "parameters"),
    [
        ({}, ALL_LINEAR, ALL_STACKED),
        ({"load_in_4bit": True}, ALL_LINEAR, set()),
        ({"lora_targets": ["q_proj"]}, {"q_proj"}, ALL_STACKED),
        ({"lora_targets": []}, set(), ALL_STACKED),
        ({"lora_target_parameters": ["experts.down_proj"]}, ALL_LINEAR, {"experts.down_proj"}),
        ({"lora_target_parameters": [], "lora_dropout": 0.1}, ALL_LINEAR, set()),
        ({"lora_target_parameters": [], "load_in_4bit": True}, ALL_LINEAR, set()),
        ({"lora_targets": ["q_proj"], "lora_target_parameters": []}, {"q_proj"}, set()),
    ],
)
def test_the_targets_of_the_outer_lora_are_chosen_apart(keys, modules, parameters):
    given = {"model": "m", "dataset": "d", "output_dir": "o", "lora": True, "use_cpu": True}
    config = AutoConfig.for_model(**sparse_config().to_dict())
    lora = _lora_config(make_run(given | keys).options, config)
    assert set(lora.target_modules) == modules
    assert set(lora.target_parameters or ()) == parameters
    with torch.device("meta"):
        adapted = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert any("experts.lora_A" in name or "experts.base" in name for name in names) == bool(
        parameters
    )
    assert any("self_attn" in name for name in names) == bool(modules)


@pytest.mark.parametrize("config", [sparse_config(), tiny_model().config])
def test_an_outer_lora_on_nothing_is_an_error(config):
    given = {"model": "m", "dataset": "d", "output_dir": "o", "lora": True, "use_cpu": True}
    given |= {"lora_targets": [], "lora_target_parameters": []}
    with pytest.raises(ValueError, match=r"lora_targets must name a layer .*, got \[\]"):
        _lora_config(make_run(given).options, config)


def test_a_word_without_a_key_is_an_error(capsys):
    assert main(["train", "model"]) == 2
    assert "expected --key value, got 'model'" in capsys.readouterr().err


def test_a_model_without_a_mask_token_is_an_error(folder, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer(mask_token=None).save_pretrained(tmp_path / "model")
    assert main(arguments(folder, tmp_path / "out", model=tmp_path / "model")) == 2
    error = capsys.readouterr().err
    assert "has no mask token, in its config or its tokenizer: set mask_token or" in error


def test_blocks_of_a_model_with_shifted_logits_are_refused(folder, tmp_path, capsys, monkeypatch):
    model = tiny_model()
    model.config.right_shift_logits = True
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # never reached
    keys = {"block_size": 4, "padding": "multiple", "pad_to_multiple_of": 8}
    assert main(arguments(folder, tmp_path / "out", model=tmp_path / "model", **keys)) == 2
    assert "block_size must be None" in capsys.readouterr().err


def test_the_models_own_mask_token_is_taken(folder, tmp_path, capsys):
    model = tiny_model()
    model.config.mask_token_id = VOCABULARY + 3
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert main(arguments(folder, tmp_path / "out", model=tmp_path / "model")) == 2
    assert f"got {VOCABULARY + 3}" in capsys.readouterr().err  # not the tokenizer's


@pytest.mark.parametrize("content", ["- a list\n", "a: [1\n", "1: 2\n"])
def test_a_config_that_is_no_mapping_is_an_error(folder, tmp_path, capsys, content):
    (tmp_path / "run.yaml").write_text(content)
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "run.yaml" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_is_an_error(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert main(arguments(folder, tmp_path / "file" / "out")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_earlier_runs_checkpoints_are_not_written_over(folder, tmp_path, capsys):
    (tmp_path / "checkpoint-5").mkdir()
    assert main(arguments(folder, tmp_path)) == 2
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err


def test_targets_that_match_no_module_are_an_error(folder, tmp_path, capsys):
    keys = {"lora": "true", "lora_targets": "[lm_head]"}
    assert main(arguments(folder, tmp_path / "out", **keys)) == 2
    assert "leave it out of the LoRA target modules" in capsys.readouterr().err


def test_resuming_from_another_models_or_runs_folder_is_an_error(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "one", save_steps=4)) == 0
    checkpoint = tmp_path / "one" / "checkpoint-4"
    for keys, message in [
        ({"inner_lr": 0.2}, "is another run's: its memory.inner_lr is 0.1, here it is 0.2"),
        ({"seed": 1}, "its seed is 42, here it is 1"),
        ({"lora": "true"}, "has no adapter_config.json"),
    ]:
        words = arguments(folder, tmp_path / "two", resume_from_checkpoint=checkpoint, **keys)
        assert main(words) == 2
        assert message in capsys.readouterr().err
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    words = arguments(folder, tmp_path / "two", resume_from_checkpoint=checkpoint)
    assert main(words) == 2
    assert "another model's: its hidden_size is 32, here it is 16" in capsys.readouterr().err


def test_the_options_of_a_run_are_typed():
    run = make_run(
        {"model": "m", "dataset": "d", "output_dir": "o", "learning_rate": 1, "use_cpu": True}
    )
    assert run.arguments.learning_rate == 1.0
    assert isinstance(run.arguments.learning_rate, float)
    assert run.memory == MemoryConfig()


# Stops dead after the fifth step, two after the checkpoint, and says so.
HANGING = """
import pathlib, sys, time
from memdlm.cli import main
from memdlm.trainer import MemDLMTrainer
step = MemDLMTrainer.training_step
def hanging_step(self, *args, **kwargs):
    if self.state.global_step == 5:
        pathlib.Path(sys.argv[1]).touch()
        time.sleep(600)
    return step(self, *args, **kwargs)
MemDLMTrainer.training_step = hanging_step
main(sys.argv[2:])
"""


def test_a_killed_run_resumes_on_the_uninterrupted_runs_loss_curve(folder, tmp_path):
    keys = {"max_steps": 8, "save_steps": 3, "lora": "true", "lora_dropout": 0.1}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    reached = tmp_path / "reached"
    words = [sys.executable, "-c", HANGING, str(reached), *arguments(folder, killed, **keys)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    assert main(arguments(folder, whole, **keys)) == 0
    while not reached.exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    # As if the kill had cut a later checkpoint short.
    (killed / "checkpoint-5").mkdir()
    assert main(arguments(folder, killed, resume_from_checkpoint="true", **keys)) == 0
    assert len(losses(whole)) == 8
    # Within one process they are equal (test_trainer); two may round differently.
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-5)


def test_env_tells_each_backend_of_each_op_and_why_one_is_refused(capsys):
    assert main(["env"]) == 0
    told = capsys.readouterr().out
    for op, reasons in list_backends("cpu").items():
        assert f"  {op}\n" in told
        for name, reason in reasons.items():
            assert re.search(rf"^  [> ] {name} +{re.escape(reason or 'ok')}$", told, re.M), (
                op,
                name,
            )
    assert "cuda_architectures" in told


def test_env_takes_no_options(capsys):
    assert main(["env", "--verbose"]) == 2
    assert "memdlm env takes no options, got '--verbose'" in capsys.readouterr().err
