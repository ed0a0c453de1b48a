"""PEFT's linear layers under the fused op, against PEFT's own forward."""

import copy

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from memdlm import outer_lora
from memdlm.outer_lora import fused_outer_lora, prepare_outer_lora


def make_model(dtype=torch.float64, **options):
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": nn.Linear(12, 20).to(dtype)})
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["layer"], **options)
    model = get_peft_model(base, config).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.train()


def pair(**options):
    """(ours, PEFT's own), the layer of each."""
    theirs = make_model(**options)
    ours = copy.deepcopy(theirs)
    prepare_outer_lora(ours)
    return [model.base_model.model["layer"] for model in (ours, theirs)]


def run(layer, x):
    torch.manual_seed(1)  # of the dropout
    with fused_outer_lora():
        out = layer(x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.fixture
def calls(monkeypatch):
    """How often the op ran."""
    counted = []
    real = outer_lora.lora_linear
    monkeypatch.setattr(
        outer_lora, "lora_linear", lambda *args: counted.append(args) or real(*args)
    )
    return counted


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_pefts(calls, dropout, training):
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    ours, theirs = (layer.train(training) for layer in pair(lora_dropout=dropout))
    for actual, expected in zip(run(ours, x), run(theirs, x), strict=True):
        torch.testing.assert_close(actual, expected)
    assert len(calls) == 1


def test_a_bfloat16_layer_with_a_float32_lora_is_as_close_to_the_truth_as_pefts(calls):
    x = torch.randn(64, 12).bfloat16().requires_grad_()
    ours, theirs = pair(dtype=torch.bfloat16)
    for layer in (ours, theirs):
        layer.lora_A.float()
        layer.lora_B.float()
    truth = run(copy.deepcopy(theirs).double(), x.detach().double().requires_grad_())
    for actual, expected, true in zip(run(ours, x), run(theirs, x), truth, strict=True):
        assert actual.dtype == expected.dtype
        error = (actual.double() - true).norm()
        bar = 2 * (expected.double() - true).norm() + 2**-8 * true.norm()
        assert error <= bar
    assert len(calls) == 1


def test_two_active_adapters_add_up(calls):
    model = make_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model.double()
    ours = copy.deepcopy(model)
    prepare_outer_lora(ours)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    layers = [m.base_model.model["layer"] for m in (ours, model)]
    for actual, expected in zip(*(run(layer, x) for layer in layers), strict=True):
        torch.testing.assert_close(actual, expected)
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_what_the_op_does_not_compute_goes_pefts_way(calls, options):
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    ours, theirs = pair(**options)
    for actual, expected in zip(run(ours, x), run(theirs, x), strict=True):
        assert torch.equal(actual, expected)
    assert not calls


@fused_outer_lora()
def test_merged_and_disabled_adapters_are_not_added(calls):
    x = torch.randn(5, 12, dtype=torch.float64)
    ours, theirs = pair()
    adapted = theirs(x)
    ours.merge()
    torch.testing.assert_close(ours(x), adapted)
    ours.unmerge()
    ours.enable_adapters(False)
    torch.testing.assert_close(ours(x), ours.base_layer(x))
    assert not calls


def test_outside_of_its_context_a_prepared_layer_goes_pefts_way(calls):
    x = torch.randn(5, 12, dtype=torch.float64)
    ours, theirs = pair()
    assert torch.equal(ours(x), theirs(x))
    assert not calls


def test_preparing_twice_changes_nothing_and_the_checkpoint_is_pefts(calls):
    model = make_model()
    names = list(model.state_dict())
    prepare_outer_lora(model)
    prepare_outer_lora(model)
    x = torch.randn(5, 12, dtype=torch.float64)
    with fused_outer_lora():
        out = model.base_model.model["layer"](x)
    torch.testing.assert_close(out, make_model().base_model.model["layer"](x))
    assert len(calls) == 1
    assert list(model.state_dict()) == names


def test_other_adapters_are_left_alone(calls):
    base = nn.ModuleDict({"layer": nn.Linear(12, 20)})
    config = AdaLoraConfig(target_modules=["layer"], total_step=10)
    model = get_peft_model(base, config)
    prepare_outer_lora(model)
    with fused_outer_lora():
        assert model.base_model.model["layer"](torch.randn(5, 12)).isfinite().all()
    assert not calls
