"""`memdlm convert`: the mask token and its row, attention in both directions, and its errors."""

import json
import re

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen3Config,
)

from memdlm.backbone import FAMILIES
from memdlm.cli import main
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.convert import CAUSAL_FAMILIES, ConvertOptions, convert
from memdlm.data.collator import MaskCollator
from memdlm.objective import MDLMObjective, MemDLMObjective
from tests.trainer.trainer_case import MASK, PAD, VOCABULARY, tiny_examples, tiny_tokenizer

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS = {
    "llama": (LlamaConfig, {}),
    "llama tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8, "tie_word_embeddings": True}),
    "olmoe": (OlmoeConfig, {"num_experts": 4, "num_experts_per_tok": 2}),
}


def save_model(folder, name="llama", rows=VOCABULARY, tokenizer=None, **changes):
    """A random causal model and a tokenizer without a mask token."""
    kind, own = MODELS[name]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(kind(vocab_size=rows, **(SHAPE | own | changes)))
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer(mask_token=None)).save_pretrained(folder)
    return model.eval()


def reserving_tokenizer():
    """With a special token that has no role, and the id VOCABULARY."""
    tokenizer = tiny_tokenizer(mask_token=None)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|reserved|>"]})
    return tokenizer


def rows_of(model):
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def moved(model, **options):
    """Whether the logits of position 3 change with the token at position 5, in two sequences."""
    ids = torch.arange(4, 18).view(2, 7)
    other = ids.clone()
    other[:, 5] += 1
    change = model(ids, **options).logits[:, 3] - model(other, **options).logits[:, 3]
    return (change.abs().amax(1) > 1e-4).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_an_added_mask_token_gets_the_mean_row_and_the_rest_stays(name, tmp_path, capsys):
    before = save_model(tmp_path / "model", name)
    words = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    assert main(["convert", *words]) == 0
    printed = capsys.readouterr().out
    assert f"<|mask|>, id {VOCABULARY}, added to the tokenizer" in printed
    assert f"{VOCABULARY} x 16 -> {VOCABULARY + 1} x 16" in printed
    after = load(tmp_path / "out")
    for old, new in zip(rows_of(before), rows_of(after), strict=True):
        assert torch.equal(new[:-1], old)
        torch.testing.assert_close(new[-1], old.mean(0))
    tied = rows_of(after)[0] is rows_of(after)[1]
    assert tied == bool(before.config.tie_word_embeddings)
    assert ("tied to the head" in printed) == tied
    rest = {
        key: value for key, value in after.state_dict().items() if value.shape[0] != 1 + len(old)
    }
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in rest.items())
    assert len(rest) == len(before.state_dict()) - 2

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == before.config.model_type
    assert config["architectures"] == [type(before).__name__]
    assert config["is_causal"] is False
    assert config["right_shift_logits"] is True
    assert config["mask_token_id"] == VOCABULARY
    assert config["vocab_size"] == VOCABULARY + 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|mask|>", VOCABULARY)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_a_plain_load_attends_in_both_directions(name, attention, tmp_path):
    causal = save_model(tmp_path / "model", name)
    convert(ConvertOptions(str(tmp_path / "model"), str(tmp_path / "out")))
    model = load(tmp_path / "out", attn_implementation=attention)
    visible = torch.ones(2, 7, dtype=torch.int64)
    padded = visible.clone()
    padded[1, :2] = 0
    hidden = visible.clone()
    hidden[1, 5] = 0
    assert moved(causal) == [False, False]
    assert moved(model) == [True, True]
    assert moved(model, attention_mask=visible) == [True, True]
    assert moved(model, attention_mask=padded) == [True, True]
    assert moved(model, attention_mask=hidden) == [True, False]
    # Only the model's forward reads the flag: a layer by itself has to be told.
    assert model.model.layers[0].self_attn.is_causal


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_objectives_run_on_it_and_see_what_a_plain_load_computes(name, shift, tmp_path):
    save_model(tmp_path / "model", name)
    options = ConvertOptions(
        str(tmp_path / "model"), str(tmp_path / "out"), right_shift_logits=shift
    )
    mask = convert(options).mask_token_id
    model = load(tmp_path / "out")
    diffusion, memory = DiffusionConfig(), MemoryConfig(rank=2, layer_fraction=0.5)
    collator = MaskCollator(
        mask, PAD, VOCABULARY + 1, diffusion, memory, seed=3, right_shift_logits=shift
    )
    features = [{**e, "example": i, "epoch": 0} for i, e in enumerate(tiny_examples(4))]
    batch = collator(features)
    MemDLMObjective(model, diffusion, memory)(batch).loss.backward()
    assert model.get_input_embeddings().weight.grad[mask].abs().sum() > 0

    state = batch["anchor"]
    assert (state["input_ids"] == mask).any()
    with torch.no_grad():
        ours = MDLMObjective(model, diffusion)(batch).loss
        logits = model(state["input_ids"], attention_mask=batch["attention_mask"]).logits
    rows = logits.gather(1, state["rows"][..., None].expand(-1, -1, logits.shape[-1]))
    rows = rows.flatten(0, 1)[state["valid"]]
    nll = torch.nn.functional.cross_entropy(rows, state["target"], reduction="none")
    torch.testing.assert_close(
        ours.double(), (nll * state["weight"]).sum() / batch["normalizer"], rtol=1e-4, atol=1e-6
    )


