"""`memdlm generate`: prompts from the command line, responses on stdout, the rest on stderr."""

import io
import json

import pytest
import torch

from memdlm.cli import main
from memdlm.demo.examples import BASE_FOLDER, build_examples, load_tokenizer
from memdlm.inference import load_checkpoint
from memdlm.sampler.command import prompt_tokens
from memdlm.sampler.stream import MASK, Stream, wrapped
from tests.trainer.trainer_case import tiny_model, tiny_tokenizer

CHAT = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}<eos> {% endif %}"
)


@pytest.fixture(scope="module")
def needles():
    """(prompt, value) of three questions."""
    examples = build_examples("validation", 3, 128, 1, recall_share=1.0, several_share=0.0)
    tokenizer = load_tokenizer()
    prompts = [
        [t for t, label in zip(e["input_ids"], e["labels"], strict=True) if label < 0]
        for e in examples
    ]
    return [
        (tokenizer.decode(prompt), example["values"][0])
        for prompt, example in zip(prompts, examples, strict=True)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small model with a chat template."""
    folder = tmp_path_factory.mktemp("generate")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(chat_template=CHAT).save_pretrained(folder)
    return folder


def generate(model, *words):
    return main(["generate", "--model", str(model), *map(str, words)])


def test_the_demo_finds_a_needle(needles, capsys):
    text, value = needles[0]
    assert generate(BASE_FOLDER, "--prompt", text, "--gen_length", 3) == 0
    captured = capsys.readouterr()
    assert captured.out.split()[0].rstrip(".") == value
    assert "3/3" in captured.err


def test_a_file_of_prompts_is_a_batch(needles, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    rows = [json.dumps({"prompt": text, "other": 1}) + "\n\n" for text, _ in needles]
    path.write_text("".join(rows), encoding="utf-8")
    # Two batches: a row's draws do not hang on the batch it is in.
    sampling = ("--max_new_tokens", 3, "--temperature", 0.7, "--json", "true")
    assert generate(BASE_FOLDER, "--prompt_file", path, "--batch_size", 2, *sampling) == 0
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in written] == [text for text, _ in needles]
    assert all(row["tokens"] <= 3 and row["steps"] == 3 for row in written)
    assert [row["response"].strip(" .") for row in written] == [value for _, value in needles]
    assert generate(BASE_FOLDER, "--prompt_file", path, *sampling) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == written


def test_several_responses_are_told_apart(needles, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text, _ in needles))
    assert generate(BASE_FOLDER, "--prompt_file", path, "--batch_size", 2, "--gen_length", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2] == ["# 0", "# 1", "# 2"]
    assert [line.strip(" .") for line in lines[1::2]] == [value for _, value in needles]


def test_a_text_file_is_one_prompt(needles, tmp_path, capsys):
    path = tmp_path / "prompt.txt"
    path.write_text(needles[1][0] + "\n", encoding="utf-8")
    assert generate(BASE_FOLDER, "--prompt_file", path, "--gen_length", 2) == 0
    assert needles[1][1] in capsys.readouterr().out


def test_the_stream_is_on_stderr_and_ends_with_the_answer(needles, capsys):
    assert (
        generate(BASE_FOLDER, "--prompt", needles[0][0], "--gen_length", 3, "--stream", "true") == 0
    )
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("step ")]
    assert [line.count(MASK) for line in lines] == [2, 1, 0]
    assert lines[-1] == "step 3: " + captured.out.strip()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_canvas_is_drawn_in_place(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "10")
    out = Terminal()
    stream = Stream(tiny_tokenizer(), 1, 2, out)
    stream.show(1, torch.tensor([[5, 6, *[1] * 30]]))
    first = out.getvalue()
    assert first.count(MASK) == 30
    assert first.count("\n") == 2
    assert "\x1b[1A" not in first
    stream.show(2, torch.tensor([[5, 6, 4, *[1] * 9]]))
    second = out.getvalue()[len(first) :]
    # Two lines up, clear, draw one.
    assert second.startswith("\x1b[2A\r\x1b[J")
    assert "alpha" in second
    assert second.count(MASK) == 9
    assert second.count("\n") == 1
    stream.close()
    assert out.getvalue().endswith("\x1b[1A\r\x1b[J")


def test_wide_characters_take_two_columns():
    assert wrapped("漢" * 19, 20) == ["漢" * 10, "漢" * 9]
    assert wrapped("one two three", 8) == ["one two", "three"]
    assert wrapped("e\u0301" * 8, 8) == ["e\u0301" * 8]
    assert wrapped("", 8) == [""]


def test_a_stream_is_closed_after_an_error(tiny, monkeypatch):
    closed = []
    monkeypatch.setattr("memdlm.sampler.stream.Stream.close", lambda self: closed.append(self))

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("memdlm.sampler.stream.Stream.show", broken)
    with pytest.raises(KeyboardInterrupt):
        generate(tiny, "--prompt", "one", "--gen_length", 3, "--stream", "true")
    assert len(closed) == 1


def test_a_prompt_has_the_chat_template_where_there_is_one():
    plain, chat = tiny_tokenizer(), tiny_tokenizer(chat_template=CHAT)
    own = plain("one two", add_special_tokens=False).input_ids
    template = plain("user : one two <eos>", add_special_tokens=False).input_ids
    assert prompt_tokens(plain, "one two", None) == own
    assert prompt_tokens(chat, "one two", None) == template
    assert prompt_tokens(chat, "one two", True) == template
    assert prompt_tokens(chat, "one two", False) == own
    with pytest.raises(ValueError, match="chat must be false: the tokenizer has no chat template"):
        prompt_tokens(plain, "one two", True)


def test_the_template_reaches_the_model(tiny, capsys):
    assert generate(tiny, "--prompt", "one two", "--gen_length", 6) == 0
    chat = capsys.readouterr().out
    assert (
        generate(tiny, "--prompt", "user : one two <eos>", "--chat=false", "--gen_length", 6) == 0
    )
    assert capsys.readouterr().out == chat


def test_help_tells_every_option_and_its_other_names(capsys):
    assert main(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    for word in (
        "--prompt_file:",
        "--save_memory:",
        "--threshold:",
        "--gen_length: max_new_tokens",
        "--num_to_transfer: min_reveal",
    ):
        assert word in text
    assert "--remasking: one of low_confidence, entropy, margin, random, origin" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "prompt or prompt_file must be given, got neither"),
        (["--prompt", "one", "--prompt_file", "x.txt"], "must be given, got both"),
        (["--prompt", "one", "--step", "3"], "unknown key 'step'; did you mean steps"),
        (
            ["--prompt", "one", "--steps", "many"],
            "steps must be a whole number or null, got 'many'",
        ),
        (["--prompt", "one", "--top_p", "0.9"], "top_p would not be read: temperature is 0"),
        (
            ["--prompt", "one", "--gen_length", "3", "--max_new_tokens", "3"],
            "must not both be given",
        ),
        (["--prompt", "one", "--save_memory", "m"], "save_memory would not be read"),
        (
            ["--prompt", "one", "--memory", "true", "--load_memory", "m"],
            "memory would not be read: load_memory is given",
        ),
        (["--prompt", "one", "--memory", "true"], "no memory in its memdlm.json"),
        (["--prompt", "one", "--load_memory", __file__], "no memory in its memdlm.json"),
        (["--prompt", "one", "--load_memory", "none/m"], "load_memory must be a file, got none/m"),
        (
            ["--prompt", "one", "--memory", "true", "--save_memory", "none/m"],
            "save_memory must be a file in a folder that exists, got none/m",
        ),
        (["--prompt", "one", "--budget_gib", "1"], "budget_gib would not be read: memory is false"),
        (
            ["--prompt", "one", "--memory", "true", "--budget_gib", "0"],
            "budget_gib must be a number above 0, got 0",
        ),
        (["--prompt", "one", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--prompt_file", "none.txt"], "prompt_file none.txt cannot be read"),
        (["--prompt_file", "data.csv"], "prompt_file must be a .txt or .jsonl file"),
        (["--prompt", "one <mask>", "--gen_length", "3"], "prompts must not hold the mask token"),
        (["--prompt", "one", "--gen_length", "100"], "at most 64 tokens together"),
        (
            ["--prompt", "one", "--block_length", "4", "--gen_length", "8", "--steps", "1"],
            "steps must be a multiple of the number of blocks, 2",
        ),
    ],
)
def test_a_mistake_is_one_line(tiny, capsys, words, message):
    assert generate(tiny, *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error = [line for line in captured.err.splitlines() if line.startswith("memdlm: error")]
    assert len(error) == 1
    assert message in error[0]


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("{\n", [], "line 1 is not JSON"),
        ('{"prompt": "one"}\n{"text": "one"}\n', [], "line 2 must hold a prompt that is text"),
        ("\n", [], "must hold at least one prompt, got none"),
        ('{"prompt": "one"}\n' * 2, ["--stream", "true"], "stream must be false for several"),
        (
            '{"prompt": "one"}\n' * 2,
            ["--batch_size", "1", "--memory", "true", "--save_memory", "m"],
            "batch_size must be at least the number of prompts, 2",
        ),
    ],
)
def test_a_bad_file_is_one_line(tiny, tmp_path, capsys, content, words, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    assert generate(tiny, "--prompt_file", path, *words) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def trained(tmp_path):
    """A small model that says it was trained with a memory, one that shows."""
    folder = tmp_path / "trained"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    memory = {"inner_lr": 3.0, "inner_max_norm": 10.0, "layer_fraction": 1.0, "rank": 4}
    (folder / "memdlm.json").write_text(json.dumps({"mask_token_id": 1, "memory": memory}))
    return folder


def test_a_memory_is_written_kept_and_read_again(trained, tmp_path, capsys):
    assert load_checkpoint(str(trained)).memory is not None
    asked = ("--prompt", "the magic number of one is", "--gen_length", 8)
    file = tmp_path / "memory.safetensors"
    outputs = []
    for memory in (
        (),
        ("--memory", "true"),
        ("--memory", "true", "--save_memory", file),
        ("--load_memory", file),
    ):
        assert generate(trained, *asked, *memory) == 0
        outputs.append(capsys.readouterr().out)
    without, *with_memory = outputs
    assert len(set(with_memory)) == 1
    assert with_memory[0] != without
    two = tmp_path / "two.jsonl"
    two.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert generate(trained, "--prompt_file", two, "--load_memory", file, "--gen_length", 8) == 2
    assert "a memory for each of 2 prompts, got 1" in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["one " * 70, ""])
def test_every_prompt_is_checked_before_anything_is_written(trained, tmp_path, capsys, bad):
    path, file = tmp_path / "prompts.jsonl", tmp_path / "m"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", bad)))
    asked = ("--prompt_file", path, "--gen_length", 4)
    for words in (
        ("--batch_size", 1),
        ("--memory", "true", "--save_memory", file),
    ):
        assert generate(trained, *asked, *words) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("for prompt 1" if bad else "in number 1") in captured.err
        assert not file.exists()


def test_a_memory_is_written_within_a_budget(trained, capsys):
    asked = ("--prompt", "the magic number of one is", "--gen_length", 8, "--memory", "true")
    assert generate(trained, *asked) == 0
    whole = capsys.readouterr().out
    assert generate(trained, *asked, "--budget_gib", 1) == 0
    assert capsys.readouterr().out == whole
    assert generate(trained, *asked, "--budget_gib", 1e-9) == 2
    assert "budget_gib must be at least" in capsys.readouterr().err
