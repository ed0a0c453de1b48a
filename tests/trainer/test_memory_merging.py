"""A memory merged into the weights: the same outputs, and then the weights as they were."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from memdlm.four_bit import four_bit_config, prepare_four_bit
from memdlm.prompt_memory import merging
from tests.families import FAMILIES, make_family_model
from tests.tiny import MASK, make_model
from tests.trainer.memory_case import PROMPTS, assert_same, logits, make_memory, snapshot

CANVAS = [5, MASK, 7, 8, MASK]
PROMPT = PROMPTS[:1]
# Experts are adapted in llada_moe, llada2 and olmoe, with shared ones beside them in the first two.
KINDS = ({}, {"adapter": "full"}, {"target": "ffn+attention"})


def differing(model, before):
    return [n for n, p in model.named_parameters() if not torch.equal(p, before["tensors"][n])]


@pytest.mark.parametrize("kind", KINDS, ids=["lora", "full", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_a_merged_memory_gives_the_same_outputs(family, dtype, kind):
    model = make_family_model(family, dtype).eval()
    memory = make_memory(model, layer_fraction=0.5, inner_epochs=3, **kind)
    before = snapshot(model)
    bare = logits(model, CANVAS)
    with memory.adapt(PROMPT, merge=False):
        unmerged = logits(model, CANVAS)
        assert not differing(model, before)
    with memory.adapt(PROMPT, merge=True):
        merged = logits(model, CANVAS)
        adapted = memory._objective.fast_weights.modules.values()
        assert len(differing(model, before)) == sum(
            len(merging._parameters(module)) for module in adapted
        )
    assert_same(before, snapshot(model))
    effect, error = (unmerged - bare).double().norm(), (merged - unmerged).double().norm()
    bound = 1e-12 if dtype == torch.float64 else 2**-8
    assert error <= 8 * bound * unmerged.double().norm()
    assert effect > 4 * error


def test_a_single_prompt_is_merged_by_itself_where_nothing_is_lost():
    for dtype, expected in ((torch.float64, True), (torch.float32, True), (torch.bfloat16, False)):
        model = make_model(dtype=dtype).eval()
        memory, before = make_memory(model), snapshot(model)
        with memory.adapt(PROMPT):
            assert bool(differing(model, before)) == expected
        with memory.adapt(PROMPTS):
            assert not differing(model, before)


def test_a_merged_memory_is_read_in_every_row():
    model = make_model().eval()
    memory = make_memory(model)
    with memory.adapt(PROMPT, merge=True):
        alone = logits(model, CANVAS)
        torch.testing.assert_close(logits(model, [CANVAS] * 3), alone.expand(3, -1, -1))


def test_weights_inside_of_peft_layers():
    lora = LoraConfig(
        r=2, lora_dropout=0.5, target_modules=["up_proj", "q_proj"], init_lora_weights=False
    )
    model = get_peft_model(make_model(), lora).double().train()
    memory = make_memory(model, target="ffn+attention")
    before = snapshot(model)
    outputs = []
    for merge in (False, None):
        with memory.adapt(PROMPT, merge=merge):
            outputs.append(logits(model, CANVAS))
            differ = differing(model, before)
    torch.testing.assert_close(*outputs)
    assert len(differ) == 7
    assert not [name for name in differ if "lora" in name]
    assert_same(before, snapshot(model))


def test_experts_inside_of_peft_layers():
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    model = get_peft_model(make_family_model("olmoe"), lora).double().eval()
    memory = make_memory(model)
    before = snapshot(model)
    outputs = []
    for merge in (False, True):
        with memory.adapt(PROMPT, merge=merge):
            outputs.append(logits(model, CANVAS))
    torch.testing.assert_close(*outputs)
    assert_same(before, snapshot(model))


def test_odd_bits_come_back():
    model = make_model(dtype=torch.bfloat16).eval()
    weight = model.model.layers[-1].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, :4] = torch.tensor([-0.0, 1e-40, -1e-39, 3e38])
    memory = make_memory(model)
    before = snapshot(model)
    with memory.adapt(PROMPT, merge=True):
        pass
    assert_same(before, snapshot(model))


def test_an_exception_while_merging_leaves_the_model_as_it_was(monkeypatch):
    model = make_model().train()
    memory, before = make_memory(model), snapshot(model)
    add, calls = merging._add, []

    def fail(*args):
        calls.append(add(*args))
        if len(calls) == 2:
            raise KeyError("merging")

    monkeypatch.setattr(merging, "_add", fail)
    with pytest.raises(KeyError, match="merging"), memory.adapt(PROMPT, merge=True):
        pytest.fail("entered")
    assert_same(before, snapshot(model))


def test_a_backward_that_is_still_to_come_reads_the_weights_as_they_were():
    model = make_model().eval()
    ids = torch.tensor([CANVAS])
    weight = model.model.layers[-1].mlp.up_proj.weight

    def gradient(between):
        loss = model(ids, is_causal=False, use_cache=False).logits.square().mean()
        between()
        return torch.autograd.grad(loss, weight)[0]

    expected = gradient(lambda: None)
    memory = make_memory(model)

    def adapt():
        with memory.adapt(PROMPT, merge=True):
            pass

    torch.testing.assert_close(gradient(adapt), expected, rtol=0, atol=0)


def refused(memory, prompts, message):
    with (
        pytest.raises(ValueError, match=f"merge must be None or False {message}.*, got True"),
        memory.adapt(prompts, merge=True),
    ):
        pytest.fail("entered")


def test_several_prompts_are_refused():
    refused(make_memory(make_model()), PROMPTS, r"for several prompts \(3\)")


def test_shared_weights_are_refused():
    model = make_model()
    last, before = model.model.layers[-1].mlp, model.model.layers[-2].mlp
    last.up_proj.weight = before.up_proj.weight
    memory = make_memory(model)
    refused(memory, PROMPT, r"for a weight that is also another's \(3.mlp.up_proj\)")
    own = snapshot(model)
    with memory.adapt(PROMPT):
        assert not differing(model, own)


def test_views_of_one_storage_are_no_shared_weights():
    model = make_model().eval()
    mlp = model.model.layers[-1].mlp
    both = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).detach()
    mlp.gate_proj.weight, mlp.up_proj.weight = (nn.Parameter(part) for part in both.chunk(2))
    memory, before = make_memory(model), snapshot(model)
    with memory.adapt(PROMPT, merge=True):
        assert len(differing(model, before)) == 3
    assert_same(before, snapshot(model))


def test_dora_is_refused():
    lora = LoraConfig(r=2, target_modules=["up_proj"], use_dora=True)
    memory = make_memory(get_peft_model(make_model(), lora).double())
    refused(memory, PROMPT, "under a LoRA variant such as DoRA")


def test_four_bits_are_refused(tmp_path):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=four_bit_config(torch.float32), dtype=torch.float32
    )
    prepare_four_bit(model)
    memory = make_memory(model)
    refused(memory, PROMPT, r"for weights in 4 bits or otherwise not plain \(1.mlp.gate_proj\)")
    bare = logits(model, CANVAS)
    with memory.adapt(PROMPT):
        assert not torch.equal(logits(model, CANVAS), bare)
    assert torch.equal(logits(model, CANVAS), bare)
