"""Stacked experts as grouped products, against one expert and one row at a time."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from memdlm.experts import IMPLEMENTATION, Update, run_experts, stacked_experts

EXPERTS, HIDDEN, INNER, TOP_K, ROWS, SETS = 5, 8, 16, 2, 12, 3


def make_experts(dtype=torch.float64, seed=0):
    config = OlmoeConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = IMPLEMENTATION
    experts = OlmoeExperts(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return experts


def make_inputs(dtype=torch.float64, unused=(1,), seed=1):
    """Rows, router weights and indices; the experts in `unused` get no row."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(ROWS, HIDDEN, dtype=dtype, generator=generator)
    scores = torch.rand(ROWS, EXPERTS, dtype=dtype, generator=generator)
    scores[:, list(unused)] = -1
    weight, index = scores.topk(TOP_K)
    return rows.requires_grad_(), weight.detach().requires_grad_(), index


def make_updates(kind, sets=None, dtype=torch.float64, rank=2, seed=2):
    """(projection, tensors) of both parameters, all of them leaves."""
    generator = torch.Generator().manual_seed(seed)
    leading = (EXPERTS,) if sets is None else (sets, EXPERTS)
    updates = []
    for name, outputs, inputs, stacked in (
        ("gate_up_proj", 2 * INNER, HIDDEN, 2),
        ("down_proj", HIDDEN, INNER, 1),
    ):
        shapes = (
            [(stacked * rank, inputs), (outputs, rank)] if kind == "lora" else [(outputs, inputs)]
        )
        tensors = tuple(
            torch.randn(*leading, *shape, dtype=dtype, generator=generator).requires_grad_()
            for shape in shapes
        )
        updates.append(Update(name, tensors, 0.5))
    return updates


