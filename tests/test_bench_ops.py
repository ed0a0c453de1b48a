"""The op benchmark: it covers every op, runs what it says, and times nothing that is wrong."""

import dataclasses
import gc
import json
import math

import pytest
import torch

from bench.cases import SUITES
from bench.op_cases import op_cases, roof, run_ops
from bench.op_cases.case import Variant, text
from bench.op_cases.measure import Timing, build, check
from bench.op_cases.suites import SUITE_NAMES
from memdlm_kernels import list_backends

CPU = torch.device("cpu")
TINY = op_cases("tiny")
# A float32 result that is off by as much has lost more than half of its digits; of a bfloat16
# result's three, this leaves one.
LARGEST_BAR = {torch.float32: 1e-4, torch.bfloat16: 0.08}


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_collected():
    """As bench/conftest.py: the collection before each measured peak takes most of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def untimed(problem, variant):
    """What `check` says of a variant that is not to be timed."""
    row = check(problem, variant, 5, 0.1)
    assert isinstance(row, dict)
    return row


def as_id(case):
    return f"{case.op}: {case.name}, {text(case.dtype)}"


@pytest.mark.parametrize("suite", SUITE_NAMES)
def test_every_suite_has_every_op_and_no_case_twice(suite):
    cases = op_cases(suite)
    assert {case.op for case in cases} == set(list_backends("cpu"))
    names = [as_id(case) for case in cases]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("suite", SUITE_NAMES)
def test_a_case_has_every_backend_once_and_something_beside_them(suite):
    for case in op_cases(suite):
        names = [variant.name for variant in case.variants]
        assert len(names) == len(set(names)), as_id(case)
        assert {variant.role for variant in case.variants} >= {"ours", "peer"} or any(
            variant.role == "bound" for variant in case.variants
        ), as_id(case)
        own = [variant.backend for variant in case.variants if variant.backend is not None]
        assert not own or set(own) == set(list_backends("cpu")[case.op]), as_id(case)


@pytest.mark.parametrize("suite", SUITE_NAMES)
def test_no_bar_lets_much_pass(suite):
    for case in op_cases(suite):
        assert 0 < case.bar < LARGEST_BAR[case.dtype], as_id(case)


@pytest.mark.parametrize("case", TINY, ids=as_id)
def test_every_variant_of_a_tiny_case_is_right_or_says_why_it_does_not_run(case):
    problem = build(case, CPU)
    # Without a GPU these alone may be missing, Triton and CUDA, and what is built on them.
    gpu_only = ("triton", "cuda", "Liger", "cut-cross-entropy", "F.linear_cross_entropy")
    rows = []
    for variant in case.variants:
        checked = check(problem, variant, rounds=3, seconds=0.0)
        if isinstance(checked, Timing):
            checked.visit(0, 1)
            checked = checked.row()
            assert {"times_ms", "p50_ms", "base_times_ms", "peak_mib"} <= checked.keys()
            assert not checked["wrong"]
        else:
            assert any(name in checked["variant"] for name in gpu_only), checked
        rows.append(checked)
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


@pytest.mark.parametrize(
    ("rounds", "visits"), [(1, 1), (7, 1), (7, 3), (3, 7), (24, 24), (200, 24)]
)
def test_rounds_are_spread_evenly_over_the_visits(rounds, visits):
    timing = Timing(build(TINY[0], CPU), lambda: None, rounds, {"variant": "nothing"})
    done = [0]
    for number in range(visits):
        timing.visit(number, visits)
        done.append(len(timing.times_ms))
        assert 0 <= done[-1] - rounds * (number + 1) / visits < 3
        assert done[-1] - done[-2] != 1 or done[-1] == rounds
    assert done[-1] == rounds
    row = timing.row()
    assert len(row["base_times_ms"]) == len(row["times_ms"]) == sum(row["visit_rounds"]) == rounds
    assert min(row["times_ms"] + row["base_times_ms"]) >= 0


def test_the_base_runs_before_each_round_after_an_untimed_one_when_a_visit_comes_back():
    order = []

    def run():
        order.append("run")
        return ()

    def base():
        order.append("base")
        return ()

    problem = dataclasses.replace(build(TINY[0], CPU), base=base)
    timing = Timing(problem, run, 5, {})
    timing.visit(0, 2)
    assert order == ["base", "run"] * 3
    order.clear()
    timing.visit(1, 2)
    assert order == ["run", *["base", "run"] * 2]
    assert len(timing.base_times_ms) == 5


@pytest.mark.parametrize("case", TINY, ids=as_id)
def test_a_result_off_by_twice_the_bar_is_wrong_and_not_timed(case):
    problem = build(case, CPU)
    # The last result: a gradient, where there is one. No rounding hides a float64's difference.
    off = list(problem.truth)
    off[-1] = off[-1] * (1 + 2 * case.bar)
    row = untimed(problem, Variant("planted", lambda inputs: lambda: off))
    assert row["wrong"]
    assert row["error"] == pytest.approx(2 * case.bar)
    assert "p50_ms" not in row


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("op", ["lora_linear", "fast_weight_reset_"])
def test_one_element_that_is_no_number_is_wrong(op, value):
    case = next(case for case in TINY if case.op == op)
    problem = build(case, CPU)
    off = [tensor.clone() for tensor in problem.truth]
    off[0].view(-1)[3] = value
    for variant in (case.variants[0], case.variants[-1]):
        if variant.role == "bound":
            variant = next(each for each in case.variants if each.role == "peer")
        planted = dataclasses.replace(
            variant, name="planted", backend=None, make=lambda inputs: lambda: off
        )
        row = untimed(problem, planted)
        assert row["wrong"]
        assert row["error"] is None


def test_the_roof_is_the_best_of_all_rounds(monkeypatch):
    monkeypatch.setattr(roof, "_SIZES", {"cpu": (8, 16)})
    monkeypatch.setattr(roof, "_COPY_BYTES", {"cpu": 1 << 10})
    monkeypatch.setattr(roof, "_LEAST_SECONDS", {"cpu": 0.0})
    taken = iter([1e-6, 1e-6, 1e-6] + [1e-3] * 12)
    monkeypatch.setattr(roof, "device_seconds", lambda run, device: next(taken))
    row = roof.roof(torch.float32, CPU)
    assert row["gemm_gflops"] == round(2 * 16**3 / 1e3, 1)
    assert row["copy_gb_s"] == round(2 * 2**10 / 1e3, 1)
    assert next(taken, None) is None


def test_results_of_another_shape_are_wrong():
    problem = build(TINY[0], CPU)
    off = [tensor[None] for tensor in problem.truth]
    assert untimed(problem, Variant("planted", lambda inputs: lambda: off))["wrong"]


def test_other_random_numbers_may_not_be_constant_or_leave_B_as_it_was():
    case = next(case for case in TINY if case.op == "fast_weight_reset_")
    problem = build(case, CPU)
    peer = next(variant for variant in case.variants if variant.role == "peer")
    flat = torch.full_like(problem.truth[0], 0.05)
    kept = problem.truth[0].clone()
    kept[kept == 0] = 1.0
    for planted in (flat, kept):
        variant = dataclasses.replace(peer, make=lambda inputs, off=planted: lambda: [off])
        assert untimed(problem, variant)["wrong"]


def test_an_error_of_ours_is_not_taken_for_a_reason_to_skip():
    def broken(inputs):
        raise RuntimeError("broken")

    problem = build(TINY[0], CPU)
    assert "broken" in untimed(problem, Variant("peer", broken))["skipped"]
    with pytest.raises(RuntimeError, match="broken"):
        untimed(problem, Variant("ours", broken, "ours"))


@pytest.mark.parametrize("visits", [1, 2])
def test_a_run_fails_where_ours_is_wrong_and_only_says_so_of_a_peer(
    visits, tmp_path, monkeypatch, capfd
):
    (tmp_path / "planted.py").write_text(
        "from bench.op_cases import cross_entropy\n"
        "ours, peer = cross_entropy._ours_logits, cross_entropy._kl_div\n"
        "cross_entropy._ours_logits = lambda **tensors: 1.1 * ours(**tensors)\n"
        "cross_entropy._kl_div = lambda **tensors: 1.1 * peer(**tensors)\n"
    )
    # The benchmark runs in a process of its own; xdist would turn the timing off.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    chosen = "(masked_linear_kl or masked_cross_entropy) and not bfloat16"
    monkeypatch.setenv("PYTEST_ADDOPTS", f"-p planted -k '{chosen}'")
    path = tmp_path / "ops.jsonl"
    run = "2026-01-01T00:00:00+00:00"
    suite = dataclasses.replace(SUITES["quick"], op_rounds=2, op_visits=visits)

    assert run_ops("tiny", suite, run, path) == 1
    said = capfd.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {(row["bench"], row["suite"], row["run"]) for row in rows} == {("op", "tiny", run)}
    wrong = [row for row in rows if row.get("wrong")]
    assert {(row["op"], row["variant"]) for row in wrong} == {
        ("masked_linear_kl", "F.kl_div, logits.float()"),
        ("masked_linear_kl", "F.kl_div, float32 products"),
        ("masked_cross_entropy", "ours: cpu"),
        ("masked_cross_entropy", "reference"),
    }
    assert "2 failed" in said
    assert "error" not in said.splitlines()[-1]
    assert "2 xfailed" in said
    assert "F.kl_div, logits.float() is off by" in said
    assert not any("times_ms" in row for row in wrong)
    right = [row for row in rows if row.get("wrong") is False]
    assert right
    assert all(len(row["times_ms"]) == 2 for row in right)
