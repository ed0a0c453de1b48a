"""The step benchmark: what it writes, and that its figures mean what they say."""

import contextlib
import dataclasses
import json

import pytest
import torch
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from bench import compare, graph_shapes, step, variants
from bench.breakdown import Event, analyse, profile_steps
from bench.cases import SUITES, StepCase
from bench.operator_counts import OperatorCounts
from bench.results import check_row
from bench.timing import interleaved_ms, peak_mib, rss_mib
from memdlm import inner_graph
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.objective import MemDLMObjective
from memdlm_kernels import lora_linear

CPU = torch.device("cpu")
CASE = StepCase("tiny", 2, 64, 0.8, "full")
INNER_PARTS = ["noisier_prefix", "inner_suffix", "inner_loss", "inner_backward", "update"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "step.jsonl"
    rows = step.measure(
        CASE,
        inner_steps=[1, 2],
        repeats=2,
        device=CPU,
        dtype=torch.float32,
        batches=1,
        extra_steps=[2],
        suite="quick",
        run="2026-01-01T00:00:00+00:00",
        path=path,
    )
    return rows, path


def test_each_variant_gives_one_row_that_is_written(measured):
    rows, path = measured
    assert [(row["variant"], row["k"]) for row in rows] == [
        ("mdlm_all_rows", None),
        ("mdlm", None),
        ("memdlm", 1),
        ("memdlm_naive", 2),
        ("memdlm", 2),
        ("memdlm_prompt_kv", 2),
        ("memdlm_exact", 2),
    ]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    for row in rows:
        check_row(row)
        assert len(row["times_ms"]) == 2
        assert row["tokens"] == 128
        assert row["launches"] is None


def test_rows_order_the_variants_as_their_work_does(measured):
    rows = {(row["variant"], row["k"]): row for row in measured[0]}
    flops = {key: row["flops"] for key, row in rows.items()}
    assert flops["mdlm", None] < flops["mdlm_all_rows", None]
    assert flops["mdlm", None] < flops["memdlm", 1] < flops["memdlm", 2] < flops["memdlm_naive", 2]
    assert flops["memdlm_prompt_kv", 2] < flops["memdlm", 2] < flops["memdlm_exact", 2]
    assert rows["memdlm", 2]["peak_mib"] < rows["memdlm_naive", 2]["peak_mib"]
    assert set(INNER_PARTS) < set(rows["memdlm", 2]["parts_ms"])
    assert not set(INNER_PARTS) & set(rows["mdlm", None]["parts_ms"])
    assert list(rows["memdlm_naive", 2]["parts_ms"]) == ["forward", "backward", "optimizer", "rest"]


def test_only_the_plain_method_reads_values(measured):
    reads = {(row["variant"], row["k"]): row["host_reads"] for row in measured[0]}
    # For each of two steps: its loss twice, and the norms of three projections' A and B.
    assert reads.pop(("memdlm_naive", 2)) == 2 * (2 + 6)
    assert set(reads.values()) == {0}


def test_the_table_has_every_row_and_the_parts(measured, capsys):
    step.print_table(measured[0])
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[0] for line in lines if line]
    for row in measured[0]:
        assert row["variant"] in shown
    assert {"host_masks", "rest", *INNER_PARTS} < set(shown)


def test_marked_parts_cover_a_step():
    taken = variants.make_steps(CASE, [2], 1, CPU, torch.float32, naive=False)["memdlm K=2"]
    taken(0)
    parts = profile_steps(lambda: [taken(0) for _ in range(3)], 3, CPU).parts_ms
    assert parts["rest"] < 0.15 * sum(parts.values())


def test_checkpointing_is_counted_and_excludes_the_plain_method():
    checkpointed = dataclasses.replace(CASE, gradient_checkpointing=True)
    flops = {}
    for case in (CASE, checkpointed):
        steps = variants.make_steps(case, [2], 1, CPU, torch.float32, naive=False)
        for name, taken in steps.items():
            with FlopCounterMode(display=False) as counter, OperatorCounts(CPU) as counts:
                taken(0)
            flops[case, name] = counts.flops
            assert counts.flops == counter.get_total_flops()
    for name in steps:
        assert flops[checkpointed, name] > 1.1 * flops[CASE, name]
    with pytest.raises(ValueError, match="naive must be False with gradient_checkpointing"):
        variants.make_steps(checkpointed, [2], 1, CPU, torch.float32)