def weight_of(experts, name, expert, row, updates):
    """W of one expert as one row of its sequence sees it, with every update added."""
    weight = getattr(experts, name)[expert]
    for update in updates:
        if update.projection != name:
            continue
        own = update.tensors
        if own[0].dim() == 4:
            own = [tensor[row // (ROWS // len(tensor))] for tensor in own]
        if len(own) == 1:
            weight = weight + own[0][expert]
            continue
        A, B = own[0][expert], own[1][expert]
        parts = len(A) // B.shape[1]  # gate and up, each with its own A
        blocks = zip(A.chunk(parts), B.chunk(parts), strict=True)
        weight = weight + update.scale * torch.cat([b @ a for a, b in blocks])
    return weight


def plainly(experts, rows, weight, index, updates=()):
    out = []
    for row in range(len(rows)):
        total = rows.new_zeros(HIDDEN)
        for choice in range(TOP_K):
            expert = int(index[row, choice])
            gate, up = (weight_of(experts, "gate_up_proj", expert, row, updates) @ rows[row]).chunk(
                2
            )
            inner = gate * torch.sigmoid(gate) * up
            down = weight_of(experts, "down_proj", expert, row, updates) @ inner
            total = total + weight[row, choice] * down
        out.append(total)
    return torch.stack(out)


def leaves_of(experts, rows, weight, updates):
    return [rows, weight, *experts.parameters(), *(t for u in updates for t in u.tensors)]


@pytest.mark.parametrize("kind", [None, "lora", "full"])
@pytest.mark.parametrize("sets", [None, 1, SETS])
@pytest.mark.parametrize("unused", [(), (1,), (0, 4)])
def test_outputs_and_gradients_are_those_of_single_rows(kind, sets, unused):
    experts = make_experts()
    rows, weight, index = make_inputs(unused=unused)
    updates = [] if kind is None else make_updates(kind, sets)
    leaves = leaves_of(experts, rows, weight, updates)
    actual = experts(rows, index, weight, updates=tuple(updates))
    expected = plainly(experts, rows, weight, index, updates)
    grad = torch.randn(expected.shape, dtype=expected.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    pairs = zip(
        torch.autograd.grad(actual, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    )
    for own, truth in pairs:
        torch.testing.assert_close(own, truth, rtol=0, atol=1e-11)
    for update in updates:  # experts without a row
        for tensor in update.tensors:
            (own,) = torch.autograd.grad(
                experts(rows, index, weight, updates=tuple(updates)), tensor, grad
            )
            assert not own[..., list(unused), :, :].any()


def test_several_updates_of_one_parameter_add_up():
    experts = make_experts()
    rows, weight, index = make_inputs()
    updates = (*make_updates("lora"), *make_updates("lora", SETS, seed=5), *make_updates("full"))
    actual = experts(rows, index, weight, updates=updates)
    expected = plainly(experts, rows, weight, index, updates)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sets", [None, SETS])
def test_narrow_dtypes_stay_within_their_rounding(dtype, sets):
    rounded = make_experts(dtype)
    experts = make_experts(dtype).double()
    rows, weight, index = make_inputs(dtype)
    updates = make_updates("lora", sets, torch.float32)  # fast weights are float32
    actual = rounded(rows, index, weight, updates=tuple(updates))
    assert actual.dtype == dtype
    wide = [Update(u.projection, tuple(t.double() for t in u.tensors), u.scale) for u in updates]
    truth = plainly(experts, rows.double(), weight.double(), index, wide)
    error = (actual.double() - truth).abs().max() / truth.abs().max()
    assert error <= 8 * torch.finfo(dtype).eps


def test_transformers_loop_over_experts_gives_the_same():
    experts = make_experts(torch.float32)
    rows, weight, index = make_inputs(torch.float32)
    ours = experts(rows, index, weight)
    experts.config._experts_implementation = "eager"
    torch.testing.assert_close(ours, experts(rows, index, weight))


@pytest.mark.parametrize("sets", [None, SETS])
def test_under_autocast_experts_compute_in_its_dtype(sets):
    experts = make_experts(torch.float32)
    rows, weight, index = make_inputs(torch.float32)
    updates = tuple(make_updates("lora", sets, torch.float32))
    exact = experts(rows, index, weight, updates=updates)
    seen = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.dtype) or t, lambda t: t),
    ):
        narrow = experts(rows, index, weight, updates=updates)
    assert torch.bfloat16 in seen
    assert 0 < (narrow - exact).abs().max() < 0.05 * exact.abs().max()
    narrow.sum().backward()
    assert rows.grad.isfinite().all()


def test_router_weights_wider_than_the_rows_are_kept_and_the_rows_are_not_widened():
    experts = make_experts(torch.bfloat16)
    rows, weight, index = make_inputs(torch.bfloat16)
    wide = weight.detach().float().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = experts(rows, index, wide)
    assert out.dtype == torch.bfloat16
    assert not any(t.dtype == torch.float32 and t.dim() == 3 for t in saved)
    (grad,) = torch.autograd.grad(out.float().sum(), wide)
    assert grad.dtype == torch.float32


def peft_experts(targets, rank=3):
    torch.manual_seed(0)
    inner = nn.ModuleDict({"experts": make_experts(torch.float32)})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=targets)
    model = get_peft_model(inner, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model, model.base_model.model["experts"]


@pytest.mark.parametrize(
    "targets", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"]]
)
def test_peft_on_stacked_experts_is_computed_in_factored_form(targets):
    model, wrapped = peft_experts(targets)
    rows, weight, index = make_inputs(torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(targets)
    leaves = [rows, weight, *trained]
    ours = run_experts(wrapped, rows, weight, index)
    grad = torch.randn(ours.shape)
    # Before PEFT's own forward, which writes to the parameters.
    own_gradients = torch.autograd.grad(ours, leaves, grad)
    theirs = wrapped(rows, index, weight)
    torch.testing.assert_close(ours, theirs)
    for own, truth in zip(own_gradients, torch.autograd.grad(theirs, leaves, grad), strict=True):
        torch.testing.assert_close(own, truth, rtol=1e-4, atol=1e-5)


def test_a_disabled_or_merged_adapter_is_not_added():
    model, wrapped = peft_experts(["experts.gate_up_proj", "experts.down_proj"])
    rows, weight, index = make_inputs(torch.float32)
    adapted = run_experts(wrapped, rows, weight, index)
    with model.disable_adapter():
        bare = run_experts(wrapped, rows, weight, index)
        torch.testing.assert_close(bare, stacked_experts(wrapped)(rows, index, weight))
    assert not torch.allclose(bare, adapted)
    model.merge_adapter()
    torch.testing.assert_close(run_experts(wrapped, rows, weight, index), adapted)
