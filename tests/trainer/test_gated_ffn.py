"""The step with fused activations, as a GPU takes it, is the step that the CPU takes."""

import itertools

import pytest
import torch

from memdlm import gated_ffn
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.objective import MemDLMObjective
from tests.families import make_family_model
from tests.tiny import gradients, make_batch

DIFFUSION = DiffusionConfig()


def step(family, dtype, **options):
    memory = MemoryConfig(rank=4, layer_fraction=0.5, inner_steps=3, **options)
    model = make_family_model(family, dtype)
    objective = MemDLMObjective(model, DIFFUSION, memory)
    output = objective(make_batch(DIFFUSION, memory))
    output.loss.backward()
    trace = {"loss": output.inner.loss, "norm": output.inner.norm}
    return {"outer loss": output.loss.detach(), **trace} | gradients(model)


# In float64 it is the reference; in float32 the kernels, by Triton's interpreter.
EXACT = {"rtol": 1e-9, "atol": 1e-12}
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
CASES = [
    *itertools.product(
        ["llada", "llada_moe", "llada2", "olmoe"],
        ["batch", "sample"],
        ["lora", "full"],
        [torch.float64],
    ),
    ("llada", "sample", "lora", torch.float32),
    ("llada_moe", "batch", "lora", torch.float32),
]


@pytest.mark.parametrize(("family", "scope", "adapter", "dtype"), CASES)
def test_fused_activations_change_nothing(monkeypatch, family, scope, adapter, dtype):
    expected = step(family, dtype, scope=scope, adapter=adapter)
    calls = []
    op = gated_ffn.lora_swiglu
    monkeypatch.setattr(gated_ffn, "fuses", lambda x: True)
    monkeypatch.setattr(gated_ffn, "lora_swiglu", lambda *a, **k: calls.append(a) or op(*a, **k))
    actual = step(family, dtype, scope=scope, adapter=adapter)
    assert bool(calls) == (family != "olmoe")  # which has no dense FFN
    torch.testing.assert_close(actual, expected, **EXACT if dtype == torch.float64 else CLOSE)
