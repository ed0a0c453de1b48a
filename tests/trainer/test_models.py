"""The backbones: published checkpoints and configs, the numbers of the plain forward, bad input."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    OlmoeForCausalLM,
)

import memdlm.models
from memdlm.models import (
    DreamConfig,
    LLaDA2MoeConfig,
    LLaDA2MoeModelLM,
    LLaDAConfig,
    LLaDAModelLM,
    LLaDAMoEConfig,
)
from memdlm.models.rotary import rotate
from tests.families import make_config, make_family_model
from tests.plain import Plain, load_published
from tests.tiny import VOCABULARY

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
LENGTH = 9

# Every family with what its configs may switch on: biases, tied heads, a dense first layer.
CASES = {
    "llada": ("llada", {"embedding_size": 64, "include_qkv_bias": False}),
    "llada biased": (
        "llada",
        {"mlp_hidden_size": None, "mlp_ratio": 2, "embedding_size": None}
        | {"include_bias": True, "include_qkv_bias": False, "rope_full_precision": False},
    ),
    "llada tied": (
        "llada",
        {"embedding_size": 64, "weight_tying": True, "num_key_value_heads": None},
    ),
    "llada_moe": (
        "llada_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_layer_freq": [1, 1]}
        | {"shared_expert_intermediate_size": None},
    ),
    "llada_moe full": (
        "llada_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_layer_freq": [0, 1]}
        | {"moe_router_enable_expert_bias": True, "attention_bias": True}
        | {"partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    ),
    "llada2": ("llada2", {"num_experts": 16, "num_experts_per_tok": 3}),
    "llada2 full": (
        "llada2",
        {"head_dim": None, "num_experts_per_tok": 1, "n_group": 2, "topk_group": 1}
        | {"num_shared_experts": 2, "use_qkv_bias": True, "use_bias": True, "use_qk_norm": False}
        | {"tie_word_embeddings": True},
    ),
    "dream": ("dream", {}),
    "dream tied": ("dream", {"tie_word_embeddings": True}),
}
ONE_OF_EACH = ("llada", "llada_moe full", "llada2", "dream")


def build(case, dtype=torch.float32):
    """A model of two layers."""
    family, own = CASES[case]
    model = make_family_model(family, dtype, num_hidden_layers=2, **own)
    if dtype == torch.float64:  # which Hugging Face's grouped product lacks
        model.set_experts_implementation("eager")
    return model


def tokens():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (2, LENGTH), generator=generator)


def padding():
    """[B, L] with padding in the second sequence, and the same as an additive mask [B, 1, L, L]."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, 6:] = 0
    visible = mask.bool()[:, None, None, :].expand(-1, 1, LENGTH, -1)
    return mask, visible


def additive(visible, dtype):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def save(model, folder, **options):
    """Write a checkpoint; returns its tensors."""
    model.save_pretrained(folder, **options)
    return read(folder)


def read(folder):
    tensors = {}
    for path in Path(folder).glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def assert_same_tensors(actual, expected):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def attention_names(layer, names, kind):
    return [f"{layer}.{name}.{kind}" for name in names]


