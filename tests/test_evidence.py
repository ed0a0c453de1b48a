"""docs/evidence.md says what its rows say: tables are made again from what is committed."""

import json
import re
from pathlib import Path

import pytest

from memdlm.ablation.grid import make_cells, read_grid
from memdlm.ablation.report import ablation_table
from memdlm.ablation.task import base_keys

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "evidence.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["evidence", "evidence_why", "inner_losses"])
def test_every_table_is_made_of_committed_rows(name):
    grid = read_grid(str(DOCS / f"{name}.yaml"), {})
    rows = (DOCS / "evidence" / f"{name}.jsonl").read_text().splitlines()
    cells = make_cells(grid, base_keys(grid))
    for ablation in grid.ablations:
        table = ablation_table(ablation, cells, [json.loads(row) for row in rows])
        assert "\n".join(table) in PAGE
        assert f"(evidence/{ablation}.png)" in PAGE


def test_the_table_of_the_exposure_bias_is_that_of_the_command():
    assert (DOCS / "evidence" / "bias.md").read_text().strip() in PAGE


def test_every_picture_is_there():
    pictures = re.findall(r"!\[[^]]*\]\(evidence/(\S+)\)", PAGE)
    assert len(pictures) == 5
    for picture in pictures:
        assert (DOCS / "evidence" / picture).is_file()
