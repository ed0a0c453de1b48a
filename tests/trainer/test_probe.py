"""`memdlm probe`: its figures against dense and plain computations, and the command."""

import contextlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from memdlm.backbone import Backbone
from memdlm.cli import main
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.demo.examples import BASE_FOLDER, load_tokenizer
from memdlm.evaluation.held_out import no_memory
from memdlm.inference import Checkpoint
from memdlm.models import LLaDA2MoeConfig
from memdlm.probe import retrieval
from memdlm.probe.anatomy import (
    anatomy_rows,
    effective_rank,
    measure_anatomy,
    projections,
    singular_values,
)
from memdlm.probe.options import ProbeOptions
from memdlm.probe.questions import KINDS, OTHER_VALUE, STATEMENT, VALUE, build_questions, find
from memdlm.probe.report import difference, mean_and_error, probe_tables
from memdlm.probe.retrieval import OFF, UNRELATED, WITH, WITHOUT, answer, retrieval_rows, settings
from memdlm.probe.token_loss import masked_counts, masked_nll, measure_tokens, partition, token_rows
from memdlm.prompt_memory import PromptMemory
from tests.families import make_family_model, per_linear
from tests.tiny import MASK, PAD, make_model
from tests.trainer.memory_case import PROMPTS, logits, make_memory
from tests.trainer.trainer_case import VOCABULARY as WORD_COUNT
from tests.trainer.trainer_case import tiny_model, tiny_tokenizer

DOCS = Path(__file__).parents[2] / "docs"
OPTIONS = {"rank": 4, "layer_fraction": 0.5}
SCALE = 64.0 / 4
IDS = {"mask_token_id": MASK, "pad_token_id": PAD}


def family_model(family, **options):
    make = make_model if family == "llama" else lambda **own: make_family_model(family, **own)
    return make(**options).eval()


def dense_updates(memory):
    """(layer, prompt) to scale * B A, or delta, of every linear layer; written last."""
    found = {}
    for name, tensors in memory.fast_weights.named().items():
        for prompt in range(len(tensors[0])):
            for linear, own in per_linear(name, [each[prompt] for each in tensors]).items():
                found[linear, prompt] = own[0] if len(own) == 1 else SCALE * own[1] @ own[0]
    return found


def dense_weight(model, name):
    linear = Backbone(model).decoder.layers
    if ".experts." not in name:
        return linear.get_submodule(name).weight
    layer, expert, kind = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)", name).groups()
    stacked = linear.get_submodule(layer)
    if kind == "down_proj":
        return stacked.down_proj[int(expert)]
    return stacked.gate_up_proj[int(expert)].chunk(2)[kind == "up_proj"]


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "llada_moe"])
def test_norms_and_spectra_are_those_of_the_dense_updates(family, adapter):
    model = family_model(family)
    memory = make_memory(model, layer_fraction=0.5, adapter=adapter)
    config = MemoryConfig(**OPTIONS, adapter=adapter)
    parts = {own.name: own for own in measure_anatomy(memory, config, PROMPTS, len(PROMPTS))}
    with memory.adapt(PROMPTS):
        updates = dense_updates(memory)
    assert len(updates) == sum(own.update.numel() for own in parts.values())
    for (name, prompt), update in updates.items():
        layer, _, kind = name.rpartition(".")
        expert = 0
        if ".experts." in name:
            layer, _, expert = layer.rpartition(".")
        own = parts[f"{layer}.{kind}"]
        assert own.experts == (".experts." in name)
        singular = torch.linalg.svdvals(update)
        mine = own.singular[prompt, int(expert)]
        torch.testing.assert_close(mine, singular[: len(mine)], rtol=1e-9, atol=1e-12)
        assert not singular[len(mine) :].gt(1e-12).any()
        torch.testing.assert_close(own.update[prompt, int(expert)], update.norm())
        torch.testing.assert_close(own.weight[int(expert)], dense_weight(model, name).norm())


def test_batches_do_not_change_the_anatomy():
    memory = make_memory(family_model("llada_moe"), layer_fraction=0.5)
    together, apart = (
        measure_anatomy(memory, MemoryConfig(**OPTIONS), PROMPTS, size) for size in (3, 2)
    )
    for own, other in zip(together, apart, strict=True):
        for name in ("update", "moved", "singular"):
            torch.testing.assert_close(getattr(own, name), getattr(other, name))