def published_names(case):
    """What the published checkpoints of these configs hold: name to shape."""
    names = {}
    if case.startswith("llada") and case.split()[0] == "llada":
        key = 32 if case == "llada tied" else 16
        width, rows = (64, 61) if case == "llada biased" else (48, 64)
        shapes = {
            "q_proj": (32, 32),
            "k_proj": (key, 32),
            "v_proj": (key, 32),
            "attn_out": (32, 32),
            "ff_proj": (width, 32),
            "up_proj": (width, 32),
            "ff_out": (32, width),
        }
        biased = {
            "llada": (),
            "llada biased": tuple(shapes),
            "llada tied": ("q_proj", "k_proj", "v_proj"),
        }[case]
        for block in ("model.transformer.blocks.0", "model.transformer.blocks.1"):
            names[f"{block}.attn_norm.weight"] = names[f"{block}.ff_norm.weight"] = (32,)
            for name, shape in shapes.items():
                names[f"{block}.{name}.weight"] = shape
                if name in biased:
                    names[f"{block}.{name}.bias"] = shape[:1]
        names |= {
            "model.transformer.wte.weight": (rows, 32),
            "model.transformer.ln_f.weight": (32,),
        }
        if case != "llada tied":
            names["model.transformer.ff_out.weight"] = (rows, 32)
        if case == "llada biased":
            names["model.transformer.ff_out.bias"] = (rows,)
        return names

    names["model.norm.weight"] = (32,)
    words = "word_embeddings" if case.startswith("llada2") else "embed_tokens"
    names[f"model.{words}.weight"] = (61, 32)
    if case in ("llada_moe", "llada2", "dream"):
        names["lm_head.weight"] = (61, 32)
    for layer in ("model.layers.0", "model.layers.1"):
        names[f"{layer}.input_layernorm.weight"] = (32,)
        names[f"{layer}.post_attention_layernorm.weight"] = (32,)
        if case == "llada2":
            names |= {
                f"{layer}.attention.query_key_value.weight": (128, 32),
                f"{layer}.attention.dense.weight": (32, 64),
                f"{layer}.attention.query_layernorm.weight": (16,),
                f"{layer}.attention.key_layernorm.weight": (16,),
            }
        elif case == "llada2 full":
            names |= {
                f"{layer}.attention.query_key_value.weight": (64, 32),
                f"{layer}.attention.query_key_value.bias": (64,),
                f"{layer}.attention.dense.weight": (32, 32),
                f"{layer}.attention.dense.bias": (32,),
            }
        else:
            shapes = {
                "q_proj": (32, 32),
                "k_proj": (16, 32),
                "v_proj": (16, 32),
                "o_proj": (32, 32),
            }
            for name, shape in shapes.items():
                names[f"{layer}.self_attn.{name}.weight"] = shape
                if case == "llada_moe full" or (case.startswith("dream") and name != "o_proj"):
                    names[f"{layer}.self_attn.{name}.bias"] = shape[:1]
            if case.startswith("llada_moe"):
                names[f"{layer}.self_attn.q_norm.weight"] = (8,)
                names[f"{layer}.self_attn.k_norm.weight"] = (8,)

    def ffn(prefix, width):
        return {
            f"{prefix}.gate_proj.weight": (width, 32),
            f"{prefix}.up_proj.weight": (width, 32),
            f"{prefix}.down_proj.weight": (32, width),
        }

    experts = {"llada_moe": 8, "llada_moe full": 8, "llada2": 16, "llada2 full": 8}.get(case, 0)
    for layer in (0, 1):
        mlp = f"model.layers.{layer}.mlp"
        if not experts or (layer == 0 and case != "llada_moe"):
            names |= ffn(mlp, 48)
            continue
        names[f"{mlp}.gate.weight"] = (experts, 32)
        for expert in range(experts):
            names |= ffn(f"{mlp}.experts.{expert}", 16)
        if case == "llada_moe full":
            names[f"{mlp}.expert_bias"] = (8,)
            names |= ffn(f"model.layers.{layer}.shared_expert", 24)
        if case.startswith("llada2"):
            names[f"{mlp}.gate.expert_bias"] = (experts,)
            names |= ffn(f"{mlp}.shared_experts", 16 if case == "llada2" else 32)
    return names


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_has_the_published_names_and_comes_back_bit_for_bit(case, tmp_path):
    model = build(case)
    written = save(model, tmp_path)
    assert {name: tuple(t.shape) for name, t in written.items()} == published_names(case)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert_same_tensors(save(loaded, tmp_path / "again"), written)


