"""A memory saved and loaded: the same outputs, and a refusal wherever they would not be."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, safe_open, save_file
from transformers import AutoModelForCausalLM

from memdlm.prompt_memory.fingerprint import fingerprint
from tests.families import FAMILIES, make_family_model
from tests.tiny import MASK, make_model
from tests.trainer.memory_case import (
    EIGHT,
    PROMPTS,
    assert_same,
    fast_weights,
    logits,
    make_memory,
    snapshot,
)

CANVAS = [5, MASK, 7, 8, MASK]
KEY = "memdlm_prompt_memory"


def enter(context):
    with context:
        pytest.fail("entered")


@pytest.fixture
def saved(tmp_path):
    """A memory of the small model's, and its file."""
    model = make_model().eval()
    memory = make_memory(model)
    with memory.adapt(PROMPTS):
        pass
    memory.save(tmp_path / "memory")
    return memory, tmp_path / "memory"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("family", ["llada_moe", "dream"])
def test_a_loaded_memory_gives_the_same_outputs(tmp_path, family, adapter, dtype):
    options = {"adapter": adapter, "layer_fraction": 0.5}
    path = tmp_path / "memory"
    memory = make_memory(make_family_model(family, dtype).eval(), **options)
    with memory.adapt(PROMPTS):
        memory.save(path)
        expected = logits(memory._model, [CANVAS] * 3)
    model = make_family_model(family, dtype)
    other = make_memory(model, seed=5, **options)
    before = snapshot(model)
    for entry in (path, str(path)):
        with other.load(entry) as lengths:
            assert lengths == tuple(map(len, PROMPTS))
            assert torch.equal(logits(model, [CANVAS] * 3), expected)
            assert torch.equal(fast_weights(other), fast_weights(memory))
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("family", ["llada_moe", "dream"])
def test_a_merged_memory_is_saved_and_loaded(tmp_path, family):
    model = make_family_model(family).eval()
    memory, path = make_memory(model), tmp_path / "memory"
    before = snapshot(model)
    with memory.adapt(PROMPTS[:1], merge=True):
        memory.save(path)
        expected = logits(model, CANVAS)
    for merge in (True, None):
        with memory.load(path, merge=merge):
            assert torch.equal(logits(model, CANVAS), expected)
    with memory.load(path, merge=False):
        torch.testing.assert_close(logits(model, CANVAS), expected)
    assert_same(before, snapshot(model))


def test_a_loaded_memory_is_saved_again(saved, tmp_path):
    memory, path = saved
    with memory.adapt(EIGHT):
        pass
    with memory.load(path):
        memory.save(tmp_path / "again")
    first, second = load_file(path), load_file(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    memory.save(path)
    memory.save(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "memory"]


def test_what_stands_in_a_file(saved):
    _, path = saved
    tensors = load_file(path)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
        "3.mlp.gate_proj.A": [3, 4, 32],
        "3.mlp.gate_proj.B": [3, 48, 4],
        "3.mlp.up_proj.A": [3, 4, 32],
        "3.mlp.up_proj.B": [3, 48, 4],
        "3.mlp.down_proj.A": [3, 4, 48],
        "3.mlp.down_proj.B": [3, 32, 4],
    }
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[KEY])
    assert sorted(header) == ["format", "lengths", "memory", "model"]
    assert header["format"] == 2
    assert header["lengths"] == [10, 4, 7]
    assert header["memory"]["rank"] == 4


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="must come after a memory was written with adapt"):
        make_memory(make_model()).save(tmp_path / "memory")


def test_a_place_that_cannot_be_written(saved):
    memory, path = saved
    with pytest.raises(ValueError, match=r"path .*no_folder/memory cannot be written"):
        memory.save(path.parent / "no_folder" / "memory")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8}, "rank 8 as here, got 4"),
        ({"lora_alpha": 8.0}, "lora_alpha 8.0 as here, got 64.0"),
        ({"adapter": "full"}, "adapter 'full' as here, got 'lora'"),
        ({"target": "ffn+attention"}, r"target 'ffn\+attention' as here, got 'ffn'"),
        ({"layer_fraction": 0.5}, "layer_fraction 0.5 as here, got 0.1"),
        ({"state_dtype": "compute"}, "state_dtype 'compute' as here, got 'float32'"),
    ],
)
def test_another_way_of_reading_is_refused(saved, options, message):
    other = make_memory(make_model(), **options)
    with pytest.raises(ValueError, match=rf"path .*memory must hold a memory with {message}"):
        enter(other.load(saved[1]))


def test_another_way_of_writing_is_not(saved):
    memory, path = saved
    other = make_memory(make_model(), inner_steps=4, inner_lr=0.5, prompt_ratio=1.0)
    with other.load(path):
        assert torch.equal(fast_weights(other), fast_weights(memory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 5}, "names, .* shapes, .* dtypes, parameter values, config"),
        ({"family": "olmoe"}, "names, .* shapes, .* dtypes, parameter values, config"),
        ({"intermediate_size": 40}, "shapes, parameter values, config"),
        ({"dtype": torch.float32}, "dtypes, parameter values"),
        ({"rope_theta": 100.0}, "other config"),
        ({"rms_norm_eps": 1e-3}, "other config"),
    ],
)
def test_another_model_is_refused(tmp_path, change, message):
    memory, path = make_memory(make_family_model("dream")), tmp_path / "memory"
    with memory.adapt(PROMPTS):
        memory.save(path)
    other = make_memory(make_family_model(**{"family": "dream"} | change))
    wanted = f"path {path} must hold a memory of this model, got one of a model .*{message}$"
    with pytest.raises(ValueError, match=wanted):
        enter(other.load(path))


