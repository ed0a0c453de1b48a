"""A checkpoint as inference loads it, and logits at chosen tokens."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from memdlm.backbone import Backbone
from memdlm.block_mask import CausalBlocks
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.inference import load_checkpoint, token_logits
from tests.families import FAMILIES, make_family_model
from tests.kernels.truth import assert_as_accurate
from tests.tiny import make_model
from tests.trainer.trainer_case import tiny_model, tiny_tokenizer

POSITIONS = torch.tensor([[0, 3, 5], [7, 2, 2]])


def plain_logits(model, ids, mask=None):
    logits = model(ids, attention_mask=mask, is_causal=False, use_cache=False).logits
    shifted = getattr(model.config, "right_shift_logits", False)
    return torch.cat((logits[:, :1], logits[:, :-1]), 1) if shifted else logits


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
@torch.no_grad()
def test_chosen_tokens_have_the_logits_of_the_whole_model(family):
    model = (make_model() if family == "llama" else make_family_model(family)).eval()
    ids = torch.arange(16).view(2, 8) % 50
    whole, split = Backbone(model), Backbone(model, 3)
    expected = plain_logits(model, ids).gather(
        1, POSITIONS[..., None].expand(-1, -1, model.config.vocab_size)
    )
    torch.testing.assert_close(token_logits(whole, ids, POSITIONS), expected)
    torch.testing.assert_close(token_logits(split, ids, POSITIONS), expected)


@torch.no_grad()
def test_padding_is_not_seen():
    model = make_model().eval()
    ids = torch.arange(16).view(2, 8)
    visible = torch.ones(2, 8, dtype=torch.bool)
    visible[1, 5:] = False
    own = token_logits(Backbone(model), ids, torch.tensor([[1], [4]]), visible)
    alone = token_logits(Backbone(model), ids[1:, :5], torch.tensor([[4]]))
    torch.testing.assert_close(own[1:], alone)


@pytest.mark.parametrize("family", ["llama", "llada2"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_canvas_in_blocks_is_the_model_under_that_mask(family, implementation):
    """The last block may be short; a token sees its own block and those before."""
    model = (make_model() if family == "llama" else make_family_model(family)).eval()
    ids = torch.arange(16).view(2, 8) + 3
    block = torch.arange(8) // 3
    seen = (block[None, :] <= block[:, None])[None, None].expand(2, 1, -1, -1)
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)
    everywhere = torch.arange(8).expand(2, -1)
    backbone = Backbone(model)
    truth = plain_logits(model, ids, added)  # by sdpa, all in float64
    model.set_attn_implementation(implementation)
    own = token_logits(backbone, ids, everywhere, canvas_block=3)
    expected = plain_logits(model, ids, added)
    if implementation == "sdpa":
        torch.testing.assert_close(own, truth)
    else:  # Hugging Face's eager attention rounds its softmax to float32
        assert_as_accurate("logits", own, truth, expected, torch.float32)


def test_a_canvas_in_blocks_hides_padding_from_others():
    visible = torch.tensor([[True, True, True, False]])
    seen = CausalBlocks(4, 2).seen_by(torch.arange(4)[None], visible)[0, 0]
    assert seen.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, True, True],
    ]


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_plain_folder_has_the_default_method(folder):
    own = load_checkpoint(str(folder), device="cpu")
    assert not own.model.training
    assert own.diffusion == DiffusionConfig()
    assert own.memory is None
    assert own.mask_token_id == own.tokenizer.mask_token_id
    assert own.max_length == own.model.config.max_position_embeddings
    assert own.device == torch.device("cpu")


def test_a_trained_folder_has_its_method(folder):
    method = {
        "mask_token_id": 3,
        "diffusion": {"schedule": "cosine"},
        "memory": {"inner_steps": 3, "rank": 4},
    }
    (folder / "memdlm.json").write_text(json.dumps(method))
    own = load_checkpoint(str(folder))
    assert own.mask_token_id == 3
    assert own.diffusion == DiffusionConfig(schedule="cosine")
    assert own.memory == MemoryConfig(inner_steps=3, rank=4)


@torch.no_grad()
def test_an_adapter_is_loaded_on_its_base(folder, tmp_path):
    base = load_checkpoint(str(folder), device="cpu")
    adapted = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "adapter")
    own = load_checkpoint(str(tmp_path / "adapter"), device="cpu")
    ids = torch.tensor([[4, 5, 6]])
    expected = adapted(input_ids=ids, is_causal=False, use_cache=False).logits
    torch.testing.assert_close(
        own.model(input_ids=ids, is_causal=False, use_cache=False).logits, expected
    )
    assert own.tokenizer.get_vocab() == base.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot be read"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
            "model must be one of .* 'gpt2'",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"none"), "cannot be loaded"),
    ],
)
def test_a_folder_that_cannot_be_used_is_told(change, message, folder):
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(str(folder))


def refused(folder, message, monkeypatch, **options):
    """Before the weights are read."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **others: 1 / 0)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(str(folder), **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", r"it must be a JSON object, got \[\]"),
        ('{"memories": null}', "it must have no keys but objective, .*, got 'memories'"),
        ('{"memory": {"ranks": 4}}', "memory must have no keys but .*, got 'ranks'"),
        ('{"memory": {"rank": "4"}}', "rank must be a whole number, at least 1, got '4'"),
        ('{"memory": []}', r"memory must be a JSON object, got \[\]"),
        ('{"diffusion": "linear"}', "diffusion must be a JSON object, got 'linear'"),
        ('{"diffusion": {"schedule": []}}', r"schedule must be one of .*, got \[\]"),
        ('{"mask_token_id": "1"}', "mask_token_id must be a whole number, at least 0, got '1'"),
        ('{"mask_token_id": true}', "mask_token_id must be a whole number, at least 0, got True"),
    ],
)
def test_a_method_that_cannot_be_used_is_told_with_its_file(folder, text, message, monkeypatch):
    path = folder / "memdlm.json"
    path.write_text(text)
    refused(folder, f"^{path} cannot be read: .*{message}", monkeypatch)


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta", "cpu:x", ""])
def test_a_device_that_is_not_here_is_refused(folder, device, monkeypatch):
    message = f"device must be one that is here, cpu.*, got '{device}'"
    refused(folder, message, monkeypatch, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_cuda_is_refused_where_it_is_not(folder, monkeypatch):
    refused(folder, "device must be one that is here, cpu, got 'cuda'", monkeypatch, device="cuda")


def test_published_blocks_are_the_default_of_llada2(tmp_path):
    make_family_model("llada2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_checkpoint(str(tmp_path), device="cpu").diffusion == DiffusionConfig(block_size=32)
    for said in (DiffusionConfig(), DiffusionConfig(block_size=8)):
        method = {"diffusion": dataclasses.asdict(said)}
        (tmp_path / "memdlm.json").write_text(json.dumps(method))
        assert load_checkpoint(str(tmp_path), device="cpu").diffusion == said
