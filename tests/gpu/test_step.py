"""The training step on a GPU: it never waits for it, and computes what the CPU does."""

import pytest
import torch
from accelerate.utils import send_to_device

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.objective import MemDLMObjective
from tests.families import make_family_model
from tests.kernels.devices import HAS_GPU
from tests.tiny import RAGGED, gradients, make_batch, make_features

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]

DIFFUSION = DiffusionConfig()
FAMILIES = ("llada", "llada_moe", "llada2")
# Rows of 16 bytes everywhere, as grouped_mm wants them and models have them.
ALIGNED = {"rank": 16, "lora_alpha": 32.0, "layer_fraction": 0.5, "inner_steps": 3}


def make_objective(family, dtype, device, **options):
    memory = MemoryConfig(**ALIGNED, **options)
    model = make_family_model(family, dtype).to(device)
    return MemDLMObjective(model, DIFFUSION, memory), model, memory


def take_step(objective, memory, device, features=None):
    objective.zero_grad()
    batch = make_batch(DIFFUSION, memory, features)
    output = objective(send_to_device(batch, device))
    output.loss.backward()
    return output


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_waits_for_the_gpu(family, scope):
    objective, _, memory = make_objective(family, torch.bfloat16, "cuda", scope=scope)
    take_step(objective, memory, "cuda")  # compiles kernels, allocates the fast weights
    batch = send_to_device(make_batch(DIFFUSION, memory), "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gpu_takes_the_step_of_the_cpu(family, scope):
    found = {}
    for device in ("cpu", "cuda"):
        objective, model, memory = make_objective(family, torch.float32, device, scope=scope)
        output = take_step(objective, memory, device)
        found[device] = {
            "loss": output.loss.detach().cpu(),
            "inner loss": output.inner.loss.cpu(),
            "norm": output.inner.norm.cpu(),
            "fast weights": objective.fast_weights.param.cpu(),
            **{name: gradient.cpu() for name, gradient in gradients(model).items()},
        }
    for name, expected in found["cpu"].items():
        atol = 1e-4 * expected.abs().max().item()
        torch.testing.assert_close(found["cuda"][name], expected, rtol=1e-3, atol=atol, msg=name)


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cuda_graph_takes_the_same_steps(family, scope):
    batches = [make_features(shapes, epoch) for epoch, shapes in enumerate((RAGGED, RAGGED[:2]))]
    found = []
    for graph in (False, True):
        objective, model, memory = make_objective(
            family, torch.float32, "cuda", scope=scope, inner_graph=graph
        )
        for features in batches * 2:
            output = take_step(objective, memory, "cuda", features)
        found.append((output.loss.detach(), output.inner.loss, gradients(model)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