def test_the_change_of_A_is_from_its_draw():
    memory = make_memory(family_model("llama"), layer_fraction=0.5)
    parts = measure_anatomy(memory, MemoryConfig(**OPTIONS), PROMPTS, 3)
    with memory.adapt(PROMPTS):
        written = [tensors[0].clone() for tensors in memory.fast_weights.named().values()]
    memory.fast_weights.reset(memory.inner_batch(PROMPTS)["memory_seed"])
    drawn = [tensors[0] for tensors in memory.fast_weights.named().values()]
    for own, after, before in zip(parts, written, drawn, strict=True):
        naive = [((a - b).norm() / b.norm()).item() for a, b in zip(after, before, strict=True)]
        assert own.moved[:, 0].tolist() == pytest.approx(naive)
        assert min(naive) > 0


def test_only_experts_that_tokens_came_to_were_written():
    model = family_model("llada_moe")
    memory = make_memory(model, layer_fraction=0.5)
    parts = measure_anatomy(memory, MemoryConfig(**OPTIONS), PROMPTS[:1], 1)
    states = memory.inner_batch(PROMPTS[:1])["trajectory"]
    own = [part for part in parts if part.experts]
    assert own
    for part in own:
        assert not ((part.update > 0) & (part.routed == 0)).any()
        last = part.name.startswith("3.")
        # The last layer runs the loss rows alone.
        rows = sum(state["rows"].shape[1] if last else len(PROMPTS[0]) for state in states)
        assert part.routed.sum() == rows * model.config.num_experts_per_tok
    unread = next(part for part in own if part.name == "3.mlp.experts.down_proj")
    assert torch.equal(unread.update > 0, unread.routed > 0)


def test_a_blank_memory_has_no_update_and_changes_nothing():
    model = family_model("llama")
    memory = make_memory(model, layer_fraction=0.5)
    store = memory.fast_weights

    @contextlib.contextmanager
    def blank(prompts):
        store.reset(memory.inner_batch(prompts)["memory_seed"])
        with store.reading():
            yield

    with blank(PROMPTS):
        for own in projections(store.modules, store.named()):
            singular = singular_values(own.factors, SCALE)
            assert not singular.any()
            assert not effective_rank(singular).any()
    checkpoint = make_checkpoint(model)
    off, on = (measure_tokens(checkpoint, PROMPTS, each, 0.2, 3, 0) for each in (no_memory, blank))
    for before, after in zip(off, on, strict=True):
        assert torch.equal(before, after)


def test_the_effective_rank():
    values = torch.tensor([[1.0, 1, 1, 0], [5, 0, 0, 0], [0, 0, 0, 0], [2, 1, 0, 0]])
    mixed = math.exp(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))
    torch.testing.assert_close(effective_rank(values), torch.tensor([3.0, 1.0, 0.0, mixed]))


def test_the_rows_of_experts_are_those_of_a_loop():
    model = family_model("llada_moe")
    memory = make_memory(model, layer_fraction=0.5)
    parts = measure_anatomy(memory, MemoryConfig(**OPTIONS), PROMPTS, 3)
    rows = anatomy_rows("m", parts)
    with memory.adapt(PROMPTS):
        updates = dense_updates(memory)
    for row in (row for row in rows if row["measure"] == "expert"):
        layer, _, kind = row["projection"].rpartition(".")
        name = f"{layer}.{row['expert']}.{kind}"
        norms = [updates[name, prompt].norm().item() for prompt in range(3)]
        weight = dense_weight(model, name).norm().item()
        assert row["relative"] == pytest.approx(sum(norms) / 3 / weight, rel=1e-4)
        assert row["written"] == pytest.approx(sum(norm > 0 for norm in norms) / 3, rel=1e-4)
    whole = next(row for row in rows if row["projection"] == "3.mlp.experts.up_proj")
    names = [f"3.mlp.experts.{expert}.up_proj" for expert in range(6)]
    square = sum(updates[name, 1].norm() ** 2 for name in names)
    below = sum(dense_weight(model, name).norm() ** 2 for name in names)
    assert whole["relative_of_prompts"][1] == pytest.approx(
        (square / below).sqrt().item(), rel=1e-4
    )
    shares = [row["routed"] for row in rows if row["measure"] == "expert"]
    assert sum(shares) == pytest.approx(len([own for own in parts if own.experts]), rel=1e-3)


