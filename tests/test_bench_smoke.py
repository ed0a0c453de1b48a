"""Every op once (bench.smoke), and how rows that came home get their commit (bench.land)."""

import json

import pytest
import torch

from bench import land, smoke
from bench.op_cases.suites import op_cases
from bench.results import check_row
from bench.timing import machine, source_digest


@pytest.fixture
def quick_roof(monkeypatch):
    """Without its 20 seconds on a CPU."""

    def roof(dtype, device):
        own = {"bench": "roof", "dtype": str(dtype).removeprefix("torch.")}
        return own | {"gemm_gflops": 1.0, "copy_gb_s": 1.0}

    monkeypatch.setattr(smoke, "roof", roof)


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_op_has_a_row_that_the_tables_read(quick_roof, tmp_path, monkeypatch, capsys):
    cases = [case for case in op_cases("tiny") if case.dtype == torch.float32]
    monkeypatch.setattr(smoke, "op_cases", lambda suite: cases)
    file = tmp_path / "smoke.jsonl"
    smoke.main(["--device", "cpu", "--suite", "tiny", "--rows", str(file)])
    rows = rows_of(file)
    for row in rows:
        check_row(row)
    assert {row["op"] for row in rows if row["bench"] == "op"} == {case.op for case in cases}
    assert capsys.readouterr().out.count("of the roof") == len(cases)


def test_a_wrong_op_is_named_and_the_others_go_on(quick_roof, tmp_path, monkeypatch, capsys):
    first, second, third = [case for case in op_cases("tiny") if case.op == "lora_linear"][:3]
    wrong = {"bench": "op", "error": 1.0, "wrong": True, "variant": "ours: cpu"}
    real = smoke._measured

    def measured(case, device):
        if case is first:
            raise RuntimeError("no such kernel")
        return wrong if case is second else real(case, device)

    monkeypatch.setattr(smoke, "_measured", measured)
    monkeypatch.setattr(smoke, "op_cases", lambda suite: [first, second, third])
    with pytest.raises(SystemExit, match="failed: lora_linear, lora_linear"):
        smoke.main(["--device", "cpu", "--suite", "tiny", "--rows", str(tmp_path / "rows")])
    out = capsys.readouterr().out
    assert "no such kernel" in out
    assert "WRONG" in out
    assert [row["bench"] for row in rows_of(tmp_path / "rows")].count("op") == 2


def test_the_smoke_suite_has_every_op_that_the_gpu_suite_has():
    assert {case.op for case in op_cases("smoke")} == {case.op for case in op_cases("gpu")}


def roof_row(**facts):
    row = {"bench": "roof", "suite": "smoke", "run": "2026-01-01T00:00:00+00:00"}
    row |= {"dtype": "float32", "gemm_gflops": 1.0, "copy_gb_s": 1.0}
    own = {"commit": None, "dirty": None, "device": "Some GPU"}
    return row | machine(torch.device("cpu")) | own | facts


def write(folder, *rows):
    folder.mkdir(exist_ok=True)
    (folder / "smoke.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def clean_tree(monkeypatch):
    monkeypatch.setattr(land, "_git", lambda *words: "" if words[0] == "status" else "c" * 40)


def test_rows_of_these_sources_get_the_commit(clean_tree, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/log.txt").write_text("all of it")
    folder = write(tmp_path / "home", roof_row(), roof_row(commit="d" * 40, dirty=False))
    land.main([str(folder), "--to", str(tmp_path / "results")])
    land.main([str(folder), "--to", str(tmp_path / "results")])  # appended, not replaced
    rows = rows_of(tmp_path / "results/some-gpu/smoke.jsonl")
    assert [row["commit"][0] for row in rows] == ["c", "d", "c", "d"]
    assert all(row["dirty"] is False for row in rows)
    assert (tmp_path / "results/some-gpu/log.txt").read_text() == "all of it"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([roof_row(sources="0" * 64)], "smoke.jsonl, line 1: was measured on other sources"),
        ([roof_row(), roof_row(device="Another")], "rows of one device, got Another, Some GPU"),
        ([], "FOLDER must hold .jsonl files"),
    ],
)
def test_what_cannot_land_is_refused(rows, text, clean_tree, tmp_path, capsys):
    folder = write(tmp_path / "home", *rows) if rows else tmp_path
    with pytest.raises(SystemExit) as stopped:
        land.main([str(folder), "--to", str(tmp_path / "results")])
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_digest_is_of_names_and_contents_of_sources_alone(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/a.py").write_text("1")
    (tmp_path / "bench/rows.jsonl").write_text("1")
    before = source_digest(tmp_path)
    (tmp_path / "bench/rows.jsonl").write_text("2")
    assert source_digest(tmp_path) == before
    (tmp_path / "bench/a.py").write_text("2")
    changed = source_digest(tmp_path)
    (tmp_path / "bench/a.py").rename(tmp_path / "bench/b.py")
    assert len({before, changed, source_digest(tmp_path)}) == 3
