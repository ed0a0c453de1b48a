"""The model "memdlm" of lm-evaluation-harness: through its own entry points, on small tasks."""

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.demo.examples import BASE_FOLDER
from memdlm.evaluation.likelihood import response_log_likelihood
from memdlm.evaluation.lm_eval import MemDLM, run_lm_eval
from memdlm.evaluation.lm_eval import run as run_module
from memdlm.evaluation.lm_eval.arguments import request_config
from memdlm.evaluation.options import EvalOptions
from memdlm.evaluation.run import run_eval
from memdlm.inference import load_checkpoint
from memdlm.sampler import SamplerConfig

BASE = str(BASE_FOLDER)
FACT = "The magic number for cedar is {}. The magic number for otter is {}."
QUESTION = "\nQuestion: What is the magic number for cedar?\nAnswer: The magic number for cedar is"
NUMBERS = [("4821", "9034"), ("1177", "5260"), ("3390", "8158")]
YAML = {
    "recall": """
task: memdlm_recall
output_type: generate_until
generation_kwargs: {do_sample: false, max_gen_toks: 8, until: ["."]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "choice": """
task: memdlm_choice
output_type: multiple_choice
doc_to_choice: "{{[' ' ~ value, ' ' ~ other, ' 0000']}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "text": """
task: memdlm_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The harness's manager of three tasks over local files."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"prompt": FACT.format(*pair) + QUESTION, "value": pair[0], "other": pair[1]}
        for pair in NUMBERS
    ]
    data = folder / "needles.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder}}}
