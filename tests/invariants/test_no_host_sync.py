"""The step never waits for the device: run on tensors that have no values, nothing can be read."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM

from memdlm import gated_ffn
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.objective import MDLMObjective, MemDLMObjective
from memdlm_kernels import _backends, masked_linear_cross_entropy
from tests.families import make_config
from tests.tiny import make_batch

DIFFUSION = DiffusionConfig()
MODELS = {"dense": "llada", "experts": "llada_moe", "groups of experts": "llada2"}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Without the C++ ops, the ops take what they would on a GPU; the interpreter is never run."""
    monkeypatch.setattr(_backends, "library_missing", "left out by this test")
    monkeypatch.setattr(gated_ffn, "fuses", lambda x: True)
    # Values of arguments are checked on the CPU only, and not while compiling.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


class LossesWithoutWait(TorchDispatchMode):
    """Refuses a cross-entropy that would count on a GPU which of its rows are not ignored."""

    seen = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        names = [argument.name for argument in op._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        if "compact" in given:
            assert given["index"] is not None or not given["compact"], op
            self.seen += 1
        return op(*args, **(kwargs or {}))


def on_fake_tensors(kind, memory, dtype=torch.bfloat16, **options):
    mode = FakeTensorMode()
    batch = tree_map_only(torch.Tensor, mode.from_tensor, make_batch(DIFFUSION, memory))
    with mode:
        config = make_config(MODELS[kind], **options)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if memory is None:
            objective = MDLMObjective(model.train(), DIFFUSION)
        else:
            objective = MemDLMObjective(model.train(), DIFFUSION, memory)
        with LossesWithoutWait() as losses:
            objective(batch).loss.backward()
    assert losses.seen > 0
    return objective


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", MODELS)
def test_mdlm(kind):
    on_fake_tensors(kind, None)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_memdlm(kind, scope, adapter):
    memory = MemoryConfig(scope=scope, adapter=adapter, layer_fraction=0.5, rank=4)
    on_fake_tensors(kind, memory)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", MODELS)
def test_memdlm_with_reused_keys(kind):
    memory = MemoryConfig(layer_fraction=0.5, rank=4, prefix_reuse="prompt_kv")
    on_fake_tensors(kind, memory)


def test_a_wait_would_be_seen():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(3).sum().item()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_wait_of_the_loss_would_be_seen():
    with FakeTensorMode():
        rows, head = torch.ones(3, 4), torch.ones(5, 4)
        target = torch.ones(3, dtype=torch.int64)
        with LossesWithoutWait(), pytest.raises(AssertionError):
            masked_linear_cross_entropy(rows, head, target)