@pytest.mark.parametrize(("batch_size", "count"), [(1, 1), (2, 1), (8, 3)])
def test_half_of_the_maskable_tokens_are_masked(batch_size, count):
    case = StepCase("tiny", batch_size, 2_000, 0.5)
    batches = variants.make_batches(case, DiffusionConfig(), None, count, CPU)
    masked = sum(len(batch["anchor"]["target"]) for batch in batches)
    maskable = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert masked / maskable == pytest.approx(0.5, abs=0.03)


def test_losses_that_differ_are_refused():
    steps = {"mdlm_all_rows": lambda _: torch.tensor(1.0), "mdlm": lambda _: torch.tensor(1.1)}
    with pytest.raises(ValueError, match="must compute the same loss"):
        variants.check_losses(steps, CPU)


def test_what_does_not_fit_is_left_out(capsys):
    def too_large(_):
        raise torch.OutOfMemoryError("no 80 GB")

    steps = {"mdlm_all_rows": too_large, "mdlm": lambda _: torch.tensor(1.0)}
    assert list(variants.check_losses(steps, CPU)) == ["mdlm"]
    assert "mdlm_all_rows is left out: no 80 GB" in capsys.readouterr().err
    with pytest.raises(ValueError, match="mdlm must fit"):
        variants.check_losses({"mdlm": too_large}, CPU)


def test_an_extra_variant_that_cannot_run_costs_no_other(capsys):
    def no_plan(_):
        raise RuntimeError("no execution plan\nsecond line")

    plain = {name: variants.Step(lambda _: torch.tensor(1.0)) for name in ("mdlm_all_rows", "mdlm")}
    gpu = torch.device("cuda")
    steps = {**plain, "mdlm_cudnn": variants.Step(no_plan, is_extra=True)}
    assert list(variants.check_losses(steps, gpu)) == list(plain)
    assert capsys.readouterr().err.strip().endswith("mdlm_cudnn is left out: no execution plan")
    with pytest.raises(RuntimeError, match="no execution plan"):
        variants.check_losses({**plain, "memdlm K=2": variants.Step(no_plan)}, gpu)


def test_attention_backends_are_measured_beside_the_default():
    steps = variants.make_steps(
        CASE,
        [1, 2],
        1,
        CPU,
        torch.float32,
        naive=False,
        prompt_kv=False,
        sdpa_backends=("math", "flash"),
        extra_steps=[2],
    )
    names = ["mdlm_all_rows", "mdlm", "mdlm_math", "mdlm_flash", "memdlm K=1"]
    assert list(steps) == [*names, "memdlm K=2", "memdlm_math K=2", "memdlm_flash K=2"]
    operators = {}
    for name in ("mdlm_math", "mdlm", "mdlm_flash", "memdlm_math K=2", "memdlm K=2"):
        with torch.autograd.profiler.profile() as profiler:
            steps[name](0)
        operators[name] = {event.name for event in profiler.function_events}
    for name, seen in operators.items():
        flash = "aten::_scaled_dot_product_flash_attention_for_cpu" in seen
        assert flash == ("math" not in name)
    assert steps["memdlm_math K=2"].held_bytes() == steps["memdlm K=2"].held_bytes() > 0
    with pytest.raises(ValueError, match=r"sdpa_backend must be one of .* on cpu, got 'cudnn'"):
        variants.make_steps(CASE, [2], 1, CPU, torch.float32, sdpa_backends=("cudnn",))


def test_a_cpu_leaves_out_the_graph_and_says_why(capsys):
    steps = variants.make_steps(CASE, [2], 1, CPU, torch.float32, naive=False, graph=True)
    assert "memdlm_graph K=2" not in steps
    said = "memdlm_graph is left out: it needs a GPU, not cpu"
    assert said in capsys.readouterr().err


def test_the_suite_for_a_gpu_has_the_graph_and_both_orders():
    gpu = SUITES["gpu"]
    assert gpu.graph
    assert gpu.sdpa_backends == ("cudnn", "flash")
    for name in ("quick", "cpu"):
        assert not SUITES[name].graph
        assert SUITES[name].sdpa_backends == ()
    assert variants.memory_of("memdlm_graph", 3) == MemoryConfig(inner_steps=3, inner_graph=True)
    assert variants.memory_of("memdlm_cudnn", 3) == variants.memory_of("memdlm", 3)