@pytest.mark.parametrize("case", ONE_OF_EACH)
@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, "auto"])
def test_a_sharded_checkpoint_loads_wherever_it_is_put(case, device_map, tmp_path):
    model = build(case)
    written = save(model, tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert_same_tensors(save(loaded, tmp_path / "again"), written)
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_bfloat16_keeps_the_expert_bias_in_float32(case, tmp_path):
    model = build(case)
    save(model, tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = {
        name: tensor if "expert_bias" in name else tensor.bfloat16()
        for name, tensor in model.state_dict().items()
    }
    assert_same_tensors(half.state_dict(), expected)
    written = save(half, tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert_same_tensors(again.state_dict(), expected)
    assert_same_tensors(save(again, tmp_path / "again"), written)
    assert again(tokens()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_every_auto_class_loads_a_folder_that_names_remote_code(case, tmp_path):
    """The code is not there, nor is anybody asked whether to trust it."""
    model = build(case)
    save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_x.XConfig",
        "AutoModel": "modeling_x.XModel",
        "AutoModelForCausalLM": "modeling_x.XModelLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for auto in (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        assert type(auto.from_pretrained(tmp_path)) is type(model)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_those_of_the_plain_forward(case, dtype, tmp_path):
    model = build(case, dtype)
    plain = load_published(Plain(model.config).to(dtype), save(model, tmp_path))
    mask, visible = padding()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-9}[dtype]
    bias = additive(visible, dtype)
    with torch.no_grad():
        truth, padded_truth = plain(tokens()).logits, plain(tokens(), bias).logits
        for actual, expected in [
            (model(tokens()).logits, truth),
            (model(tokens(), torch.ones_like(mask)).logits, truth),
            (model(inputs_embeds=model.get_input_embeddings()(tokens())).logits, truth),
            (model(tokens(), position_ids=torch.arange(LENGTH)[None]).logits, truth),
            (model(tokens(), mask).logits, padded_truth),
            (model(tokens(), visible).logits, padded_truth),
            (model(tokens(), bias).logits, padded_truth),
        ]:
            assert actual.dtype == dtype
            error = (actual - expected).abs().max().item()
            assert error <= tolerance * expected.abs().max().item(), error


@pytest.mark.parametrize("case", ["llada_moe full", "llada2"])
def test_gradients_are_those_of_the_plain_forward(case, tmp_path):
    model = build(case, torch.float64)
    plain = load_published(Plain(model.config).double(), save(model, tmp_path))
    weight = torch.randn(2, LENGTH, VOCABULARY, dtype=torch.float64)
    for net in (model, plain):
        (net(tokens()).logits * weight).sum().backward()
    experts = plain.model.layers[1].mlp.experts
    ours = model.model.layers[1].mlp
    down = torch.stack([expert.down_proj.weight.grad for expert in experts])
    torch.testing.assert_close(ours.experts.down_proj.grad, down)
    gate_up = [torch.cat((e.gate_proj.weight.grad, e.up_proj.weight.grad)) for e in experts]
    torch.testing.assert_close(ours.experts.gate_up_proj.grad, torch.stack(gate_up))
    torch.testing.assert_close(ours.gate.weight.grad, plain.model.layers[1].mlp.gate.weight.grad)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_attention_and_experts_implementations_agree(case):
    model = build(case).eval()
    mask, visible = padding()
    with torch.no_grad():
        expected = model(tokens(), mask).logits
        model.set_attn_implementation("eager")
        for seen in (mask, visible, additive(visible, torch.float32)):
            torch.testing.assert_close(model(tokens(), seen).logits, expected)
        model.set_experts_implementation("eager")
        torch.testing.assert_close(model(tokens(), mask).logits, expected)


def test_the_plain_olmoe_is_that_of_hugging_face(tmp_path):
    options = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 3}
    model = make_family_model("olmoe", torch.float32, **options, norm_topk_prob=False)
    assert type(model) is OlmoeForCausalLM
    tensors = save(model, tmp_path)
    plain = load_published(Plain(AutoConfig.from_pretrained(tmp_path)), tensors)
    sees_all = torch.zeros(2, 1, LENGTH, LENGTH)
    with torch.no_grad():
        expected = model(tokens(), attention_mask=sees_all).logits
        torch.testing.assert_close(plain(tokens()).logits, expected)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_a_token_sees_both_sides_and_no_padding(case):
    model = build(case).eval()
    changed = tokens()
    changed[:, -1] = (changed[:, -1] + 1) % VOCABULARY
    mask = torch.ones(2, LENGTH)
    with torch.no_grad():
        assert not torch.equal(model(tokens()).logits[:, 0], model(changed).logits[:, 0])
        mask[:, -1] = 0
        pair = [model(ids, mask).logits[:, :-1] for ids in (tokens(), changed)]
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("case", ONE_OF_EACH)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(case, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = build(case).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            assert model.model.gradient_checkpointing
        model(tokens()).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_tensors(*gradients)


# Computed by hand: embedding and head, then per layer attention, norms and FFN, then the last norm.
PARAMETERS = {
    # q, k, v, o of 4096 x 4096.
    "llada_8b": 2 * 126464 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096) + 4096,
    # Norms of q and k, router, 64 experts.
    "llada_moe_7b_a1b": 2 * 157184 * 2048
    + 16 * (4 * 2048**2 + 2 * 128 + 64 * 2048 + 64 * 3 * 2048 * 1024 + 2 * 2048)
    + 2048,
    # 16 + 2 * 4 heads of 128; one dense layer, 19 with a router and 256 + 1 experts.
    "llada2_mini": 2 * 157184 * 2048
    + 20 * (24 * 128 * 2048 + 16 * 128 * 2048 + 2 * 128 + 2 * 2048)
    + 3 * 2048 * 5120
    + 19 * (256 * 2048 + 257 * 3 * 2048 * 512)
    + 2048,
    # 28 heads, 4 for keys, of 128; biases on q, k, v.
    "dream_7b": 2 * 152064 * 3584
    + 28 * (2 * 3584**2 + 2 * 512 * 3584 + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584)
    + 3584,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_published_config_makes_a_model_of_the_published_size(name, tmp_path):
    published = json.loads((CONFIGS / f"{name}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert type(model).__name__ == published["architectures"][0]
    assert config.right_shift_logits == (name == "dream_7b")
    assert 0 <= config.mask_token_id < config.vocab_size

    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    for key in ("torch_dtype", "transformers_version"):  # Hugging Face writes its own
        published.pop(key, None)
    assert {key: again.get(key, "absent") for key in published} == published


def test_the_published_sizes():
    assert PARAMETERS == {
        "llada_8b": 8_015_581_184,
        "llada_moe_7b_a1b": 7_356_880_896,
        "llada2_mini": 16_255_638_528,
        "dream_7b": 7_615_616_512,
    }


def test_the_mask_tokens_of_the_published_tokenizers():
    assert LLaDAConfig().mask_token_id == 126336
    assert LLaDAMoEConfig().mask_token_id == 156895
    assert LLaDA2MoeConfig().mask_token_id == 156895
    assert DreamConfig().mask_token_id == 151666
    assert LLaDA2MoeConfig(mask_token_id=7).mask_token_id == 7


@pytest.mark.parametrize("case", CASES)
def test_a_config_answers_to_hugging_face_s_names(case):
    config = build(case).config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 2, VOCABULARY)
    assert config.num_attention_heads == 4
    assert config.num_key_value_heads == (4 if case == "llada tied" else 2)
    tied = "tied" in case or case in ("llada_moe full", "llada2 full")
    assert config.tie_word_embeddings == tied
    assert config.intermediate_size == (64 if case == "llada biased" else 48)
    assert config.max_position_embeddings > 0


def test_llada_moe_is_told_from_llada_by_its_architecture():
    published = json.loads((CONFIGS / "llada_moe_7b_a1b.json").read_text())
    assert type(LLaDAConfig.from_dict(published)) is LLaDAMoEConfig
    assert type(LLaDAConfig.from_dict(published | {"architectures": ["LLaDAMoEModel"]})) is (
        LLaDAMoEConfig
    )
    for wrong in (["LLaDAForVision"], [], None):
        with pytest.raises(ValueError, match=r"architectures .*LLaDAModelLM, LLaDAMoEModelLM"):
            LLaDAConfig.from_dict(published | {"architectures": wrong})


REFUSED = [
    (LLaDAConfig, key, value)
    for key, value in [
        ("activation_type", "swiglu"),
        ("alibi", True),
        ("architectures", ["LlamaForCausalLM"]),
        ("attention_layer_norm", True),
        ("bias_for_layer_norm", True),
        ("block_group_size", 2),
        ("block_type", "sequential"),
        ("d_model", 4100),
        ("embedding_dropout", 0.1),
        ("embedding_size", 1000),
        ("input_emb_norm", True),
        ("layer_norm_type", "default"),
        ("layer_norm_with_affine", False),
        ("multi_query_attention", True),
        ("n_heads", 4096),
        ("n_kv_heads", 3),
        ("residual_dropout", 0.1),
        ("rope", False),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("scale_logits", True),
    ]
]
REFUSED += [
    (LLaDAMoEConfig, key, value)
    for key, value in [
        ("architectures", ["LLaDAModelLM"]),
        ("clip_qkv", 8.0),
        ("hidden_act", "gelu"),
        ("moe_layer_freq", [1, 1]),
        ("moe_router_score_function", "sigmoid"),
        ("norm_topk_prob", True),
        ("num_experts_per_tok", 65),
        ("output_router_logits", True),
        ("partial_rotary_factor", -1),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("routed_scaling_factor", 2.5),
    ]
]
REFUSED += [
    (LLaDA2MoeConfig, key, value)
    for key, value in [
        ("embedding_dropout", 0.1),
        ("hidden_act", "gelu"),
        ("moe_router_enable_expert_bias", False),
        ("n_group", 0),
        ("n_group", 3),
        ("n_group", 256),
        ("norm_head", True),
        ("norm_softmax", True),
        ("norm_topk_prob", False),
        ("num_experts_per_tok", 129),
        ("num_key_value_heads", 5),
        ("output_dropout", 0.1),
        ("output_router_logits", True),
        ("partial_rotary_factor", 1.5),
        ("rotary_dim", 32),
        ("router_dtype", "bf16"),
        ("score_function", "softmax"),
        ("topk_group", 9),
        ("use_rmsnorm", False),
        ("use_sliding_window", True),
        ("using_split_qkv_in_self_attention", True),
    ]
]
REFUSED += [
    (DreamConfig, "architectures", ["DreamForCausalLM"]),
    (DreamConfig, "hidden_act", "gelu"),
    (DreamConfig, "hidden_size", 3585),
    (DreamConfig, "rope_scaling", {"type": "mrope"}),
    (DreamConfig, "use_sliding_window", True),
]


@pytest.mark.parametrize(
    ("config_class", "key", "value"), REFUSED, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_a_switch_that_is_not_computed_is_refused(config_class, key, value):
    with pytest.raises(ValueError, match=rf"{config_class.__name__}: {key} must be .*got"):
        config_class(**{key: value})


def test_biases_of_all_layers_do_not_silently_leave_out_those_of_the_norms():
    with pytest.raises(ValueError, match=r"bias_for_layer_norm must be False.*got None"):
        LLaDAConfig(include_bias=True, bias_for_layer_norm=None)


def test_a_switch_set_on_a_config_in_memory_is_refused_by_the_model():
    config = build("llada").config
    config.alibi = True
    with pytest.raises(ValueError, match="alibi must be False, got True"):
        LLaDAModelLM(config)


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a checkpoint of LLaDA2, a function that rewrites it, and its tensors."""
    tensors = save(build("llada2"), tmp_path)

    def rewrite(tensors):
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return rewrite, tensors


def without(tensors, *parts):
    return {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


LOST = {
    "a projection": (".1.attention.dense",), "the fused projection": (".0.attention.query",),
    "the bias of the experts": (".expert_bias",), "an expert's down": (".experts.6.down",),
    "a shared expert": (".shared_experts.up",), "every expert": (".experts.",),
    "the head": ("lm_head",), "two of the experts": (".experts.14.", ".experts.15."),
    "an expert's gate": (".experts.6.gate",),
}  # fmt: skip


@pytest.mark.parametrize("lost", LOST)
def test_a_checkpoint_that_lacks_something_is_an_error(checkpoint, lost):
    rewrite, tensors = checkpoint
    folder = rewrite(without(tensors, *LOST[lost]))
    with pytest.raises(ValueError, match=r"the checkpoint .* does not fit its config"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_that_does_not_fit_says_where(checkpoint):
    rewrite, tensors = checkpoint
    folder = rewrite(without(tensors, ".experts.14.", ".experts.15."))
    with pytest.raises(
        ValueError, match=r"down_proj \(14, 32, 16\), the config says \(16, 32, 16\)"
    ):
        AutoModelForCausalLM.from_pretrained(folder)
    rewrite(without(tensors, "attention.dense"))
    with pytest.raises(ValueError, match=r"missing: model.layers.0.self_attn.o_proj.weight"):
        AutoModelForCausalLM.from_pretrained(folder)
    rewrite(tensors | {"model.layers.0.extra.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"unknown: model.layers.0.extra.weight$"):
        AutoModelForCausalLM.from_pretrained(folder)
    many = {f"extra.{number}": torch.zeros(1) for number in range(9)}
    rewrite(tensors | many)
    with pytest.raises(ValueError, match=r"extra.4 and 4 more$"):
        AutoModelForCausalLM.from_pretrained(folder)
    more = {
        name.replace("s.0.", "s.16."): t.clone() for name, t in tensors.items() if "s.0." in name
    }
    rewrite(tensors | {name: t for name, t in more.items() if "experts" in name})
    with pytest.raises(ValueError, match=r"gate_up_proj \(17, 32, 32\), the config says \(16,"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_folder_given_by_keyword_is_checked_alike(checkpoint):
    rewrite, tensors = checkpoint
    folder = rewrite(tensors)
    LLaDA2MoeModelLM.from_pretrained(pretrained_model_name_or_path=folder)
    for lost in ("attention.dense", ".experts.6.gate"):
        rewrite(without(tensors, lost))
        with pytest.raises(ValueError, match=f"the checkpoint {folder} does not fit its config"):
            LLaDA2MoeModelLM.from_pretrained(pretrained_model_name_or_path=folder)


def test_a_caller_may_still_ask_for_the_report_and_for_another_vocabulary(checkpoint):
    rewrite, tensors = checkpoint
    folder = rewrite(tensors | {"lm_head.weight": torch.zeros(7, 32)})
    with pytest.raises(ValueError, match=r"lm_head.weight \(7, 32\), the config says \(61, 32\)"):
        AutoModelForCausalLM.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert [name for name, *_ in info["mismatched_keys"]] == ["lm_head.weight"]
    assert type(model) is LLaDA2MoeModelLM


def test_a_forward_pass_refuses_what_it_would_not_honour():
    model = build("dream")
    with pytest.raises(ValueError, match="is_causal must be False"):
        model(tokens(), is_causal=True)
    with pytest.raises(ValueError, match=r"labels must be left out: .* got shape \(2, 9\)"):
        model(tokens(), labels=tokens())
    with pytest.raises(ValueError, match=r"output_attentions must be left out: .* got True"):
        model(tokens(), output_attentions=True)
    with pytest.raises(ValueError, match=r"one of input_ids and inputs_embeds .* got neither"):
        model()
    with pytest.raises(ValueError, match=r"one of input_ids and inputs_embeds .* got both"):
        model(tokens(), inputs_embeds=torch.zeros(2, LENGTH, 32))
    expected = model(tokens()).logits
    given = model(tokens(), use_cache=True, labels=None, output_attentions=False, is_causal=False)
    assert torch.equal(given.logits, expected)
    assert torch.equal(model(tokens(), return_dict=False)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["llada", "llada biased", "llada2"])
def test_rotary_angles_after_loading(case, dtype, tmp_path):
    save(build(case), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    position = torch.arange(100, dtype=wide)
    frequency = torch.tensor(
        [model.config.rope_theta ** (-j / 8) for j in (0, 2, 4, 6)], dtype=wide
    )
    angle = torch.outer(position, frequency).repeat(1, 2)
    like = torch.zeros((), dtype=dtype)
    cos, sin = model.model.rotary_emb(like, torch.arange(100)[None])
    expected = wide if case == "llada" else dtype
    assert cos.dtype == sin.dtype == expected
    tolerance = {"rtol": 0, "atol": 1e-5 if wide == torch.float32 else 1e-12}
    if expected == torch.bfloat16:
        tolerance["atol"] = 2**-8
    torch.testing.assert_close(cos[0], angle.cos().to(expected), **tolerance)
    torch.testing.assert_close(sin[0], angle.sin().to(expected), **tolerance)


def test_rotation_in_float32_is_rounded_once():
    heads = torch.randn(1, 2, 5, 8, dtype=torch.bfloat16)
    angle = torch.rand(1, 5, 4).repeat(1, 1, 2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    assert torch.equal(rotate(heads, cos, sin), rotate(heads.float(), cos, sin).bfloat16())
    partial = rotate(heads, cos[..., ::2], sin[..., ::2])
    assert torch.equal(partial[..., 4:], heads[..., 4:])
    assert partial.dtype == torch.bfloat16


def test_a_llada_with_another_vocabulary_comes_back(tmp_path):
    model = build("llada")
    model.resize_token_embeddings(80)
    save(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded(tokens()).logits.shape[-1] == loaded.config.vocab_size == 80


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_new_weights_are_drawn_with_the_config_s_standard_deviation(case):
    family, own = CASES[case]
    config = make_config(family, num_hidden_layers=2, initializer_range=0.5, **own)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert 0.4 < parameter.std().item() < 0.6, name
        else:
            expected = torch.ones(1) if "norm" in name else torch.zeros(1)
            assert torch.equal(parameter, expected.expand_as(parameter)), name
    assert not any(buffer.any() for buffer in model.buffers())


@pytest.mark.parametrize("case", ["llada_moe full", "dream"])
def test_peft_wraps_a_model_under_the_task_that_the_trainer_gives(case):
    config = LoraConfig(
        r=2,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
    )
    model = get_peft_model(build(case), config)
    logits = model(input_ids=tokens()).logits
    torch.testing.assert_close(logits, build(case)(tokens()).logits)
    with pytest.raises(NotImplementedError, match="fills masks"):
        model.get_base_model().prepare_inputs_for_generation()


def test_importing_twice_is_no_error():
    importlib.reload(memdlm.models)