def make_checkpoint(model, memory=None, tokenizer=None):
    class Tokenizer:
        pad_token_id = PAD

    own = tokenizer or Tokenizer()
    return Checkpoint(model, own, MASK, DiffusionConfig(), memory, "some/folder")


@pytest.mark.parametrize(("length", "ratio"), [(10, 0.2), (7, 0.3), (1, 0.2), (5, 1.0), (3, 0.01)])
def test_a_partition_masks_every_token_once(length, ratio):
    masks = partition(length, ratio, np.random.default_rng(0))
    assert np.array_equal(sum(mask.astype(int) for mask in masks), np.ones(length))
    assert len(masks) == min(length, math.ceil(1 / ratio))
    sizes = [int(mask.sum()) for mask in masks]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("family", ["llama", "dream", "llada_moe"])
@torch.no_grad()
def test_the_nll_of_tokens_is_that_of_the_model(family):
    model = family_model(family)
    generator = np.random.default_rng(1)
    masks = [generator.random(len(prompt)) < 0.4 for prompt in PROMPTS]
    masks[1][:] = False
    found = masked_nll(Backbone(model), PROMPTS, masks, **IDS)
    for prompt, mask, nll in zip(PROMPTS, masks, found, strict=True):
        noisy = [MASK if hidden else token for token, hidden in zip(prompt, mask, strict=True)]
        log_p = logits(model, noisy)[0].log_softmax(-1)
        for place, token in enumerate(prompt):
            row = max(place - 1, 0) if family == "dream" else place
            plain = -log_p[row, token].item() if mask[place] else math.nan
            assert nll[place].item() == pytest.approx(plain, nan_ok=True)


def test_the_nll_of_a_token_is_its_mean_over_the_masks_under_its_own_memory():
    model = family_model("llama")
    memory = make_memory(model, layer_fraction=0.5)
    checkpoint = make_checkpoint(model)
    together = measure_tokens(checkpoint, PROMPTS, memory.adapt, 0.3, 3, 5)
    generator = np.random.default_rng([5, 1])
    masks = [mask for _ in range(2) for mask in partition(len(PROMPTS[1]), 0.3, generator)]
    with memory.adapt([PROMPTS[1]], merge=False):
        single = [masked_nll(Backbone(model), PROMPTS[1:2], [mask], **IDS)[0] for mask in masks]
    torch.testing.assert_close(together[1], torch.stack(single).nansum(0) / 2)


def test_tokens_that_the_memory_was_written_to_predict():
    memory = make_memory(family_model("llama"), inner_steps=2, prompt_ratio=0.5)
    counts = masked_counts(memory, PROMPTS, MASK)
    states = memory.inner_batch(PROMPTS)["trajectory"]
    for row, own in enumerate(counts):
        for place, count in enumerate(own.tolist()):
            assert count == sum(int(state["input_ids"][row, place] == MASK) for state in states)
        assert own.max() == 2
        assert (own > 0).sum() == min(len(own), int(1.5 * (own == 2).sum()))


def test_rows_of_kinds():
    off = [torch.tensor(own, dtype=torch.float64) for own in ([1.0, 2.0, 3.0], [4.0, 6.0])]
    on = [torch.tensor(own, dtype=torch.float64) for own in ([0.5, 2.5, 3.0], [4.0, 5.0])]
    masked = [torch.tensor([1, 0, 2]), torch.tensor([0, 0])]
    rows = token_rows("m", [["a", "a", "a"], ["a", "b"]], off, on, masked)
    found = {(row["kind"], row["written"]): row for row in rows}
    assert set(found) == {("a", False), ("a", True), ("b", False)}
    assert found["a", True]["change_of_prompts"] == [-0.25, None]
    assert found["a", True]["fell"] == 0.5
    assert found["a", False]["change_of_prompts"] == [0.5, 0.0]
    assert (found["a", False]["off"], found["a", False]["on"]) == (3.0, 3.25)
    assert (found["b", False]["tokens"], found["b", False]["fell"]) == (1, 1.0)


QUESTIONS = build_questions(12, 128, 0)