def test_a_graph_has_the_flops_of_the_steps_it_launches(monkeypatch):
    """What a graph launches is not dispatched, and here nothing of the inner loop is."""

    class Replayed:
        pool_bytes = 3 * 2**20

        def __init__(self, run, device, other):
            self._trace = run()

        def replay(self):
            return self._trace

    made = variants.make_steps

    def on_a_gpu(case, inner_steps, batches, device, *args, **options):
        steps = made(case, inner_steps, batches, device, *args, **{**options, "graph": False})
        model = steps["memdlm K=2"]
        memory = variants.memory_of("memdlm_graph", 2)
        (batch,) = variants.make_batches(case, DiffusionConfig(), memory, 1, device)
        ours = MemDLMObjective(tiny_model_of(case), DiffusionConfig(), memory)
        graph = dataclasses.replace(
            model, take=lambda _: variants._ours(ours, batch), held_bytes=lambda: ours.held_bytes
        )
        return {**steps, "memdlm_graph K=2": graph}

    monkeypatch.setattr(inner_graph, "_Recording", Replayed)
    monkeypatch.setattr(step, "make_steps", on_a_gpu)
    rows = step.measure(
        CASE,
        inner_steps=[2],
        repeats=1,
        device=CPU,
        dtype=torch.float32,
        naive=False,
        prompt_kv=False,
        exact=False,
    )
    found = {row["variant"]: row for row in rows}
    assert found["memdlm_graph"]["flops"] == found["memdlm"]["flops"] > found["mdlm"]["flops"]
    assert found["memdlm_graph"]["peak_mib"] > 3
    assert "inner_graph" in found["memdlm_graph"]["parts_ms"]
    assert "inner_suffix" not in found["memdlm_graph"]["parts_ms"]


def test_the_shapes_of_graphs_are_counted(monkeypatch, capsys):
    monkeypatch.setattr(graph_shapes, "_BATCHES", 30)
    graph_shapes.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 5 * 2 * 3
    shapes = {tuple(row[:3]): int(row[3]) for row in rows}
    for stream, k, rule in shapes:
        if rule == "the largest state's":
            assert shapes[stream, k, rule] <= shapes[stream, k, "each state's own size"]
            assert shapes[stream, k, rule] <= shapes[stream, k, "the same, finer"]
    # Three batches of two shapes, with one kept.
    monkeypatch.setattr(graph_shapes, "_MOST_RECORDINGS", 1)
    assert graph_shapes._captures([[(1, 2)], [(1, 2)], [(3, 4)], [(1, 2)]]) == 3


def tiny_model_of(case):
    return AutoModelForCausalLM.from_config(case.config)


def mebibytes(count):
    return torch.ones(count * 2**18)


def test_the_peak_is_what_tensors_hold_at_once():
    held = mebibytes(5)

    def run():
        first, second = mebibytes(4), mebibytes(2)
        del first
        third = held[: 2**18] + 1  # 1 MiB
        return second, third, mebibytes(1)

    assert peak_mib(run, CPU) == pytest.approx(6, abs=0.01)
    assert rss_mib(lambda: mebibytes(64)) > 60


def test_the_peak_sees_what_compiled_ops_allocate():
    rows, width, rank = 2**14, 64, 16
    x, base = torch.randn(rows, width), torch.randn(rows, width)
    A, B = torch.randn(rank, width), torch.randn(width, rank)
    peak = peak_mib(lambda: lora_linear(x, base, A, B, 2.0, backend="cpu"), CPU)
    out_mib, product_mib = rows * width / 2**18, rows * rank / 2**18
    assert out_mib <= peak <= out_mib + product_mib + 0.1


def test_reads_are_counted_where_they_are():
    x = torch.arange(6.0)
    with OperatorCounts(CPU) as counts:
        _ = x + 1
        x[:2].sum()
    assert counts.host_reads == 0
    for read in (
        lambda: x[0].item(),
        lambda: bool(x.any()),
        lambda: x.nonzero(),
        lambda: x[x > 2],
        lambda: torch.equal(x, x),
        lambda: torch.where(x > 2),
    ):
        with OperatorCounts(CPU) as counts:
            read()
        assert counts.host_reads == 1


