"""4-bit NF4 bases on the CPU: with an outer LoRA and fast weights, and with stacked experts."""

import json

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator
from memdlm.experts import PROJECTIONS, is_four_bit, stacked_experts
from memdlm.four_bit import four_bit_config, prepare_four_bit
from memdlm.models import LLaDAMoEConfig
from memdlm.objective import MemDLMObjective
from memdlm.options import make_run
from memdlm.training import train
from tests.tiny import MASK, PAD, VOCABULARY, gradients, make_features
from tests.trainer.trainer_case import VOCABULARY as WORDS
from tests.trainer.trainer_case import tiny_tokenizer

# bitsandbytes keeps rows of multiples of 64.
_SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def make_config(family, vocabulary=VOCABULARY, shared=64):
    if family == "llama":
        return LlamaConfig(**_SHAPE, vocab_size=vocabulary, intermediate_size=128)
    return LLaDAMoEConfig(
        **_SHAPE,
        vocab_size=vocabulary,
        dense_intermediate_size=128,
        expert_intermediate_size=64,
        shared_expert_intermediate_size=shared,
        num_experts=4,
        num_experts_per_tok=2,
        moe_layer_freq=[0, 1, 1],
        pad_token_id=None,
        eos_token_id=None,
        mask_token_id=1,
    )


def save_model(folder, family, vocabulary=VOCABULARY, shared=64):
    torch.manual_seed(0)
    config = make_config(family, vocabulary, shared)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def load_pair(folder, dtype):
    """The model in 4 bits with an outer LoRA, and one whose weights are what those bits mean."""
    model = with_lora(
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": "cpu"}, quantization_config=four_bit_config(dtype)
        )
    )
    prepare_four_bit(model)
    twin = with_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = meaning(module.weight.data, module.weight.quant_state)
            twin.get_submodule(name).weight.data = weight.to(dtype)
        elif stacked_experts(module) is module:
            for projection in PROJECTIONS:
                kept = module.parametrizations[projection]
                weight = meaning(kept.original.data, kept[0].quant_state)
                getattr(twin.get_submodule(name), projection).data = weight.to(dtype)
    return model, twin


def meaning(packed, state):
    """NF4 by its definition: two codes in a byte, each times its block's scale."""
    scale = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = packed.reshape(-1).view(torch.uint8)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1).long()
    return (state.code[codes] * scale.float().repeat_interleave(state.blocksize)).reshape(
        state.shape
    )


def with_lora(model):
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets)
    # In the layers' dtype: PEFT's two wrappers round a float32 LoRA at different places.
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return adapted.train()


def step_of(model, scope, **options):
    memory = MemoryConfig(rank=4, lora_alpha=8.0, layer_fraction=0.5, scope=scope, **options)
    diffusion = DiffusionConfig()
    objective = MemDLMObjective(model, diffusion, memory)
    batch = MaskCollator(MASK, PAD, VOCABULARY, diffusion, memory)(make_features())
    output = objective(batch)
    output.loss.backward()
    results = {"outer loss": output.loss.detach(), "inner losses": output.inner.loss}
    results["fast weights"] = objective.fast_weights.param.clone()
    return results | gradients(model)