def test_the_needle_is_taken_out_and_nothing_else():
    tokenizer = load_tokenizer()
    for own in QUESTIONS:
        assert len(own.without) == len(own.prompt) == len(own.unrelated) == len(own.kinds)
        assert len(own.prompt) + len(own.response) == 128
        assert len(find(own.prompt, own.value)) == 1
        assert not find(own.without, own.value)
        changed = [kind in (VALUE, STATEMENT) for kind in own.kinds]
        for token, other, may_change in zip(own.prompt, own.without, changed, strict=True):
            assert token == other or may_change
        statement = tokenizer.decode(
            [token for token, own_kind in zip(own.prompt, changed, strict=True) if own_kind]
        )
        key, value = re.fullmatch(r" The magic number for (\w+) is (\d{4})\.", statement).groups()
        for text in map(tokenizer.decode, (own.prompt, own.without)):
            assert text.endswith(f"Answer: The magic number for {key} is")
        assert f"{key} is {value}" not in tokenizer.decode(own.without)
        assert tokenizer.decode(own.value) == f" {value}"
        assert tokenizer.decode(own.response).startswith(f" {value}.")


def test_every_token_has_its_kind():
    tokenizer = load_tokenizer()
    for own in QUESTIONS:
        assert set(own.kinds) == set(KINDS)
        values = [t for t, kind in zip(own.prompt, own.kinds, strict=True) if kind == OTHER_VALUE]
        assert re.fullmatch(r"( \d{4}){2}", tokenizer.decode(values))
        assert [tokenizer.decode(value) for value in own.other_values] == re.findall(
            r" \d{4}", tokenizer.decode(values)
        )
        asked = [t for t, kind in zip(own.prompt, own.kinds, strict=True) if kind == "question"]
        assert tokenizer.decode(asked).startswith("\nQuestion: What")
        rest = [t for t, kind in zip(own.prompt, own.kinds, strict=True) if kind == "text"]
        assert "magic number" not in tokenizer.decode(rest)


def test_the_questions_are_the_same_again_and_others_with_another_seed():
    assert build_questions(12, 128, 0) == QUESTIONS
    assert build_questions(3, 128, 0) == QUESTIONS[:3]
    assert build_questions(3, 128, 1)[0].prompt != QUESTIONS[0].prompt


def copying(_, ids, places, canvas_block=None):
    """A reader that finds the value of the needle where it stands in the context."""
    found = torch.zeros(len(ids), places.shape[1], 4096)
    for row, own in enumerate(ids.tolist()):
        for question in QUESTIONS:
            if own[: len(question.prompt)] == question.prompt:
                found[row, torch.arange(2), torch.tensor(question.value)] = 20.0
    return found


