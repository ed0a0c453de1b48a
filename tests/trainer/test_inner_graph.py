"""The recorded inner loop: padded rows change nothing, and it reads nothing but its own copies."""

import pytest
import torch

from memdlm import inner_graph
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import GRAPH_ROWS, _graph_rows
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


@pytest.mark.parametrize("inner_loss", ["cross_entropy", "kl", "hidden_cosine"])
@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("family", ["llada", "llada_moe"])
def test_a_recorded_step_is_the_step(monkeypatch, family, scope, inner_loss):
    monkeypatch.setattr(inner_graph, "_Recording", Rerun)
    monkeypatch.setattr(Rerun, "made", 0)
    expected = steps(family, scope=scope, inner_loss=inner_loss)
    actual = steps(family, scope=scope, inner_loss=inner_loss, inner_graph=True)
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


def record_one(monkeypatch, **options):
    monkeypatch.setattr(inner_graph, "_Recording", Rerun)
    monkeypatch.setattr(Rerun, "made", 0)
    memory = MemoryConfig(rank=4, layer_fraction=0.5, inner_graph=True, **options)
    objective = MemDLMObjective(make_family_model("llada"), DIFFUSION, memory)
    batch = make_batch(DIFFUSION, memory)
    objective.write_memory(batch)
    assert Rerun.made == 1
    objective.write_memory(batch)
    assert Rerun.made == 1
    return objective, batch


def test_what_runs_differently_is_recorded_anew(monkeypatch):
    objective, batch = record_one(monkeypatch)
    objective.eval()  # without dropout
    objective.write_memory(batch)
    assert Rerun.made == 2
    with torch.autocast("cpu", torch.bfloat16):
        objective.write_memory(batch)
    assert Rerun.made == 3
    objective.train()
    objective.write_memory(batch)
    assert Rerun.made == 3
    # Weights that moved: nothing that was recorded is good any more.
    parameter = objective.backbone.layers[-1].mlp.down_proj.weight
    parameter.data = parameter.data.clone()
    objective.write_memory(batch)
    objective.eval()
    objective.write_memory(batch)
    assert Rerun.made == 5


def test_few_recordings_are_kept(monkeypatch):
    monkeypatch.setattr(inner_graph, "_MOST_RECORDINGS", 2)
    objective, batch = record_one(monkeypatch)
    other = make_batch(DIFFUSION, objective.memory, make_features(((20, 0),) * 5))
    third = make_batch(DIFFUSION, objective.memory, make_features(((22, 0),) * 5))
    for one, made in ((other, 2), (batch, 2), (third, 3), (batch, 3), (other, 4)):
        objective.write_memory(one)
        assert Rerun.made == made


def test_a_recording_that_fails_leaves_no_promise_about_the_memory(monkeypatch):
    def fail(run, device, other):
        run()
        objective.fast_weights.blank = True  # a reset that was recorded, and never ran
        raise RuntimeError("no graph")

    objective, batch = record_one(monkeypatch)
    monkeypatch.setattr(inner_graph, "_Recording", fail)
    objective.eval()
    with pytest.raises(RuntimeError, match="no graph"):
        objective.write_memory(batch)
    assert not objective.fast_weights.blank


def test_rows_are_padded_to_few_shapes():
    memory = MemoryConfig(inner_graph=True)
    batch = make_batch(DIFFUSION, memory)
    for state in [batch["anchor"], *batch["trajectory"]]:
        real = int((state["target"] != -100).sum())
        assert 0 < real < GRAPH_ROWS
        assert state["rows"].shape[1] == GRAPH_ROWS
        assert {len(state[key]) for key in ("valid", "target", "weight", "sample")} == {GRAPH_ROWS}
        assert not state["weight"][real:].any()
    sizes = {_graph_rows(count) for count in range(5000)}
    assert sorted(sizes) == [256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert all(c <= _graph_rows(c) <= max(c + 256, 1.5 * c) for c in range(5000))


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(ValueError, match="inner_graph must be False on cpu"):
        steps("llada", inner_graph=True)
