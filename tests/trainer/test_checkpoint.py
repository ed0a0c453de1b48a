"""Which checkpoints a run may go on from."""

import json
import re

import pytest
from peft import LoraConfig
from transformers import AutoConfig
from transformers.trainer import TRAINER_STATE_NAME

from memdlm.checkpoint import check_resumable, write_method
from memdlm.config import DiffusionConfig
from tests.families import FAMILIES, make_config
from tests.tiny import make_collator

# What is changed, and the key that is told: the published one.
OTHER_SHAPES = {
    "llada": [
        ({"vocab_size": 60}, "vocab_size"),
        ({"embedding_size": 64}, "embedding_size"),
        ({"hidden_size": 64}, "d_model"),
        ({"num_hidden_layers": 3}, "n_layers"),
        ({"num_attention_heads": 8}, "n_heads"),
        ({"num_key_value_heads": 4}, "n_kv_heads"),
        ({"mlp_hidden_size": 64}, "mlp_hidden_size"),
        ({"tie_word_embeddings": True}, "weight_tying"),
    ],
    "llada_moe": [
        ({"num_experts": 4}, "num_experts"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"expert_intermediate_size": 32}, "expert_intermediate_size"),
        ({"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size"),
        ({"dense_intermediate_size": 64}, "dense_intermediate_size"),
        ({"moe_layer_freq": [0, 1, 1, 1]}, "moe_layer_freq"),
    ],
    "llada2": [
        ({"num_experts": 16}, "num_experts"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"moe_intermediate_size": 32}, "moe_intermediate_size"),
        ({"num_shared_experts": 2}, "num_shared_experts"),
        ({"first_k_dense_replace": 2}, "first_k_dense_replace"),
        ({"head_dim": 8}, "head_dim"),
    ],
    "dream": [
        ({"hidden_size": 64}, "hidden_size"),
        ({"intermediate_size": 64}, "intermediate_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
    "olmoe": [
        ({"num_experts": 4}, "num_experts"),
        ({"intermediate_size": 32}, "intermediate_size"),
    ],
}
CASES = [(family, *case) for family, cases in OTHER_SHAPES.items() for case in cases]


def write_checkpoint(folder, config, lora=None):
    """What `check_resumable` reads of one."""
    (folder / TRAINER_STATE_NAME).write_text("{}")
    write_method(folder, make_collator(DiffusionConfig()))
    (config if lora is None else lora).save_pretrained(folder)


def check(folder, config, lora=None):
    check_resumable(str(folder), make_collator(DiffusionConfig()), config, lora)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_the_same_model_is_gone_on_from(family, tmp_path):
    write_checkpoint(tmp_path, make_config(family))
    check(tmp_path, make_config(family))
    check(tmp_path, AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize(("family", "changed", "key"), CASES)
def test_a_model_of_another_shape_is_told_by_the_key_of_its_config(family, changed, key, tmp_path):
    config, other = make_config(family), make_config(family, **changed)
    write_checkpoint(tmp_path, other)
    told = f"its {key} is {getattr(other, key)!r}, here it is {getattr(config, key)!r}"
    with pytest.raises(ValueError, match=re.escape(told)):
        check(tmp_path, config)


def test_llada_and_llada_moe_are_told_apart_though_their_model_type_is_the_same(tmp_path):
    write_checkpoint(tmp_path, make_config("llada_moe"))
    with pytest.raises(ValueError, match="its d_model is None, here it is 32"):
        check(tmp_path, make_config("llada"))


def make_lora(**options):
    keys = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]}
    keys |= {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    return LoraConfig(**keys | options)


def test_an_adapter_of_other_targets_is_told(tmp_path):
    config = make_config("llada_moe")
    write_checkpoint(tmp_path, config, make_lora())
    check(tmp_path, config, make_lora())
    for key in ("target_modules", "target_parameters"):
        saved = json.loads((tmp_path / "adapter_config.json").read_text())[key]
        check(tmp_path, config, make_lora(**{key: saved[::-1]}))
        for other in (saved[:1], None):
            told = f"its {key} is {sorted(saved)}, here it is {other or []}"
            with pytest.raises(ValueError, match=re.escape(told)):
                check(tmp_path, config, make_lora(**{key: other}))


def test_no_targets_are_the_same_however_they_are_written(tmp_path):
    config = make_config("llada_moe")
    write_checkpoint(tmp_path, config, make_lora(target_parameters=None))
    check(tmp_path, config, make_lora(target_parameters=[]))
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    del saved["target_parameters"]  # as an older PEFT writes it
    path.write_text(json.dumps(saved))
    check(tmp_path, config, make_lora(target_parameters=[]))
