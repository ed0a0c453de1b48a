"""The recorded inner loop: padded rows change nothing, and it reads nothing but its own copies."""

import pytest
import torch

from memdlm import inner_graph
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import GRAPH_ROWS
from memdlm.objective import MemDLMObjective
from tests.families import make_family_model
from tests.kernels.devices import HAS_GPU
from tests.tiny import RAGGED, gradients, make_batch, make_features

DIFFUSION = DiffusionConfig()
BATCHES = [
    make_features(RAGGED, epoch=0),
    make_features(RAGGED, epoch=1),
    make_features(RAGGED[:2], epoch=2),
    make_features(RAGGED, epoch=3),
]


class Rerun:
    """In place of a CUDA graph: runs the function again, into what it returned the first time."""

    made = 0

    def __init__(self, run, device, other):
        Rerun.made += 1
        self._run, self._trace = run, run()

    def replay(self):
        trace = self._run()
        for name in ("loss", "norm", "skipped"):
            getattr(self._trace, name).copy_(getattr(trace, name))
        return self._trace


def steps(family, **options):
    """Loss, trace, gradients and fast weights of each batch."""
    memory = MemoryConfig(rank=4, layer_fraction=0.5, inner_steps=3, **options)
    model = make_family_model(family)
    objective = MemDLMObjective(model, DIFFUSION, memory)
    done = []
    for features in BATCHES:
        model.zero_grad()
        output = objective(make_batch(DIFFUSION, memory, features))
        output.loss.backward()
        own = {name: gradient.clone() for name, gradient in gradients(model).items()}
        done.append((output.loss.detach(), output.inner, own, objective.fast_weights.param.clone()))
    return done


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_a_recorded_step_is_the_step(monkeypatch, family, scope):
    monkeypatch.setattr(inner_graph, "_Recording", Rerun)
    monkeypatch.setattr(Rerun, "made", 0)
    expected = steps(family, scope=scope)
    actual = steps(family, scope=scope, inner_graph=True)
    # The last batch has the shapes of the first. In "sample" scope the third has taken its memory.
    assert Rerun.made == (2 if scope == "batch" else 3)
    close = {"rtol": 1e-9, "atol": 1e-12}
    for (loss, trace, own, param), (loss_2, trace_2, own_2, param_2) in zip(
        expected, actual, strict=True
    ):
        torch.testing.assert_close(loss_2, loss, **close)
        torch.testing.assert_close(param_2, param, **close)
        torch.testing.assert_close(vars(trace_2), vars(trace), **close)
        torch.testing.assert_close(own_2, own, **close)


def test_rows_are_padded_to_few_shapes():
    memory = MemoryConfig(inner_graph=True)
    batch = make_batch(DIFFUSION, memory)
    for state in [batch["anchor"], *batch["trajectory"]]:
        real = int((state["target"] != -100).sum())
        assert 0 < real < GRAPH_ROWS
        assert state["rows"].shape[1] == GRAPH_ROWS
        assert {len(state[key]) for key in ("valid", "target", "weight", "sample")} == {GRAPH_ROWS}
        assert not state["weight"][real:].any()


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(ValueError, match="inner_graph must be False on cpu"):
        steps("llada", inner_graph=True)