def test_the_arms_read_one_context_under_the_memory_of_another(monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(BASE_FOLDER).eval()
    config = MemoryConfig(rank=2, layer_fraction=0.25)
    checkpoint = Checkpoint(model, load_tokenizer(), 1, DiffusionConfig(), config, "some/folder")
    monkeypatch.setattr(retrieval, "token_logits", copying)
    written = []

    @contextlib.contextmanager
    def recording(self, prompts):
        written.append(list(prompts))
        yield

    monkeypatch.setattr(PromptMemory, "adapt", recording)
    questions = QUESTIONS[:3]
    rows = retrieval_rows("m", checkpoint, config, questions, 2, 0)
    arms = [(row["setting"], row["memory"], row["context"]) for row in rows]
    assert arms[:2] == [("as trained", OFF, WITH), ("as trained", OFF, WITHOUT)]
    each = [(WITH, WITH), (WITH, WITHOUT), (WITHOUT, WITHOUT), (UNRELATED, WITHOUT)]
    assert arms[2:] == [(name, *arm) for name in settings(config) for arm in each]
    for row in rows:
        assert row["right"] == [int(row["context"] == WITH)] * 3
        # Where all logits are equal but the mask token's, it is the last of them.
        assert row["rank"] == [1.0 if row["context"] == WITH else 4095.0] * 3
    sources = [[q.prompt for q in questions], [q.without for q in questions]]
    sources.append([q.unrelated for q in questions])
    batches = [part for own in sources for part in (own[:2], own[2:])]
    assert written == batches * len(settings(config))


@torch.no_grad()
def test_an_answer_is_that_of_the_model_under_the_memory():
    model = AutoModelForCausalLM.from_pretrained(BASE_FOLDER).eval()
    config = MemoryConfig(rank=2, layer_fraction=0.25, inner_lr=2.0)
    checkpoint = Checkpoint(model, load_tokenizer(), 1, DiffusionConfig(), config, "some/folder")
    memory = PromptMemory.of(checkpoint)
    own, prompts = QUESTIONS[:2], [q.prompt for q in QUESTIONS[:2]]
    without = [q.without for q in own]
    (found,) = answer(checkpoint, own, [without], prompts, memory.adapt, 2)
    (off,) = answer(checkpoint, own, [without], prompts, no_memory, 2)
    canvas = torch.tensor([[*q.without, *[1] * len(q.response)] for q in own])
    with memory.adapt(prompts):
        plain = model(canvas, is_causal=False, use_cache=False).logits.double()
    plain[..., 1] = -torch.inf
    for row, question in enumerate(own):
        at = plain[row, [len(question.prompt), len(question.prompt) + 1]]
        log_p = at.log_softmax(-1)
        nll = [-log_p[torch.arange(2), v].mean().item() for v in question.other_values]
        assert found.others[row].tolist() == pytest.approx(nll, rel=1e-4)
        nll = -log_p[torch.arange(2), question.value].mean().item()
        assert found.nll[row].item() == pytest.approx(nll, rel=1e-4)
        ranks = [int((at[i] > at[i, token]).sum()) + 1 for i, token in enumerate(question.value)]
        assert found.rank[row] == sum(ranks) / 2
        assert found.right[row] == (ranks == [1, 1])
    assert not torch.allclose(found.nll, off.nll)


def test_the_settings_store_more():
    memory = MemoryConfig(inner_lr=0.2, inner_epochs=2, prompt_ratio=0.7)
    own = list(settings(memory).values())
    assert own[0] == memory
    assert [each.inner_epochs for each in own] == [2, 16, 2, 16, 16]
    assert [each.inner_lr for each in own] == pytest.approx([0.2, 0.2, 2.0, 2.0, 2.0])
    assert own[-1].prompt_ratio == 0.7


def test_means_errors_and_differences():
    mean, error = mean_and_error([[1.0, None, 4.0], [3.0, None, 6.0]])
    assert (mean, error) == (3.5, pytest.approx(3 / math.sqrt(2) / math.sqrt(2)))
    assert math.isnan(mean_and_error([[1.0]])[1])
    rows = [{"model": m, "nll": nll} for m, nll in (("a", [1.0, 2.0]), ("b", [3.0, 4.0]))]
    others = [{"model": "b", "nll": [1.0, 1.0]}, {"model": "a", "nll": [1.0, 1.0]}]
    assert difference(rows, others) == (1.5, pytest.approx(0.5))
    assert difference(rows, others, [0])[0] == 1.0


def test_the_table_of_keys():
    head = {"measure": "retrieval", "model": "m", "setting": "s", "context": WITHOUT}
    off = head | {"memory": OFF, "nll": [5.0, 5.0, 5.0], "others": [[4.0], [4.0], [4.0]]}
    on = head | {"memory": WITH, "nll": [3.0, 5.0, 2.0], "others": [[4.5], [4.0], [3.0]]}
    on |= {"masked": [1, 0, 2], "others_masked": [[0], [0], [2]]}
    same = {"nll": [5.0] * 3, "rank": [1.0] * 3, "right": [0] * 3}
    rows = [{**same, **row} for row in (off, on)]
    rows += [{**on, **same, "memory": memory} for memory in (WITHOUT, UNRELATED)]
    table = probe_tables(rows)["key"].splitlines()
    assert table[0].count("|") == 6
    assert table[2] == "| s | -2.5000 ± 0.5000 | -1.0000 | +0.0000 | +0.2500 ± 0.2500 |"


def with_method(folder, **memory):
    """Make a folder one that was trained with a memory."""
    own = {"objective": "memdlm", "mask_token_id": 1, "seed": 0, "diffusion": {}}
    own["memory"] = {"rank": 2, "layer_fraction": 0.5} | memory
    (folder / "memdlm.json").write_text(json.dumps(own))
    return folder


@pytest.fixture
def demo_folder(tmp_path):
    return with_method(shutil.copytree(BASE_FOLDER, tmp_path / "model"))


def tiny_folder(path, model):
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return with_method(path)


def read_rows(out):
    return [json.loads(line) for line in (out / "probe.jsonl").read_text().splitlines()]


def test_the_command_on_the_demos_questions(demo_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(retrieval, "_MORE_EPOCHS", 2)
    out = tmp_path / "out"
    words = ["probe", "--model", f"{demo_folder},{demo_folder}", "--names", "a,b", "--count", "2"]
    assert main([*words, "--length", "96", "--out", str(out)]) == 0
    rows = read_rows(out)
    assert {row["measure"] for row in rows} == {"projection", "tokens", "strip", "retrieval"}
    assert {row["model"] for row in rows} == {"a", "b"}
    tables = probe_tables(rows)
    assert list(tables) == ["weights", "tokens", "retrieval", "gain", "key"]
    page, told = (out / "probe.md").read_text(), capsys.readouterr().out
    for table in tables.values():
        assert table in page
        assert table in told
    for name in ("weights", "tokens", "retrieval", "strip"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in page
    assert sum(row["tokens"] for row in rows if row["measure"] == "tokens") == 2 * 2 * 92


def test_the_command_on_prompts_of_a_model_with_experts(tmp_path):
    config = LLaDA2MoeConfig(
        vocab_size=WORD_COUNT,
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
    torch.manual_seed(0)
    folder = tiny_folder(tmp_path / "model", AutoModelForCausalLM.from_config(config))
    prompts = tmp_path / "prompts.jsonl"
    texts = ["the magic number of alpha is one two", "the magic number of beta is"]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    out = tmp_path / "out"
    words = ["probe", "--model", str(folder), "--prompt_file", str(prompts), "--out", str(out)]
    assert main(words) == 0
    rows = read_rows(out)
    assert {row["measure"] for row in rows} == {"projection", "expert", "tokens", "strip"}
    assert len([row for row in rows if row["measure"] == "expert"]) == 2 * 3 * 4
    assert list(probe_tables(rows)) == ["weights", "experts", "tokens"]
    assert (out / "experts.png").is_file()
    assert not (out / "retrieval.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count", "1"], "count must be at least 2, got 1"),
        (["--length", "95"], "length must be at least 96, got 95"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--names", "a,b"], "names must be as many as models, 1, got 2"),
        (["--model", "a/x,b/x"], "names must all be different, got x, x"),
        (["--prompt", "Hello", "--count", "3"], "count would not be read: prompts are given"),
        (["--prompt", "Hello", "--length", "99"], "length would not be read"),
        (["--prompt", "Hello", "--prompt_file", "a.txt"], "prompt_file would not be read"),
        (["--prompt_file", "a.csv"], "prompt_file must be a .txt or .jsonl file"),
        (["--device", "moon"], "device must be one that is here"),
        ([], "model must be one that was trained with a memory"),
    ],
)
def test_bad_options_are_one_line(words, message, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["probe", "--model", str(BASE_FOLDER), *words, *out]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("memdlm: error: ")
    assert message in error


def test_the_demos_questions_are_for_its_tokenizer(tmp_path, capsys):
    folder = tiny_folder(tmp_path / "model", tiny_model())
    assert main(["probe", "--model", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "its tokenizer is not the demo's" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_an_error(tmp_path, capsys):
    folder = tiny_folder(tmp_path / "model", tiny_model())
    words = ["probe", "--model", str(folder), "--out", str(tmp_path / "out")]
    assert main([*words, "--prompt", "one two " * 40]) == 2
    assert "prompts[0] must have at most the model's 64 positions" in capsys.readouterr().err


def test_options_know_their_models():
    own = ProbeOptions(model="runs/a, runs/b")
    assert (own.folders, own.labels, own.on_demo) == (["runs/a", "runs/b"], ["a", "b"], True)
    assert (own.question_count, own.question_length) == (64, 256)


def test_the_page_of_the_docs_has_the_tables_of_its_rows():
    page = (DOCS / "probe.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (DOCS / "probe" / "probe.jsonl").read_text().splitlines()]
    for name, table in probe_tables(rows).items():
        assert table in page, name
    pictures = re.findall(r"!\[[^]]*\]\(probe/(\S+)\)", page)
    assert len(pictures) == 4
    for picture in pictures:
        assert (DOCS / "probe" / picture).is_file()
