"""Every figure of the README comes from a committed row, and every committed row can be trusted."""

import json
import re

import pytest
import torch

from bench import plot, prompt_kv_table, ratios, results, unroll_table
from bench import run as bench_run
from bench.cases import StepCase, Suite
from bench.pages import BEGIN, END, readme_block, summary
from bench.timing import write_rows
from memdlm.config import MemoryConfig

README = plot.README.read_text(encoding="utf-8")
FILES = sorted(results.ROOT.glob("*/*.jsonl"))

# A number, in digits or in words, with a unit of something that is measured; and any number with a
# point, as losses and ratios have.
_DIGITS = r"(?<![\w.-])\d[\d,.]*[\s-]*"
_WORD = r"\b(?:one|two|three|four|five|six|seven|eight|nine|ten|half|a third)[\s-]+"
_UNIT = (
    r"(?:ms|s|sec|seconds?|minutes?|hours?|[KMG]i?B(?:/s)?|%|per cent|x|×|times|fold"
    r"|[MGT]FLOPs?(?:/s)?|tokens/s)"
)
_MEASURED = re.compile(rf"(?:{_DIGITS}|{_WORD}){_UNIT}(?!\w)|(?<![\w.-])\d+\.\d+(?![\w.])")

# What looks like a measured figure and is none, with the reason.
NOT_MEASURED = {
    "arXiv 2603.22241": "the paper's number",
    "https://arxiv.org/abs/2603.22241": "its address",
    "Python 3.11": "the oldest version that is supported",
    "versions before 5.2": "of transformers, from its release notes",
    "LLaDA2.0, LLaDA2.1": "models' names",
    "Apache-2.0": "the licence",
    "a wheel of 93 MB": "what the package index says about a file",
}


def prose(text):
    """The README without its generated block, its code and what is known not to be measured."""
    before, _, rest = text.partition(BEGIN)
    text = before + rest.partition(END)[2]
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    for fact in NOT_MEASURED:
        text = text.replace(fact, "")
    return text


def test_the_block_of_the_readme_is_what_the_committed_rows_give():
    block = BEGIN + README.partition(BEGIN)[2].partition(END)[0] + END
    assert block == readme_block(results.ROOT), "run `python -m bench.plot`"


def test_no_other_figure_of_the_readme_is_measured():
    assert _MEASURED.findall(prose(README)) == []


def test_every_exception_is_still_needed():
    for fact, reason in NOT_MEASURED.items():
        assert fact in README, f"{fact!r} ({reason}) is gone from README.md: take it off the list"


@pytest.mark.parametrize(
    "text",
    [
        "2842 ms", "1,009 MiB", "about 20 % more", "28%", "five minutes", "3.2x", "two times",
        "loss falls from 8.2 to 6.3", "140 TFLOP", "a two-minute run takes 90 s", "1.3 × as long",
    ],
)  # fmt: skip
def test_a_measured_figure_is_seen(text):
    assert _MEASURED.search(text)


@pytest.mark.parametrize(
    "text", ["64 experts", "the first ones", "two cores", "sm_90", "SmolLM2-135M", "8 sequences"]
)
def test_other_numbers_are_not_taken_for_measured_ones(text):
    assert not _MEASURED.search(text)