def test_the_same_weights_under_another_activation_are_refused(saved):
    memory, path = saved
    other = make_model(
        hidden_act="gelu", rope_parameters={"rope_type": "default", "rope_theta": 9.0}
    )
    other.load_state_dict(memory._model.state_dict())
    with pytest.raises(ValueError, match=r"a model with other config$"):
        enter(make_memory(other).load(path))


def test_other_weights_are_refused(saved):
    memory, path = saved
    weight = memory._model.model.layers[0].self_attn.q_proj.weight
    before = snapshot(memory._model)
    with torch.no_grad():
        weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match=r"a model with other parameter values$"):
        enter(memory.load(path))
    with torch.no_grad():
        weight.copy_(before["tensors"]["model.layers.0.self_attn.q_proj.weight"])
    with memory.load(path):
        pass


def test_every_parameter_is_looked_at():
    model = make_family_model("llada2")
    before = fingerprint(model)
    assert fingerprint(model) == before
    buffers = [pair for pair in model.named_buffers() if "expert_bias" in pair[0]]
    assert buffers
    for name, parameter in [*model.named_parameters(), *buffers]:
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.0001)
        changed = fingerprint(model)
        assert [kind for kind in before if changed[kind] != before[kind]] == ["parameter values"], (
            name
        )
        with torch.no_grad():
            parameter.copy_(kept)
    assert fingerprint(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_was_saved_and_loaded_is_the_same(family, tmp_path):
    model = make_family_model(family, torch.float32)
    model.save_pretrained(tmp_path / "model")
    options = {"dtype": torch.float32, "attn_implementation": "eager", "use_cache": True}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert fingerprint(loaded) == fingerprint(model)


def test_other_adapters_are_refused(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(make_model(), lora)
    model.add_adapter("other", lora)
    memory, path = make_memory(model.double().eval()), tmp_path / "memory"
    with memory.adapt(PROMPTS):
        memory.save(path)
    message = "must hold a memory of this model, got one of a model with other adapters$"
    with model.disable_adapter(), pytest.raises(ValueError, match=message):
        enter(memory.load(path))
    model.set_adapter("other")
    # PEFT freezes the adapters that are not read.
    with pytest.raises(ValueError, match=message):
        enter(memory.load(path))
    model.set_adapter("default")
    with memory.load(path):
        pass
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"with other parameter values, adapters$"):
        enter(memory.load(path))


def test_what_is_no_memory_is_refused(saved, tmp_path):
    memory, path = saved
    with pytest.raises(ValueError, match=r"path .*nothing cannot be read"):
        enter(memory.load(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=f"path {tmp_path} cannot be read"):
        enter(memory.load(tmp_path))
    wrong = tmp_path / "wrong"
    wrong.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"path {wrong} cannot be read"):
        enter(memory.load(wrong))
    save_file({"x": torch.ones(2)}, wrong)
    with pytest.raises(ValueError, match=f"path {wrong} must be a file that PromptMemory.save"):
        enter(memory.load(wrong))


def rewritten(path, change):
    """The same file with its tensors or its header changed in place."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()[KEY])
    change(tensors, header)
    wrong = path.parent / "wrong"
    save_file(tensors, wrong, {KEY: json.dumps(header)})
    return wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: header.update(format=1), "must be of format 2, got format 1"),
        (lambda tensors, header: header.update(memory=[]), "cannot be read: .*memory must be a JS"),
        (lambda tensors, header: header.update(model=None), "cannot be read: .*model must be a JS"),
        (
            lambda tensors, header: header.update(lengths=["a"] * 3),
            "cannot be read: .*lengths must",
        ),
        (
            lambda tensors, header: header.update(lengths=[1, 2, 0]),
            "cannot be read: .*lengths must",
        ),
        (lambda tensors, header: header.update(lengths=[]), "cannot be read: .*lengths must"),
        (
            lambda tensors, header: tensors["3.mlp.up_proj.B"][2, 1].fill_(torch.nan),
            "must hold finite values, got others in 3.mlp.up_proj.B",
        ),
        (lambda tensors, header: header.pop("model"), "cannot be read: TypeError"),
        (lambda tensors, header: header.pop("format"), "cannot be read: KeyError"),
        (lambda tensors, header: tensors.pop("3.mlp.up_proj.A"), "must hold the tensors"),
        (
            lambda tensors, header: tensors.update({"3.mlp.up_proj.A": torch.ones(3, 4, 31)}),
            r"must hold 3.mlp.up_proj.A as torch.float64 \[3, 4, 32\], got torch.float32 \[3, 4, 3",
        ),
        (lambda tensors, header: header.update(lengths=[10, 4]), r"as torch.float64 \[2, "),
    ],
)
def test_a_file_that_was_changed_is_refused(saved, change, message):
    memory, path = saved
    wrong = rewritten(path, change)
    with pytest.raises(ValueError, match=f"path {wrong} .*{message}"):
        enter(memory.load(wrong))


def test_a_refused_file_leaves_model_and_memory_as_they_were(saved):
    memory, path = saved
    wrong = rewritten(path, lambda tensors, header: tensors.pop("3.mlp.up_proj.A"))
    memory._model.train()
    before, written = snapshot(memory._model), fast_weights(memory)
    with pytest.raises(ValueError, match="must hold the tensors"):
        enter(memory.load(wrong))
    with pytest.raises(ValueError, match="merge must be None or False for several prompts"):
        enter(memory.load(path, merge=True))
    assert_same(before, snapshot(memory._model))
    assert torch.equal(fast_weights(memory), written)
    with memory.load(path), pytest.raises(RuntimeError, match="one memory at a time"):
        enter(memory.load(path))
