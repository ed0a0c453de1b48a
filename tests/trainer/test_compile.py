"""A model whose layers are compiled computes the same step, fast weights included."""

import pytest
import torch
import torch._dynamo

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.objective import MemDLMObjective
from tests.families import make_family_model
from tests.tiny import gradients, make_batch

DIFFUSION = DiffusionConfig()


@pytest.fixture(autouse=True)
def strict_compiler():
    torch.compiler.reset()
    # Code that is compiled again for every batch must not end up uncompiled, and pass.
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        yield


def compile_layers(model):
    for layer in model.get_decoder().layers:
        layer.self_attn.compile(backend="aot_eager")
        layer.mlp.compile(backend="aot_eager")


def step(family, memory, *, compiled):
    # Compiling takes its time: one layer without fast weights, one with.
    few = {"num_hidden_layers": 2} if family == "llada" else {}
    model = make_family_model(family, **few)
    batch = make_batch(DIFFUSION, memory)
    if compiled == "before":
        compile_layers(model)
        model(input_ids=batch["input_ids"])
    objective = MemDLMObjective(model, DIFFUSION, memory)
    if compiled == "after":
        compile_layers(model)
    output = objective(batch)
    output.loss.backward()
    return output, gradients(model)


@pytest.mark.parametrize(
    ("scope", "compiled"),
    [("batch", "after"), ("sample", "after"), ("batch", "before")],
    ids=["batch", "sample", "compiled before the memory"],
)
@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_compiled_layers_take_the_same_step(family, scope, compiled):
    target = "ffn+attention" if family == "llada" else "ffn"
    memory = MemoryConfig(rank=4, layer_fraction=0.5, inner_steps=3, scope=scope, target=target)
    expected, expected_gradients = step(family, memory, compiled=None)
    actual, actual_gradients = step(family, memory, compiled=compiled)
    assert len(torch._dynamo.utils.counters["stats"]) > 0
    torch.testing.assert_close(actual.inner.loss, expected.inner.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-9, atol=0)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(actual_gradients[name], gradient, rtol=1e-8, atol=1e-10)


def test_compiled_layers_have_the_exact_gradient():
    own = {"target": "ffn+attention", "layer_fraction": 1.0, "meta_gradient": "exact"}
    memory = MemoryConfig(rank=4, inner_steps=2, **own)
    _, expected = step("llada", memory, compiled=None)
    _, actual = step("llada", memory, compiled="after")
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-8, atol=1e-10)


def test_many_compiled_attentions_hand_over_their_keys():
    """More layers than a function may be compiled for: one compilation serves them all."""

    def losses(compiled):
        model = make_family_model("llada", num_hidden_layers=10)
        memory = MemoryConfig(rank=4, prefix_reuse="prompt_kv")
        objective = MemDLMObjective(model, DIFFUSION, memory)
        if compiled:
            for layer in model.get_decoder().layers:
                layer.self_attn.compile(backend="eager")
        output = objective(make_batch(DIFFUSION, memory))
        output.loss.backward()
        return output.inner.loss

    with torch._dynamo.config.patch(recompile_limit=8):
        torch.testing.assert_close(losses(True), losses(False), rtol=1e-9, atol=0)