def test_there_are_committed_rows():
    assert {file.name for file in FILES} >= {"step.jsonl", "ops.jsonl", "prompt_kv.jsonl"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_committed_rows_are_whole_and_from_a_commit(file):
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        results.check_row(row)
        assert re.fullmatch(r"[0-9a-f]{40}", row["commit"] or ""), f"line {number}"
        assert row["dirty"] is False, f"line {number}"
        assert len(row.get("times_ms", [0])) > 0, f"line {number}"


@pytest.mark.parametrize("folder", sorted({file.parent for file in FILES}), ids=lambda f: f.name)
def test_a_folder_s_summary_is_what_its_rows_give(folder):
    assert (folder / "summary.md").read_text(encoding="utf-8") == summary(folder)


MACHINE = {
    "device": "a CPU", "threads": 2, "torch": "2.13.0", "triton": None, "python": "3.11.7",
    "commit": "0" * 40, "dirty": False,
}  # fmt: skip


def step(variant, k, p50_ms, *, run="2026-01-01T00:00:00+00:00", case="a case", **other):
    return {
        "bench": "step", "suite": "cpu", "run": run, **MACHINE, "case": case, "model": "tiny",
        "batch_size": 2, "length": 64, "prompt_share": 0.5, "outer": "full",
        "gradient_checkpointing": False, "dtype": "float32", "variant": variant, "k": k, "every": 1,
        "times_ms": [p50_ms], "p20_ms": p50_ms, "p50_ms": p50_ms, "p80_ms": p50_ms,
        "peak_mib": 10.0, "rss_mib": None, "flops": 1000, "tokens": 128,
        "parts_ms": {"optimizer": 1.0}, "calls": 5, "launches": None, "host_reads": 0, **other,
    }  # fmt: skip


def op(variant, p50_ms, *, flops=10**7):
    row = {
        "bench": "op", "suite": "cpu", "run": FIRST, **MACHINE, "op": "lora_linear", "case": "one",
        "dtype": "float32", "variant": variant, "flops": flops, "bytes": 10**6, "error": 0.1,
        "wrong": p50_ms is None,
    }  # fmt: skip
    if p50_ms is None:
        return row
    times = {"times_ms": [p50_ms], "p20_ms": p50_ms, "p50_ms": p50_ms, "p80_ms": p50_ms}
    return row | times | {"base_times_ms": [2.0], "visit_rounds": [1], "peak_mib": 1.0}


def one_run(memdlm_ms, run, commit="0" * 40):
    return [
        step("mdlm_all_rows", None, 200.0, run=run, commit=commit),
        step("mdlm", None, 100.0, run=run, commit=commit),
        step("memdlm_naive", 2, 450.0, run=run, commit=commit),
        step("memdlm", 2, memdlm_ms, run=run, commit=commit),
    ]


FIRST, SECOND = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"


def test_ratios_are_over_both_standards():
    expected = {
        "memdlm/mdlm K=2, a case": 1.5,
        "memdlm/mdlm_all_rows K=2, a case": 0.75,
        "memdlm_naive/memdlm K=2, a case": 3.0,
    }
    assert ratios.ratios(one_run(150.0, FIRST)) == pytest.approx(expected)


def test_a_step_s_ratio_is_the_geometric_mean_over_rounds():
    rows = one_run(150.0, FIRST)
    rows[1] |= {"times_ms": [1.0, 10.0, 3.0], "p50_ms": 3.0}
    rows[3] |= {"times_ms": [4.0, 20.0, 3.0], "p50_ms": 4.0}
    assert ratios.time_over(rows[3], rows[1]) == pytest.approx(2.0)
    cases = {(row["variant"], row["k"]): row for row in rows}
    assert ratios.over(cases, "mdlm") == pytest.approx(2.0)
    assert ratios.over(cases, "mdlm", "peak_mib") == 1.0


def test_an_op_s_ratio_is_the_geometric_mean_of_its_visits_medians():
    times = {"times_ms": [1.0, 2.0, 9.0, 16.0], "base_times_ms": [1.0, 1.0, 1.0, 2.0]}
    row = op("PEFT", 3.0) | times
    assert ratios.over_base(row | {"visit_rounds": [3, 1]}) == pytest.approx(4.0)
    assert ratios.over_base(row | {"visit_rounds": [4]}) == pytest.approx(5.0)


def test_rounds_that_the_plain_method_left_out_do_not_count_for_its_ratio():
    rows = one_run(150.0, FIRST)
    rows[2] |= {"every": 3, "times_ms": [400.0, 450.0, 500.0]}
    rows[3] |= {"times_ms": [100.0, 1.0, 1.0, 150.0, 1.0, 1.0, 200.0]}
    assert ratios.by_round(rows[2], rows[3]) == [4.0, 3.0, 2.5]


def test_the_largest_change_against_the_run_before_is_told():
    rows = one_run(150.0, FIRST) + one_run(180.0, SECOND)
    said = ratios.against_previous(rows, SECOND)
    assert said is not None
    assert said.startswith(f"against the run of {FIRST}: 3 ratios moved by at most 20.0 %")
    assert ratios.against_previous(rows, FIRST) is None


def test_a_run_is_not_compared_with_another_machine_s():
    rows = [row | {"device": "another"} for row in one_run(150.0, FIRST)] + one_run(180.0, SECOND)
    assert ratios.against_previous(rows, SECOND) is None


def test_the_newest_rows_are_of_one_commit_and_each_case_s_newest_run():
    other = [row | {"case": "another"} for row in one_run(120.0, FIRST)]
    stale = one_run(100.0, "2025-01-01T00:00:00+00:00", commit="1" * 40)
    late = one_run(180.0, SECOND)
    kept = results.newest(stale + one_run(150.0, FIRST) + other + late, "step", "cpu")
    assert kept == other + late


def test_a_row_that_lacks_a_key_is_refused_with_its_place(tmp_path):
    row = step("mdlm", None, 100.0)
    del row["parts_ms"]
    (tmp_path / "step.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"step.jsonl, line 1: .*parts_ms"):
        results.read_rows(tmp_path)


def test_what_is_wrong_or_did_not_run_needs_no_times():
    checked = op("Liger", None)
    results.check_row(checked)
    results.check_row({key: checked[key] for key in checked.keys() - {"wrong"}} | {"skipped": "-"})
    with pytest.raises(ValueError, match="times_ms"):
        results.check_row(checked | {"wrong": False})


def test_a_folder_becomes_pictures_and_pages(tmp_path):
    folder = tmp_path / "cpu-2-cores"
    folder.mkdir()
    more = [step("memdlm", 3, 190.0), *one_run(150.0, FIRST)]
    longer = [row | {"case": "longer", "length": 128} for row in one_run(300.0, FIRST)]
    lines = [json.dumps(row) for row in more + longer]
    (folder / "step.jsonl").write_text("\n".join(lines) + "\n")
    ops = [op("ours: cpu", 2.0), op("PEFT", 3.0), op("Liger", None), op("a bound", 1.0, flops=0)]
    roof = {"bench": "roof", "suite": "cpu", "run": FIRST, **MACHINE, "dtype": "float32"}
    ops.append(roof | {"gemm_gflops": 100.0, "copy_gb_s": 10.0})
    (folder / "ops.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ops))
    plot.write(folder)
    assert {path.name for path in folder.glob("*.png")} == {
        "cost_vs_k.png", "by_length.png", "parts.png", "ops_roofline.png",
    }  # fmt: skip
    block = readme_block(tmp_path)
    assert "MemDLM with K = 2 takes 0.75 × the time: it is cheaper in 1 of 1 cases" in block
    assert "**No GPU has run these benchmarks yet**" in block
    assert "| ours: cpu: 2.00 ms, 1.00 MiB | PEFT: 3.00 ms, 1.00 MiB, 1.50 ×<br>Liger: **w" in block
    assert "| longer |" in (folder / "summary.md").read_text()


def prompt_kv_row(share, k, **other):
    figures = {key: 0.5 for key in results.KEYS["prompt_kv"] if key.endswith(("0_ms", "_change"))}
    return {
        "bench": "prompt_kv", "suite": None, "run": FIRST, **MACHINE, "model": "tiny", "k": k,
        "train_steps": 3, "batch_size": 8, "length": 256, "prompt_share": share, "batches": 2,
        "fast_weight_cosine": 0.987654, "fast_weight_cosine_min": 0.9, "gradient_cosine": 0.7,
        "times_ms": [3.0, 4.0], "base_times_ms": [6.0, 8.0], **figures, **other,
    }  # fmt: skip


def test_the_newest_figures_of_prompt_kv_are_shown():
    stale = prompt_kv_row(0.5, 2, run="2025-01-01T00:00:00+00:00")
    rows = [stale, prompt_kv_row(0.5, 2), prompt_kv_row(0.9, 4)]
    for row in rows:
        results.check_row(row)
    kept = prompt_kv_table.newest_rows(rows)
    assert kept == rows[1:]
    lines = prompt_kv_table.lines(kept)
    assert len(lines) == 6
    assert lines[-2].startswith("| 50% | 2 | 0.987654, 0.900000 |")
    assert lines[-2].endswith("| 0.50 |")
    said = prompt_kv_table.sentence(kept)
    assert "prompts of 50 % of 256 tokens" in said
    assert "0.987654;" in said


def test_the_option_s_docstring_has_the_figures_of_the_committed_rows():
    rows = prompt_kv_table.newest_rows(results.read_rows(results.ROOT / "cpu-2-cores"))
    assert prompt_kv_table.sentence(rows) in " ".join((MemoryConfig.__doc__ or "").split())


def unroll_row(case, variant, k, peak_mib, checkpoint="auto", **other):
    return {
        "bench": "unroll", "suite": None, "run": FIRST, **MACHINE, "case": case, "model": "tiny",
        "batch_size": 2, "length": 32, "prompt_share": 0.5, "outer": "full", "dtype": "float32",
        "variant": variant, "k": k, "inner_checkpoint": checkpoint, "times_ms": [10.0 * k],
        "p20_ms": 9.0, "p50_ms": 10.0 * k, "p80_ms": 90.0, "peak_mib": peak_mib, **other,
    }  # fmt: skip


def unroll_rows(case):
    gradients = [
        unroll_row(case, variant, k, share * k, None if variant == "kept_graph" else "auto")
        for k in (1, 4)
        for variant, share in zip(unroll_table.GRADIENTS, (1.0, 2.0, 3.0, 4.0), strict=True)
    ]
    choices = [
        unroll_row(case, part, 2, 7.0, name)
        for part in ("first_order", "inner_steps")
        for name in ("none", "layer", "auto")
    ]
    return gradients + choices


def test_the_newest_rows_of_unroll_become_tables_and_a_picture(tmp_path):
    folder = tmp_path / "cpu-2-cores"
    folder.mkdir()
    stale = unroll_row("short", "first_order", 1, 99.0, run="2025-01-01T00:00:00+00:00")
    rows = [stale, *unroll_rows("short"), *unroll_rows("long"), *one_run(150.0, FIRST)]
    for row in rows:
        results.check_row(row)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot.write(folder)
    assert (folder / "unroll.png").exists()
    summary_md, block = (folder / "summary.md").read_text(), readme_block(tmp_path)
    for page, link in ((summary_md, ""), (block, "bench/results/cpu-2-cores/")):
        assert "| short | 4 | 40.0 ms, 4.00 MiB | 40.0 ms, 8.00 MiB | 40.0 ms, 12.0 MiB |" in page
        assert page.count("| long | ") == 4
        part = "| long | 2 | the inner steps alone |"
        assert f"{part} 20.0 ms, 7.00 MiB | 20.0 ms, 7.00 MiB |" in page
        assert "99" not in page
        assert f"({link}unroll.png)" in page


def small_suite(monkeypatch, failing):
    """A suite of two cases of which one may fail, measured by a function that writes made rows."""
    cases = [StepCase("tiny", 1, length, 0.5, "full") for length in (32, 64)]
    small = Suite("cpu", "float32", cases[:1], [1, 2], cases[1:], repeats=1, op_rounds=1)
    asked = {}

    def measured(case, *, inner_steps, naive, suite, run, path, **others):
        asked[case.length] = (list(inner_steps), naive)
        if case.length in failing:
            raise RuntimeError("out of memory")
        made = one_run(150.0, run)
        write_rows(path, [row | {"case": case.name, "suite": suite} for row in made])

    monkeypatch.setattr(bench_run, "SUITES", {"cpu": small})
    monkeypatch.setattr(bench_run, "measure", measured)
    return asked


def test_a_run_measures_costs_with_every_k_and_sweeps_without_the_naive(
    tmp_path, monkeypatch, capsys
):
    asked = small_suite(monkeypatch, failing=())
    folder = tmp_path / "results"
    bench_run.main(["--suite", "cpu", "--without", "ops", "--out", str(folder)])
    assert asked == {32: ([1, 2], True), 64: ([2], False)}
    assert "no earlier run to compare with" in capsys.readouterr().out
    assert (folder / "summary.md").exists()


def test_a_case_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    small_suite(monkeypatch, failing=(32,))
    with pytest.raises(SystemExit, match="failed: tiny, 1 x 32"):
        bench_run.main(["--suite", "cpu", "--without", "ops", "--out", str(tmp_path)])
    assert "RuntimeError: out of memory" in capsys.readouterr().err
    assert {row["case"] for row in results.read_rows(tmp_path)} == {
        "tiny, 1 x 64, 50% prompt, full"
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_suite_for_a_gpu_is_refused_without_one(capsys):
    with pytest.raises(SystemExit):
        bench_run.main(["--suite", "gpu"])
    assert "--suite must be one for a CPU (quick, cpu)" in capsys.readouterr().err


def test_a_case_s_number_must_be_in_the_suite(capsys):
    with pytest.raises(SystemExit):
        bench_run.main(["--suite", "quick", "--cases", "9"])
    assert "--cases must be in [1, 3], got 9" in capsys.readouterr().err