test_split: test
"""
    for name, own in YAML.items():
        fields = "" if "doc_to_text" in own else 'doc_to_text: "{{prompt}}"\n'
        fields += "" if "doc_to_target" in own else 'doc_to_target: "{{value}}"\n'
        (folder / f"{name}.yaml").write_text(source + fields + own, encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def model():
    return MemDLM(BASE, batch_size=2, draws=4, dtype="float32")


def requests(*arguments):
    return [SimpleNamespace(args=own) for own in arguments]


def with_memory(monkeypatch):
    """Loaded checkpoints come with a memory, as if trained with one."""
    from memdlm.evaluation.lm_eval import model as module

    def load(*arguments, **options):
        checkpoint = load_checkpoint(*arguments, **options)
        values = {**vars(checkpoint), "memory": MemoryConfig(rank=4)}
        return type(checkpoint)(**values)

    monkeypatch.setattr(module, "load_checkpoint", load)


def test_the_harness_runs_every_kind_of_task(tasks):
    results = lm_eval.simple_evaluate(
        model="memdlm",
        model_args=f"pretrained={BASE},dtype=float32,draws=8,remasking=entropy",
        tasks=["memdlm_recall", "memdlm_choice", "memdlm_text"],
        task_manager=tasks,
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    found = results["results"]
    assert set(found) == {"memdlm_recall", "memdlm_choice", "memdlm_text"}
    # The demo's base copies needles, but for a digit: answers are numbers, cut before the stop, and
    # the likely choices are those that the text holds.
    answers = [sample["resps"][0][0] for sample in results["samples"]["memdlm_recall"]]
    assert all(re.fullmatch(r" \d+( and \d+)*", answer) for answer in answers), answers
    for sample in results["samples"]["memdlm_choice"]:
        value, other, absent = (resps[0][0] for resps in sample["resps"])
        assert max(value, other) > absent
    assert found["memdlm_text"]["word_perplexity,none"] > 1
    assert results["config"]["draws"] == 8


def test_the_command_line_of_the_harness_has_the_model(tasks, tmp_path, monkeypatch, capsys):
    words = ["--model", "memdlm", "--model_args", f"pretrained={BASE},draws=2", "--batch_size", "2"]
    words += ["--tasks", "memdlm_choice", "--limit", "1", "--output_path", str(tmp_path / "out")]
    words += ["--include_path", str(tasks.include_path), "--device", "cuda:0"]
    # The harness's own 15,000 files of tasks take it ten seconds to read.
    whole = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager,
        "__init__",
        lambda self, *own, **options: whole(self, *own, **options | {"include_defaults": False}),
    )
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    runpy.run_module("memdlm.evaluation.lm_eval", run_name="__main__")
    assert "memdlm_choice" in capsys.readouterr().out
    assert list((tmp_path / "out").rglob("results*.json"))


def test_loglikelihood_is_the_bound_in_the_order_of_the_requests(model):
    pairs = [("The magic number for", " cedar"), ("", "a b c d e"), ("One two three four", " five")]
    found = model.loglikelihood(requests(*pairs))
    prompts = [model.tok_encode(pairs[0][0]), [model.eot_token_id], model.tok_encode(pairs[2][0])]
    responses = [model.tok_encode(pair[1]) for pair in pairs]
    checkpoint = model.checkpoint
    own = response_log_likelihood(
        checkpoint.model,
        prompts,
        responses,
        mask_token_id=checkpoint.mask_token_id,
        pad_token_id=checkpoint.pad_token_id,
        draws=4,
    )
    assert [value for value, _ in found] == pytest.approx(own.mean.tolist(), rel=1e-5)
    assert [is_greedy for _, is_greedy in found] == [False] * 3


def test_greedy_is_what_the_sampler_writes(model, monkeypatch):
    monkeypatch.setattr(model, "check_greedy", True)
    prompt = FACT.format(*NUMBERS[0]) + QUESTION
    (written,) = model.generate_until(requests((prompt, {"max_gen_toks": 3, "do_sample": False})))
    tokens = model.tok_encode(prompt)
    config = SamplerConfig(max_new_tokens=3, stop_at_end=False)
    (own,) = model.sampler.generate([tokens], config).responses
    assert written == model.tokenizer.decode(own)
    other = [*own[:-1], own[-1] + 1]
    greedy = [
        is_greedy
        for _, is_greedy in model._loglikelihood_tokens(
            [((prompt, "a"), tokens, own), ((prompt, "b"), tokens, other)]
        )
    ]
    assert greedy == [True, False]


def test_rolling_sums_windows_that_fit(model, monkeypatch):
    text = " ".join(f"word {number}" for number in range(12))
    (whole,) = model.loglikelihood_rolling(requests((text,)))
    monkeypatch.setattr(type(model), "max_length", property(lambda self: 7))
    (cut,) = model.loglikelihood_rolling(requests((text,)))
    tokens = model.tok_encode(text)
    own = response_log_likelihood(
        model.checkpoint.model,
        [[] for _ in range(0, len(tokens), 7)],
        [tokens[first : first + 7] for first in range(0, len(tokens), 7)],
        mask_token_id=model.checkpoint.mask_token_id,
        pad_token_id=model.checkpoint.pad_token_id,
        draws=4,
    )
    assert cut == pytest.approx(own.mean.sum().item(), rel=1e-5)
    assert cut != pytest.approx(whole, rel=1e-3)


def test_answers_stop_before_the_first_stop_and_keep_their_order(model):
    prompts = [FACT.format(*pair) + QUESTION for pair in NUMBERS]
    prompts[1] = "Some other text comes first. " + prompts[1]
    plain = {"do_sample": False, "max_gen_toks": 8}
    whole = model.generate_until(requests(*((prompt, plain) for prompt in prompts)))
    digit = whole[0].strip()[2]
    stopped = model.generate_until(
        requests(*((prompt, {**plain, "until": [digit, "never"]}) for prompt in prompts))
    )
    assert stopped == [text.partition(digit)[0] for text in whole]
    assert stopped[0] != whole[0]
    alone = [model.generate_until(requests((prompt, plain)))[0] for prompt in prompts]
    assert alone == whole


def test_a_stop_may_be_a_special_token(model):
    eos = model.tokenizer.eos_token
    tokens = [*model.tok_encode("one two"), model.eot_token_id, *model.tok_encode(" three")]
    assert model._text(tokens, [eos]) == "one two"
    assert model._text(tokens, []) == "one two three"


def test_samples_depend_on_the_seed_and_the_request_alone(model):
    arguments = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 6}
    both = requests(("The cat sat on", arguments), ("It was a long time ago", arguments))
    first = model.generate_until(both)
    assert model.generate_until(both) == first
    other = requests(*(((own.args[0], {**own.args[1], "seed": 5})) for own in both))
    assert model.generate_until(other) != first
    # Not on those beside it, nor on its place among them.
    assert model.generate_until(both[:1]) == first[:1]
    assert model.generate_until(both[1:]) == first[1:]
    assert model.generate_until(both[::-1]) == first[::-1]
    again = model.generate_until([both[1], both[0], both[1]])
    assert again[:2] == first[::-1]
    assert again[2] != again[0]


def test_the_harness_caches_what_was_answered(model, tmp_path):
    cached = CachingLM(model, str(tmp_path / "cache.db"))
    asked = requests(("The magic number for", " cedar"), ("One two", " three"))
    first = cached.loglikelihood(asked)
    assert [model.cache_hook.dbdict is not None, len(cached.dbdict)] == [True, 2]
    for key in list(cached.dbdict):
        cached.dbdict[key] = (-1.0, True)
    assert cached.loglikelihood(asked) == [(-1.0, True)] * 2 != first
    model.set_cache_hook(type(model.cache_hook)(None))


def test_prompts_that_are_too_long_lose_their_first_tokens(model, caplog):
    words = "alpha beta gamma " * 600
    with caplog.at_level("WARNING"):
        (long,) = model.generate_until(requests((words + QUESTION, {"max_gen_toks": 4})))
    assert "1 of 1 prompts lost their first tokens" in caplog.text
    tokens = model.tok_encode(words + QUESTION)[-1020:]
    (own,) = model.sampler.generate([tokens], SamplerConfig(max_new_tokens=4)).responses
    assert long == model.tokenizer.decode(own)
    with pytest.raises(ValueError, match="must leave room for a prompt in 1024 positions"):
        model.generate_until(requests(("a", {"max_gen_toks": 1024})))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"max_new_tokens": 256}),
        ({"max_gen_toks": 30, "until": [], "do_sample": False}, {"max_new_tokens": 30}),
        ({"max_tokens": 9, "temperature": 1, "do_sample": False}, {"max_new_tokens": 9}),
        ({"do_sample": True}, {"max_new_tokens": 256, "temperature": 1.0}),
        (
            {"temperature": 0.5, "top_p": 1.0, "num_beams": 1},
            {"max_new_tokens": 256, "temperature": 0.5},
        ),
        (
            {"gen_length": 64, "alg": "entropy"},
            {"max_new_tokens": 64, "remasking": "entropy", "reveal": "time_grid"},
        ),
    ],
)
def test_generation_arguments_become_options_of_the_sampler(arguments, expected):
    assert request_config(arguments, {}, 256) == SamplerConfig(**expected)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"top_p": 0.9, "do_sample": False}, "top_p would not be read"),
        ({"max_gen_toks": 4, "gen_length": 8}, "must not both be given"),
        ({"num_beams": 4}, "num_beams"),
    ],
)
def test_generation_arguments_that_mean_nothing_are_refused(model, arguments, named):
    with pytest.raises(ValueError, match=named):
        model.generate_until(requests(("a", arguments)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tempereture": 1}, "unknown option 'tempereture'"),
        ({"temperature": 1.0}, "temperature must not be an argument of the model"),
        ({"draws": 3}, "draws must be 1 or an even number"),
        ({"batch_size": "auto"}, "batch_size must be a whole number, got 'auto'"),
        ({"memory": True}, "trained with a memory"),
        ({"budget_gib": 1.0}, "budget_gib would not be read"),
        ({"remasking": "best"}, "remasking must be one of"),
    ],
)
def test_arguments_of_the_model_are_checked(options, named):
    with pytest.raises(ValueError, match=named):
        MemDLM(BASE, **options)


def test_a_memory_of_the_context_changes_both_answers(model, monkeypatch):
    with_memory(monkeypatch)
    remembers = MemDLM(BASE, batch_size=2, draws=4, dtype="float32", memory=True)
    before = {n: p.clone() for n, p in remembers.checkpoint.model.named_parameters()}
    pairs = requests(("The magic number for cedar is", " 4821"), ("One two three", " four"))
    on = remembers.loglikelihood(pairs)
    off = model.loglikelihood(pairs)
    assert all(a[0] != pytest.approx(b[0], rel=1e-4) for a, b in zip(on, off, strict=True))
    # Each reads its own memory: a batch of two answers as two batches of one.
    alone = [remembers.loglikelihood([own])[0][0] for own in pairs]
    assert [value for value, _ in on] == pytest.approx(alone, rel=1e-3)
    prompts = [FACT.format(*pair) + QUESTION for pair in NUMBERS[:2]]
    asked = requests(*((prompt, {"max_gen_toks": 4}) for prompt in prompts))
    tokens = [remembers.tok_encode(prompt) for prompt in prompts]
    with remembers.memory.adapt(tokens):
        own = remembers.sampler.generate(tokens, SamplerConfig(max_new_tokens=4)).responses
    assert remembers.generate_until(asked) == [model.tokenizer.decode(each) for each in own]
    with pytest.raises(ValueError, match="memory must be false for tasks of rolling"):
        remembers.loglikelihood_rolling(requests(("text",)))
    for name, parameter in remembers.checkpoint.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_chat_template_is_applied(model):
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    model.tokenizer.chat_template = template
    try:
        history = [{"role": "user", "content": "Hello"}]
        assert model.apply_chat_template(history) == "[user]Hello[assistant]"
        history += [{"role": "assistant", "content": "Answer:"}]
        text = model.apply_chat_template(history, add_generation_prompt=False)
        assert text == "[user]Hello[assistant]Answer:"
        assert model.chat_template(True) == template
    finally:
        model.tokenizer.chat_template = None
    assert model.tokenizer_name


def test_ruler_runs_without_a_download(model, tmp_path, monkeypatch):
    # Every file of its tasks includes the needles', which sort a list for 20 seconds at import.
    needles = SimpleNamespace(generate_samples=None, get_haystack=None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.ruler.prepare_niah", needles)
    results = run_lm_eval(
        model,
        "ruler_cwe",
        out=tmp_path / "out",
        limit=2,
        sampler={"steps": 2, "max_new_tokens": 8},
        length=1024,
    )
    (metrics,) = results.values()
    assert 0 <= metrics["1024,none"] <= 1
    assert metrics["sample_len"] == 2
    assert not [key for key in metrics if key.startswith("4096")]
    written = json.loads((tmp_path / "out" / "lm_eval.json").read_text(encoding="utf-8"))
    arguments = written["configs"]["ruler_cwe"]["generation_kwargs"]
    assert (arguments["steps"], arguments["max_gen_toks"]) == (2, 8)


@pytest.mark.parametrize(
    ("task", "error"),
    [
        ("babilong_qa1", ConnectionError("Couldn't reach 'RMT-team/babilong' on the Hub")),
        ("longbench_lcc", ImportError("Please install jieba")),
        ("ruler_qa_squad", LookupError("\n****\n  Resource punkt not found\n")),
    ],
)
def test_what_cannot_be_fetched_is_one_error(model, task, error, tmp_path, monkeypatch):
    def fail(self, names):
        raise error

    monkeypatch.setattr(TaskManager, "load", fail)
    length = None if "long" in task else 1024
    with pytest.raises(ValueError, match=task) as raised:
        run_lm_eval(model, task, out=tmp_path, limit=1, sampler={}, length=length)
    (line,) = (line.strip() for line in str(error).splitlines() if "*" not in line and line)
    assert str(raised.value).endswith(f"could not be fetched: {line}")


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("ruler", {}, "ruler is of 4096 tokens if no length is given"),
        ("ruler", {"length": 2048}, "at most the model's 1024 positions, got 2048"),
        ("babilong", {"length": 1000}, "multiples of 1024 for babilong, got 1000"),
        ("longbench", {"chat": True}, "chat must be false"),
        ("ruler_nothing", {}, "must be of lm-evaluation-harness, got 'ruler_nothing'"),
        ("longbench", {"length": 1024}, "length would not be read: task is longbench"),
    ],
)
def test_bad_requests_of_the_harness_are_refused(model, task, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_lm_eval(model, task, out=tmp_path / "out", limit=1, sampler={}, **options)
    assert not (tmp_path / "out").exists()


def test_babilong_is_run_at_a_length(model, tmp_path, monkeypatch):
    asked = []

    def evaluate(*, model, tasks, task_manager, **options):
        asked.append((tasks, task_manager.metadata["max_seq_lengths"]))
        return {"results": {"babilong_qa1": {"acc,none": 1.0}}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    monkeypatch.setattr(MemDLM, "max_length", 4096)
    for task in ("babilong", "babilong_qa1"):
        for length in (1024, 4096):
            results = run_lm_eval(model, task, out=tmp_path, limit=1, sampler={}, length=length)
            assert set(results) == {f"babilong_qa1 {length // 1024}k"}
    groups = [(["babilong_longctx"], "1k"), (["babilong_longctx"], "4k")]
    assert asked == [*groups, (["babilong_qa1"], "1k"), (["babilong_qa1"], "4k")]


def test_an_evaluation_leaves_rolling_tasks_out_of_the_memorys_arm(tasks, tmp_path, monkeypatch):
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(BASE_FOLDER, folder)
    method = {
        "diffusion": dataclasses.asdict(DiffusionConfig()),
        "memory": dataclasses.asdict(MemoryConfig(rank=4)),
    }
    (folder / "memdlm.json").write_text(json.dumps(method), encoding="utf-8")
    monkeypatch.setattr(run_module, "_manager", lambda folder, metadata: tasks)
    monkeypatch.setitem(MemDLM.__init__.__kwdefaults__, "draws", 2)
    options = {"model": str(folder), "tasks": "none", "out": str(out), "device": "cpu"}
    named = EvalOptions(**options, lm_eval="memdlm_text,memdlm_choise", count=2)
    with pytest.raises(ValueError, match="must be of lm-evaluation-harness, got 'memdlm_choise'"):
        run_eval(named)
    assert not out.exists()
    table = run_eval(EvalOptions(**options, lm_eval="memdlm_text,memdlm_choice", count=2))
    assert re.search(r"\| memdlm_text \| word_perplexity \| 2 \| [\d.]+[^|]*\|  \|", table)
    assert re.search(r"\| memdlm_choice \| acc \| 2 \| [\d.]+ ± [\d.]+ \| [\d.]+", table)
    assert "- train & inference, memdlm_text: left out, memory must be false" in table


def test_folders_of_tasks_are_where_the_harness_has_them():
    names = ("ruler", "niah_single_1", "babilong", "babilong_longctx", "longbench", "longbench_lcc")
    for name in names:
        where = run_module._where(run_module._folder(name))
        assert where, name
        assert name in TaskManager(**where).all_tasks


def test_without_the_harness_the_error_names_the_extra():
    code = "import sys; sys.modules['lm_eval'] = None; import memdlm.evaluation.lm_eval"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install memdlm-kernels[eval]" in done.stderr.splitlines()[-1]