STEPS = Event("bench.steps", 0, 1_000_000)
RANGES = [
    STEPS,
    Event("bench.forward", 100_000, 600_000),
    Event("bench.backward", 300_000, 500_000),
    Event("bench.optimizer", 700_000, 900_000),
]


def test_nested_ranges_count_once():
    operators = [
        Event("aten::linear", 110_000, 200_000),
        Event("aten::addmm", 120_000, 190_000),
        Event("autograd::engine::evaluate_function: AddmmBackward0", 300_000, 400_000),
        Event("memdlm::lora_linear", 310_000, 320_000),
    ]
    found = analyse(reversed(RANGES + operators), 2, on_gpu=False)
    # Milliseconds of one of two steps.
    assert found.parts_ms == {"forward": 0.15, "backward": 0.1, "optimizer": 0.1, "rest": 0.15}
    assert found.calls == 1
    assert found.launches is None


def test_on_a_gpu_a_kernel_belongs_to_where_it_was_launched():
    device = {"on_device": True}
    events = [
        Event("cudaLaunchKernel", 150_000, 151_000, correlation=1),
        Event("gemm", 350_000, 450_000, correlation=1, **device),
        Event("cuLaunchKernelEx", 310_000, 311_000, correlation=2),
        Event("_row_kernel", 950_000, 980_000, correlation=2, **device),
        Event("cudaMemcpyAsync", 750_000, 751_000, correlation=3),
        Event("Memcpy DtoH (Device -> Pinned)", 760_000, 770_000, correlation=3, **device),
        # The ranges are drawn on the device's time line too.
        Event("bench.forward", 350_000, 980_000, is_annotation=True, **device),
        Event("aten::mm", 140_000, 160_000, correlation=1),
    ]
    found = analyse(RANGES + events, 1, on_gpu=True)
    assert found.parts_ms == {"forward": 0.1, "backward": 0.03, "optimizer": 0.01, "rest": 0.86}
    assert found.launches == 2


def test_ranges_of_a_profile_are_found():
    def run():
        with record_function("bench.forward"):
            torch.ones(200, 200) @ torch.ones(200, 200)

    found = profile_steps(run, 1, CPU)
    assert list(found.parts_ms) == ["forward", "rest"]
    assert found.calls == 3  # two fills and the product


@contextlib.contextmanager
def folders_of_this_tree(commit):
    yield compare._THIS


def compare_with_head(build):
    return compare.compare(
        "HEAD",
        CASE,
        inner_steps=[1],
        repeats=2,
        batches=1,
        device="cpu",
        dtype="float32",
        build=build,
    )


def test_a_tree_beside_itself(capsys):
    found = compare_with_head(folders_of_this_tree)
    assert list(found) == ["mdlm_all_rows", "mdlm", "memdlm K=1"]
    for own in found.values():
        assert len(own.ratios) == 2
        assert own.this_loss == own.other_loss
    compare.print_table(CASE, "HEAD", found)
    printed = capsys.readouterr().out
    assert "memdlm K=1" in printed
    assert "differ" not in printed


def test_another_revision_must_have_what_the_benchmark_calls(tmp_path):
    for package in ("memdlm", "memdlm_kernels"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()

    @contextlib.contextmanager
    def empty_packages(commit):
        yield [tmp_path]

    with pytest.raises(ValueError, match=r"revision HEAD cannot run this tree's .*No module named"):
        compare_with_head(empty_packages)


def test_packages_must_come_from_the_revision(tmp_path):
    @contextlib.contextmanager
    def nothing(commit):
        yield [tmp_path]

    with pytest.raises(ValueError, match="memdlm must come from"):
        compare_with_head(nothing)


def test_an_unknown_revision_is_an_error(capsys):
    with pytest.raises(SystemExit):
        compare.main(["no-such-revision"])
    assert "no-such-revision" in capsys.readouterr().err


def test_a_slow_variant_takes_part_in_some_rounds_alone():
    ran = []
    variants = {name: lambda name=name: ran.append(name) for name in ("fast", "slow")}
    times = interleaved_ms(variants, 7, torch.device("cpu"), {"slow": 3})
    assert [len(times[name]) for name in variants] == [7, 3]
    assert (ran.count("fast"), ran.count("slow")) == (8, 4)  # each once untimed before
