"""`inner_checkpoint: auto`: decided once for a shape, on the memory that is really available."""

import pytest
import torch

from memdlm import inner_loop
from memdlm.backbone import Activations
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.inner_loop import Boundary, free_bytes, recomputes
from memdlm.objective import MemDLMObjective
from tests.tiny import make_batch, make_features, make_model

DIFFUSION = DiffusionConfig()
CPU, GPU = torch.device("cpu"), torch.device("cuda")
MEMORY = MemoryConfig(rank=4, layer_fraction=0.5)


@pytest.fixture
def memory_of_the_machine(monkeypatch):
    """Free bytes that the test sets, and how often they were asked for."""
    machine = {"free": 2**40, "asked": 0}

    def free(device):
        machine["asked"] += 1
        return machine["free"]

    monkeypatch.setattr(inner_loop, "free_bytes", free)
    return machine


def boundaries(batch_size, length, dtype=torch.float32):
    hidden = torch.empty(batch_size, length, 32, dtype=dtype)
    return [Boundary(Activations(hidden), None)] * 2


def frozen_backbone():
    model = make_model(dtype=torch.float32).requires_grad_(False)
    return MemDLMObjective(model, DIFFUSION, MEMORY).backbone


def stored_bytes(backbone, batch_size, length):
    layers = (backbone.half_count - backbone.boundary + 1) // 2
    return 4 * batch_size * length * layers * backbone.activation_width


def test_the_memory_is_asked_for_once_a_shape(memory_of_the_machine):
    objective = MemDLMObjective(make_model(), DIFFUSION, MEMORY)
    for _ in range(3):
        objective(make_batch(DIFFUSION, MEMORY)).loss.backward()
    assert memory_of_the_machine["asked"] == 1
    objective(make_batch(DIFFUSION, MEMORY, make_features(((20, 3),) * 2)))
    assert memory_of_the_machine["asked"] == 2
    objective.eval()  # the same shapes, with nothing to come
    objective(make_batch(DIFFUSION, MEMORY))
    assert memory_of_the_machine["asked"] == 3
    other = MemDLMObjective(make_model(), DIFFUSION, MEMORY)
    other(make_batch(DIFFUSION, MEMORY))
    assert memory_of_the_machine["asked"] == 4


def test_a_decision_stays(memory_of_the_machine):
    backbone = frozen_backbone()
    memory_of_the_machine["free"] = 4 * stored_bytes(backbone, 2, 8) - 1
    assert recomputes("auto", backbone, boundaries(2, 8))
    memory_of_the_machine["free"] = 2**40
    assert recomputes("auto", backbone, boundaries(2, 8))
    assert recomputes("auto", backbone, boundaries(4, 4))  # as many rows
    assert not recomputes("auto", backbone, boundaries(2, 9))
    memory_of_the_machine["free"] = 0
    assert not recomputes("auto", backbone, boundaries(2, 9))
    assert memory_of_the_machine["asked"] == 2


def test_a_quarter_of_the_free_memory_is_stored_in(memory_of_the_machine):
    backbone = frozen_backbone()
    memory_of_the_machine["free"] = 4 * stored_bytes(backbone, 3, 7)
    assert not recomputes("auto", backbone, boundaries(3, 7))
    assert recomputes("auto", backbone, boundaries(3, 8))


def test_another_dtype_is_another_shape(memory_of_the_machine):
    backbone = frozen_backbone()
    memory_of_the_machine["free"] = 4 * stored_bytes(backbone, 2, 8)
    assert not recomputes("auto", backbone, boundaries(2, 8))
    assert recomputes("auto", backbone, boundaries(2, 8, torch.float64))


def test_what_training_has_yet_to_take_is_left_to_it(memory_of_the_machine):
    """The first step begins before there are gradients and an optimizer's moments."""
    backbone = frozen_backbone()
    trained = backbone.layers[0].mlp.down_proj.weight.requires_grad_()
    memory_of_the_machine["free"] = 4 * stored_bytes(backbone, 2, 8) + 3 * trained.nbytes
    assert not recomputes("auto", backbone, boundaries(2, 8))
    assert recomputes("auto", backbone, boundaries(2, 9))
    backbone.decoder.eval()
    memory_of_the_machine["free"] = 4 * stored_bytes(backbone, 2, 9)
    assert not recomputes("auto", backbone, boundaries(2, 9))


def test_a_fixed_choice_asks_for_nothing(memory_of_the_machine):
    backbone = frozen_backbone()
    assert recomputes("layer", backbone, boundaries(2, 8))
    assert not recomputes("none", backbone, boundaries(2, 8))
    assert memory_of_the_machine["asked"] == 0


MEMINFO = "MemTotal:       24689764 kB\nMemFree:        11324620 kB\nMemAvailable:   16882063 kB\n"


def test_a_cpu_has_what_the_system_would_give_up(monkeypatch):
    monkeypatch.setattr(inner_loop, "_meminfo", lambda: MEMINFO)
    assert free_bytes(CPU) == 16_882_063 * 1024
    # Where the system does not say: its free pages.
    monkeypatch.setattr(inner_loop, "_meminfo", lambda: "")
    monkeypatch.setattr(
        inner_loop.os, "sysconf", {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__
    )
    assert free_bytes(CPU) == 4_096_000


def test_this_machine_has_memory():
    assert 2**20 < free_bytes(CPU) < 2**50


def test_a_gpu_has_what_the_allocator_holds_unused_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_bytes(GPU) == 3500
