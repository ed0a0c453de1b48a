"""A small model of every family, and its plain twin with one linear layer for each expert."""

from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig

from memdlm.models import DreamConfig, LLaDA2MoeConfig, LLaDAConfig, LLaDAMoEConfig
from memdlm.models.rotary import RotaryEmbedding
from tests.plain import Plain
from tests.tiny import MASK, PAD, VOCABULARY, norms_in_float64

_SHAPE = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "eos_token_id": PAD,
    "mask_token_id": MASK,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
# Every published part is there: biases, dense and sparse layers, groups.
_CONFIGS = {
    "llada": (
        LLaDAConfig,
        {"mlp_hidden_size": 48, "embedding_size": VOCABULARY, "include_qkv_bias": True},
    ),
    "llada_moe": (
        LLaDAMoEConfig,
        {"dense_intermediate_size": 48, "expert_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 24, "moe_layer_freq": [1, 0, 1, 1]}
        | _EXPERTS,
    ),
    "llada2": (
        LLaDA2MoeConfig,
        {"intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 16}
        | {"n_group": 4, "topk_group": 2}
        | _EXPERTS
        | {"num_experts": 8},
    ),
    "dream": (DreamConfig, {"intermediate_size": 48}),
    "olmoe": (
        OlmoeConfig,
        {"intermediate_size": 16, "norm_topk_prob": True, "architectures": ["OlmoeForCausalLM"]}
        | _EXPERTS,
    ),
}
FAMILIES = tuple(_CONFIGS)


def make_config(family, **options):
    """A small config, with some keys changed."""
    config_class, own = _CONFIGS[family]
    return config_class(**_SHAPE | own | options)


def make_family_model(family, dtype=torch.float64, **options):
    """A model as the Auto class makes it, its weights (norms too) far from their start."""
    model = AutoModelForCausalLM.from_config(make_config(family, **options)).to(dtype)
    if dtype == torch.float64:
        norms_in_float64(model)
        if family == "olmoe":  # Hugging Face's angles are in float32
            shape = SimpleNamespace(rope_theta=10000.0, rotary_width=8, rotary_in_float32=False)
            model.model.rotary_emb = RotaryEmbedding(shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "expert_bias" in name:
                tensor.uniform_(-0.1, 0.1, generator=generator)
            elif tensor.is_floating_point() and "rotary" not in name:
                tensor.normal_(std=0.3, generator=generator)
                if "norm" in name:
                    tensor.add_(1)
    return model.train()


def make_twin(model):
    """The plain twin with the same weights. Its parameters carry the names of `per_expert`."""
    twin = Plain(model.config).to(model.dtype)
    state = {}
    for name, tensor in model.state_dict().items():
        state |= per_expert(name, tensor.detach().clone())
    twin.load_state_dict(state)
    return twin.train()


def per_expert(name, tensor):
    """A parameter of a model, or its gradient, under the names of the twin's linear layers."""
    stacked = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    if not stacked:
        return {name: tensor}
    prefix, kind = name.rsplit(".", 1)
    named = {}
    for expert, own in enumerate(tensor):
        parts = {"gate_proj": own.chunk(2)[0], "up_proj": own.chunk(2)[1]}
        for projection, part in (parts if kind == "gate_up_proj" else {kind: own}).items():
            named[f"{prefix}.{expert}.{projection}.weight"] = part
    return named


def per_linear(name, tensors):
    """Fast weights of one adapted layer, (A, B) or (delta,) of each linear layer of the twin."""
    if not name.endswith(".experts"):
        return {name: tuple(tensors)}
    half = len(tensors) // 2
    named = {}
    for expert in range(len(tensors[0])):
        gate_up = [tensor[expert].chunk(2) for tensor in tensors[:half]]
        named[f"{name}.{expert}.gate_proj"] = tuple(gate for gate, _ in gate_up)
        named[f"{name}.{expert}.up_proj"] = tuple(up for _, up in gate_up)
        named[f"{name}.{expert}.down_proj"] = tuple(tensor[expert] for tensor in tensors[half:])
    return named


def segment_names(named):
    """The names of the segments, in the order of `FastWeights.segments`: (linear layer, which)."""
    names = []
    for layer, tensors in named.items():
        if not layer.endswith(".experts"):
            names += [(layer, which) for which in range(len(tensors))]
            continue
        half = len(tensors) // 2
        for kinds, which in [(("gate_proj", "up_proj"), w) for w in range(half)] + [
            (("down_proj",), w) for w in range(half)
        ]:
            names += [
                (f"{layer}.{expert}.{kind}", which)
                for expert in range(len(tensors[0]))
                for kind in kinds
            ]
    return names


class LowRank(nn.Module):
    """W + scale * B A, where A and B are made from leaves that several weights may share."""

    def __init__(self, factors, scale):
        super().__init__()
        self._factors = factors
        self._scale = scale

    def forward(self, weight):
        A, B = self._factors()
        return weight + self._scale * B @ A


def add_outer_lora(model, twin):
    """Give the twin the LoRA that PEFT put on `model`.

    Returns:
        Name of PEFT's parameter to the twin's leaf.
    """
    leaves = {}
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        pair = [getattr(module, which)["default"].weight for which in ("lora_A", "lora_B")]
        A, B = (p.detach().clone().requires_grad_() for p in pair)
        leaves |= {f"{name}.lora_A.default.weight": A, f"{name}.lora_B.default.weight": B}
        own = name.removeprefix("base_model.model.").replace(".base_layer", "")
        scale = module.scaling["default"]
        if not hasattr(module, "parameter_name"):
            _parametrize(twin.get_submodule(own), lambda A=A, B=B: (A, B), scale)
            continue
        count = module.num_experts
        for expert in range(count):
            for part, kind in enumerate(
                ["gate_proj", "up_proj"]
                if module.parameter_name == "gate_up_proj"
                else ["down_proj"]
            ):

                def factors(A=A, B=B, expert=expert, part=part, kind=kind, count=count):
                    own_A = A.reshape(count, -1, A.shape[1])[expert]
                    own_B = B.reshape(len(B), -1, count)[:, :, expert]
                    return own_A, own_B if kind == "down_proj" else own_B.chunk(2)[part]

                _parametrize(twin.get_submodule(f"{own}.{expert}.{kind}"), factors, scale)
    return leaves


def _parametrize(linear, factors, scale):
    nn.utils.parametrize.register_parametrization(linear, "weight", LowRank(factors, scale))