def test_a_free_row_of_the_embedding_is_used_before_it_grows(tmp_path):
    before = save_model(tmp_path / "model", rows=VOCABULARY + 3)
    done = convert(
        ConvertOptions(str(tmp_path / "model"), str(tmp_path / "out"), mask_token="[MASK]")
    )
    assert (done.mask_token, done.mask_token_id, done.added) == ("[MASK]", VOCABULARY, True)
    assert done.shape == done.shape_before == (VOCABULARY + 3, 16)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("one [MASK] two").input_ids == [8, VOCABULARY, 9]
    for old, new in zip(rows_of(before), rows_of(load(tmp_path / "out")), strict=True):
        torch.testing.assert_close(new[VOCABULARY], old[:VOCABULARY].mean(0))
        others = [row for row in range(VOCABULARY + 3) if row != VOCABULARY]
        assert torch.equal(new[others], old[others])


@pytest.mark.parametrize("key", [{"mask_token": "<|reserved|>"}, {"mask_token_id": VOCABULARY}])
def test_a_special_token_without_a_role_is_reused_as_it_is(tmp_path, key):
    before = save_model(tmp_path / "model", rows=VOCABULARY + 1, tokenizer=reserving_tokenizer())
    done = convert(ConvertOptions(str(tmp_path / "model"), str(tmp_path / "out"), **key))
    assert (done.mask_token, done.mask_token_id, done.added) == ("<|reserved|>", VOCABULARY, False)
    assert "was in the tokenizer" in str(done)
    after = load(tmp_path / "out").state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.mask_token == "<|reserved|>"
    assert tokenizer.decode([VOCABULARY, 8], skip_special_tokens=True).strip() == "one"


def test_a_reused_token_that_has_no_row_gets_one(tmp_path):
    save_model(tmp_path / "model", tokenizer=reserving_tokenizer())
    done = convert(
        ConvertOptions(str(tmp_path / "model"), str(tmp_path / "out"), mask_token="<|reserved|>")
    )
    assert not done.added
    assert done.shape == (VOCABULARY + 1, 16)


def test_the_tokenizers_own_mask_token_is_kept(tmp_path):
    save_model(tmp_path / "model", tokenizer=tiny_tokenizer())
    done = convert(ConvertOptions(str(tmp_path / "model"), str(tmp_path / "out")))
    assert (done.mask_token, done.mask_token_id, done.added) == ("<mask>", MASK, False)
    assert done.shape == (VOCABULARY, 16)


