"""The benchmark of the gradient through the inner loop: it measures what it says."""

import pytest

from bench import unroll
from bench.cases import StepCase
from bench.results import check_row, read_rows

RUN = "2026-01-01T00:00:00+00:00"
CASE = StepCase("tiny", 2, 32, 0.5, "full")


@pytest.fixture(scope="module")
def rows():
    return unroll.measure(CASE, (1, 2), repeats=1, run=RUN)


def test_each_gradient_and_checkpoint_gives_one_row(rows):
    gradients = ["first_order", "exact", "exact_suffix", "kept_graph"]
    assert [(row["variant"], row["k"], row["inner_checkpoint"]) for row in rows] == [
        *(
            (name, k, None if name == "kept_graph" else "auto")
            for k in (1, 2)
            for name in gradients
        ),
        ("first_order", 2, "none"),
        ("first_order", 2, "layer"),
        *(("inner_steps", 2, choice) for choice in ("none", "layer", "auto")),
    ]
    for row in rows:
        check_row(row)
        assert len(row["times_ms"]) == 1
        assert row["peak_mib"] > 0


def test_the_exact_gradient_needs_more_than_the_first_order(rows):
    peaks = {row["variant"]: row["peak_mib"] for row in rows if row["k"] == 2}
    assert peaks["first_order"] < peaks["exact_suffix"] < peaks["exact"]


def test_a_gradient_that_is_not_the_exact_one_is_refused(monkeypatch):
    right = unroll.kept_graph_loss
    monkeypatch.setattr(unroll, "kept_graph_loss", lambda *args: 1.01 * right(*args))
    with pytest.raises(ValueError, match="exact and kept_graph must agree to 1e-03"):
        unroll.measure(CASE, (1,), repeats=1, run=RUN)


def test_a_run_writes_its_rows_and_pages(rows, tmp_path, monkeypatch, capsys):
    asked = []

    def measured(case, inner_steps, repeats, run):
        asked.append((case.model, tuple(inner_steps), repeats))
        return [row | {"run": run} for row in rows]

    monkeypatch.setattr(unroll, "measure", measured)
    unroll.main(["--cases", "tiny", "--k", "1", "4", "--repeats", "2", "--out", str(tmp_path)])
    assert asked == [("tiny", (1, 4), 2)]
    assert len(read_rows(tmp_path)) == len(rows)
    assert "kept_graph" in capsys.readouterr().out
    assert (tmp_path / "unroll.png").exists()