@pytest.mark.parametrize("meta_gradient", ["first_order", "exact"])
@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("family", ["llama", "llada_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_that_of_the_dequantised_base(tmp_path, family, scope, dtype, meta_gradient):
    save_model(tmp_path, family)
    model, twin = load_pair(tmp_path, dtype)
    options = {"scope": scope, "meta_gradient": meta_gradient}
    actual, rounded = step_of(model, **options), step_of(twin, **options)
    twin.zero_grad()
    truth = step_of(twin.double(), **options)
    assert list(actual) == list(rounded) == list(truth)
    for name, expected in truth.items():
        error, bar = ((own[name].double() - expected).norm() for own in (actual, rounded))
        bar = 2 * bar + torch.finfo(dtype).eps * expected.norm()
        assert error <= bar, f"{name}: off by {error} of {expected.norm()}, allowed {bar}"


@pytest.mark.parametrize("state_dtype", ["float32", "compute"])
@pytest.mark.parametrize("family", ["llama", "llada_moe"])
def test_fast_weights_of_a_4_bit_base_are_in_a_dtype_that_computes(tmp_path, family, state_dtype):
    save_model(tmp_path, family)
    model, _ = load_pair(tmp_path, torch.bfloat16)
    memory = MemoryConfig(rank=4, state_dtype=state_dtype)
    weights = MemDLMObjective(model, DiffusionConfig(), memory).fast_weights
    assert weights.param.dtype == getattr(
        torch, {"compute": "bfloat16"}.get(state_dtype, "float32")
    )


def test_an_evaluation_before_training_leaves_the_gradients(tmp_path):
    save_model(tmp_path, "llama")
    model, _ = load_pair(tmp_path, torch.float32)
    fresh = step_of(model, "batch")
    model.zero_grad()
    with torch.no_grad():
        model.eval()(torch.arange(6)[None])
    again = step_of(model.train(), "batch")
    for name, expected in fresh.items():
        assert torch.equal(again[name], expected), name


@pytest.mark.parametrize("family", ["llama", "llada_moe"])
def test_a_float32_base_steps_under_autocast(tmp_path, family):
    save_model(tmp_path, family)
    model, _ = load_pair(tmp_path, torch.float32)
    memory, diffusion = MemoryConfig(rank=4, layer_fraction=0.5), DiffusionConfig()
    objective = MemDLMObjective(model, diffusion, memory)
    batch = MaskCollator(MASK, PAD, VOCABULARY, diffusion, memory)(make_features())
    exact = objective(batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        narrow = objective(batch).loss
    torch.testing.assert_close(narrow, exact, rtol=0.05, atol=0)
    narrow.backward()  # outside, as trainers do
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@pytest.mark.parametrize("family", ["llama", "llada_moe"])
def test_recomputed_layers_give_the_same_and_keep_no_dense_experts(tmp_path, family):
    save_model(tmp_path, family, shared=None)
    model, _ = load_pair(tmp_path, torch.float32)
    stored = step_of(model, "batch")
    model.zero_grad()
    model.gradient_checkpointing_enable()
    recomputed = step_of(model, "batch")
    for name, expected in stored.items():
        torch.testing.assert_close(recomputed[name], expected)
    assert not nn.utils.parametrize._cache
    assert nn.utils.parametrize._cache_enabled == 0


def test_experts_are_kept_in_4_bits_and_their_activations_hold_no_dense_copy(tmp_path):
    save_model(tmp_path, "llada_moe")
    model, _ = load_pair(tmp_path, torch.bfloat16)
    experts = model.get_base_model().model.layers[2].mlp.experts
    assert is_four_bit(experts)
    stored = sum(p.numel() * p.element_size() for p in experts.parameters())
    dense = 2 * sum(getattr(experts, name).numel() for name in PROJECTIONS)
    assert stored == dense / 4
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        step_of(model, "batch")
    assert not any(
        tensor.dim() == 3
        and len(tensor) == 4
        and tensor.shape[1:] in (experts.gate_up_proj.shape[1:], experts.down_proj.shape[1:])
        for tensor in saved
    )


def test_an_input_size_that_the_cpu_dequantises_wrongly_is_refused(tmp_path):
    config = LlamaConfig(**_SHAPE, vocab_size=VOCABULARY, intermediate_size=96)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map={"": "cpu"}, quantization_config=four_bit_config(torch.float32)
    )
    with pytest.raises(ValueError, match=r"down_proj must have an input size .* got 96"):
        prepare_four_bit(model)


@pytest.mark.parametrize("family", ["llama", "llada_moe"])
def test_a_run_trains_and_saves_an_adapter(tmp_path, family):
    save_model(tmp_path / "model", family, WORDS)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    row = {"prompt": "the magic number of alpha is", "response": "one two three four"}
    (tmp_path / "data.jsonl").write_text((json.dumps(row) + "\n") * 4)
    given = {
        "model": str(tmp_path / "model"),
        "dataset": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lora": True,
        "lora_rank": 2,
        "load_in_4bit": True,
        "dtype": "bfloat16",
        "rank": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    train(make_run(given))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, tmp_path / "run")
    trained = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert trained
    assert all(p.any() for p in trained)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora": False}, "lora must be true with load_in_4bit: .*, got false"),
        (
            {"lora": True, "lora_target_parameters": ["experts.down_proj"]},
            "lora_target_parameters must be left out",
        ),
    ],
)
def test_what_cannot_be_trained_in_4_bits_is_refused(keys, message):
    given = {"model": "m", "dataset": "d.jsonl", "output_dir": "o", "load_in_4bit": True}
    with pytest.raises(ValueError, match=message):
        make_run(given | keys)
