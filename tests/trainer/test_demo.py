"""`memdlm demo` at its smallest: the files it leaves, and what they say."""

import json

import pytest

from memdlm.cli import main
from memdlm.demo import run as demo
from memdlm.report import results_table


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(demo, "LENGTH", 96)
    monkeypatch.setattr(demo, "BATCH_SIZE", 2)
    monkeypatch.setattr(demo, "RECALL_LENGTHS", (96,))
    monkeypatch.setattr(demo, "RECALL_EXAMPLES", 4)
    monkeypatch.setattr(demo, "NLL_EXAMPLES", 4)


def test_the_report_has_every_file_and_both_arms(small, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["demo", "--steps", "2", "--out", str(out), "--seed", "3"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["results"]) == {"base", "MDLM", "MemDLM"}
    for states in summary["results"].values():
        for figures in states.values():
            assert figures["nll"] > 0
            assert 0 <= figures["recall_96_one"] <= 1
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["arm"]) for row in rows] == [
        (1, "MDLM"),
        (1, "MemDLM"),
        (2, "MDLM"),
        (2, "MemDLM"),
    ]
    report = (out / "report.md").read_text()
    table = results_table(summary["results"])
    assert table in report
    assert table in capsys.readouterr().out
    for name in ("loss", "recall", "cost"):
        assert f"({name}.png)" in report
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_gives_one_result(small, tmp_path):
    results = []
    for name in ("a", "b"):
        main(["demo", "--steps", "1", "--out", str(tmp_path / name)])
        results.append(json.loads((tmp_path / name / "summary.json").read_text())["results"])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "steps must be at least 1"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--steps", "many"], "steps must be a whole number"),
        (["--stps", "3"], "did you mean steps"),
    ],
)
def test_bad_options_are_one_line(words, message, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_told_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