def test_the_dtype_and_the_shift_are_chosen(tmp_path, capsys):
    save_model(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    assert main(["convert", *words, "--dtype=bfloat16", "--right_shift_logits", "false"]) == 0
    assert "of its own token (right_shift_logits false)" in capsys.readouterr().out
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.config.right_shift_logits is False


def test_help_tells_every_key(capsys):
    assert main(["convert", "--help"]) == 0
    text = capsys.readouterr().out
    keys = {entry.partition(":")[0] for entry in text.split("\n  --")[1:]}
    assert keys == set(ConvertOptions.__dataclass_fields__)
    assert "--model: text (required)" in text
    assert "--right_shift_logits: true or false (default true)" in text


SLIDING = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
# What is wrong with the model, the keys (None: left out), and what the message says.
BAD = [
    ({}, {"modle": "a"}, "unknown key 'modle'; did you mean model"),
    ({}, {"model": None}, "model must be given"),
    ({}, {"output_dir": None}, "output_dir must be given"),
    ({}, {"model": "/no/such/model"}, "model /no/such/model cannot be read"),
    ({}, {"gguf_file": "none.gguf"}, "model .*model cannot be read"),
    ({}, {"dtype": "float16"}, "dtype must be one of auto, float32, bfloat16, got 'float16'"),
    ({}, {"right_shift_logits": "perhaps"}, "right_shift_logits must be true or false"),
    ({}, {"mask_token": "x", "mask_token_id": 1}, "mask_token would not be read"),
    ({}, {"mask_token": "one"}, "mask_token must be a special token .* 'one', which is ordinary"),
    ({}, {"mask_token": "<eos>"}, "mask_token must have no other role, got '<eos>', the eos_token"),
    ({}, {"mask_token_id": 2}, "mask_token_id must have no other role, got '<eos>'"),
    ({}, {"mask_token_id": VOCABULARY}, f"mask_token_id must be the id .* got {VOCABULARY}"),
    ({}, {"output_dir": "full"}, "output_dir must be new or empty, got full"),
    ({}, {"output_dir": "full/file/out"}, "output_dir full/file/out cannot be written"),
    ({"is_causal": False}, {}, "model must be causal, got .* converted already"),
    ({"name": "qwen2", **SLIDING}, {}, "model must use full attention in every layer"),
]


@pytest.mark.parametrize(("changes", "keys", "message"), BAD)
def test_bad_input_is_one_clear_line_and_nothing_is_written(
    tmp_path, capsys, monkeypatch, changes, keys, message
):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", **changes)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("in the way")
    words = []
    for key, value in ({"model": "model", "output_dir": "out"} | keys).items():
        words += [] if value is None else [f"--{key}={value}"]
    assert main(["convert", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("memdlm: error: ")
    assert re.search(message, error), error
    assert not list((tmp_path / "out").glob("*"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def test_what_it_converts_can_be_trained():
    assert set(CAUSAL_FAMILIES) <= set(FAMILIES)
    assert {kind.model_type for kind, _ in MODELS.values()} == set(CAUSAL_FAMILIES)


def test_another_kind_of_model_is_refused(tmp_path, capsys):
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    assert main(["convert", "--model", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 2
    assert "model must be a causal decoder, one of llama, " in capsys.readouterr().err


def write_gguf(path):
    """A random one-layer llama with a byte-level tokenizer, as llama.cpp lays them out."""

    tokens = ["<|endoftext|>", "<s>", *"abcdefgh", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 9)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    layer = {
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
        "ffn_gate": (64, 32),
        "ffn_up": (64, 32),
        "ffn_down": (32, 64),
    }
    shapes = {f"blk.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"token_embd": (len(tokens), 32), "output": (len(tokens), 32)}
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = generator.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, q8_0), raw_dtype=q8_0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_dequantised(tmp_path):
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "tiny.gguf")
    done = convert(
        ConvertOptions(str(tmp_path / "model"), str(tmp_path / "out"), gguf_file="tiny.gguf")
    )
    assert (done.mask_token_id, done.added, done.shape) == (11, True, (12, 32))
    model = load(tmp_path / "out")
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    source = load(tmp_path / "model", gguf_file="tiny.gguf")
    for old, new in zip(rows_of(source), rows_of(model), strict=True):
        assert torch.equal(new[:-1], old)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab<|mask|>c").input_ids == [10, 11, 4]
