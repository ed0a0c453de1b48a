"""The recorded inner loop: padded rows change nothing, and it reads nothing but its own copies."""

import pytest
import torch

from memdlm import inner_graph
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import GRAPH_ROWS, _graph_rows
from memdlm.inner_log import InnerLog
from memdlm.inner_loop import InnerTrace
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
    captured = [trace.captured for _, trace, _, _ in actual]
    assert captured == [True, False, *([True, False] if scope == "batch" else [True, True])]
    for (loss, trace, own, param), (loss_2, trace_2, own_2, param_2) in zip(
        expected, actual, strict=True
    ):
        assert trace.captured is None
        torch.testing.assert_close(loss_2, loss, **close)
        torch.testing.assert_close(param_2, param, **close)
        for name in ("loss", "norm", "skipped"):
            torch.testing.assert_close(getattr(trace_2, name), getattr(trace, name), **close)
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


STRATEGIES = ["anchor_consistent", "anchor_only", "pre_anchor_only", "progressive"]


def sizes(state):
    (rows,) = {len(state[key]) for key in ("valid", "target", "weight", "sample")}
    return state["rows"].shape[1], rows


@pytest.mark.parametrize("inner_targets", ["all_masked", "newly_revealed"])
@pytest.mark.parametrize("inner_steps", [1, 2, 4])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_states_of_a_batch_are_padded_to_one_shape(strategy, inner_steps, inner_targets):
    own = {"strategy": strategy, "inner_steps": inner_steps, "inner_targets": inner_targets}
    features = make_features(((900, 100), (700, 0)))
    plain = make_batch(DIFFUSION, MemoryConfig(**own), features)
    padded = make_batch(DIFFUSION, MemoryConfig(**own, inner_graph=True), features)
    largest = [max(column) for column in zip(*map(sizes, plain["trajectory"]), strict=True)]
    assert {sizes(state) for state in padded["trajectory"]} == {tuple(map(_graph_rows, largest))}
    for state, bare in zip(padded["trajectory"], plain["trajectory"], strict=True):
        real = len(bare["target"])
        surplus = slice(real, None)
        assert torch.equal(state["target"][:real], bare["target"])
        assert torch.equal(state["weight"][:real], bare["weight"])
        places = [each["rows"].flatten()[each["valid"][:real]] for each in (state, bare)]
        assert torch.equal(*places)
        assert not state["weight"][surplus].any()
        assert (state["target"][surplus] == -100).all()
    # The outer pass reads the anchor's prefix: its width, and just its own rows.
    anchor, bare = padded["anchor"], plain["anchor"]
    with_anchor = any(state["is_anchor"] for state in padded["trajectory"])
    assert anchor["rows"].shape[1] == (_graph_rows(largest[0]) if with_anchor else sizes(bare)[0])
    assert torch.equal(anchor["target"], bare["target"])


def test_rows_are_padded_to_few_sizes():
    found = {_graph_rows(count) for count in range(5000)}
    assert sorted(found) == [256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]
    assert min(found) == GRAPH_ROWS
    assert all(c <= _graph_rows(c) <= max(c + 256, 1.5 * c) for c in range(5000))


def test_a_stream_of_batches_has_few_shapes():
    """Responses of many lengths: fewer shapes than recordings are kept, whatever K is."""
    lengths = torch.distributions.LogNormal(5.5, 0.8)
    torch.manual_seed(0)
    batches = []
    for number in range(60):
        responses = lengths.sample((4,)).clamp(8, 1000).long().tolist()
        shapes = tuple((1024, 1024 - response) for response in responses)
        batches.append([{**f, "example": 4 * number + f["example"]} for f in make_features(shapes)])
    shapes = {}
    for inner_steps in (2, 4):
        memory = MemoryConfig(inner_steps=inner_steps, inner_graph=True)
        made = [make_batch(DIFFUSION, memory, features)["trajectory"] for features in batches]
        shapes[inner_steps] = {tuple(map(sizes, states)) for states in made}
        assert all(len(set(own)) == 1 for own in shapes[inner_steps])
        assert 5 < len(shapes[inner_steps]) <= 12
    assert {own[0] for own in shapes[2]} == {own[0] for own in shapes[4]}


def test_captures_and_hits_are_logged(monkeypatch):
    monkeypatch.setattr(inner_graph, "_Recording", Rerun)
    memory = MemoryConfig(rank=4, layer_fraction=0.5, inner_graph=True)
    objective = MemDLMObjective(make_family_model("llada"), DIFFUSION, memory)
    log, unused = InnerLog(memory), InnerLog(MemoryConfig())
    for features in BATCHES:
        log.add(objective(make_batch(DIFFUSION, memory, features)).inner)
    logged = log.read(lambda total: 2 * total)  # two processes that saw the same
    assert (logged["inner_graph_captures"], logged["inner_graph_hits"]) == (4, 4)
    log.add(objective(make_batch(DIFFUSION, memory, BATCHES[0])).inner)
    logged = log.read(lambda total: total)
    assert (logged["inner_graph_captures"], logged["inner_graph_hits"]) == (0, 1)
    unused.add(InnerTrace(*(torch.zeros(2, 1) for _ in range(3))))
    assert not [name for name in unused.read(lambda total: total) if "graph" in name]


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_it_is_refused():
    with pytest.raises(ValueError, match="inner_graph must be False on cpu"):
        steps("llada", inner_graph=True)
