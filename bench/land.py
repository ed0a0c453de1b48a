"""Put what a GPU brought home into the repository: `python -m bench.land FOLDER`.

Rows that were measured in a copy of the tree without its history name no commit, but a digest of
their sources. Where those are the ones committed here, the rows get the commit, and everything goes
to bench/results/<device>, new rows behind those that are there; pictures and tables are made again.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from bench import plot
from bench.results import ROOT
from bench.timing import source_digest

_REPOSITORY = ROOT.parent.parent


def main(arguments: list[str] | None = None) -> None:
    """Check, stamp and copy; exit with 2 where the sources are others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="RESULTS_DIR of bench/on_gpu.sh"
    )
    parser.add_argument("--to", type=Path, default=ROOT, help="default: bench/results")
    options = parser.parse_args(arguments)
    files = sorted(options.folder.glob("*.jsonl"))
    if not files:
        parser.error(f"FOLDER must hold .jsonl files, got none in {options.folder}")
    if _git("status", "--porcelain"):
        parser.error("the tree must be as it is committed: the rows are to name a commit")
    digest, commit = source_digest(_REPOSITORY), _git("rev-parse", "HEAD")
    rows: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        rows[file.name] = [json.loads(line) for line in file.read_text().splitlines()]
        for number, row in enumerate(rows[file.name], 1):
            if row.get("commit") is None and row.get("sources") != digest:
                parser.error(
                    f"{file.name}, line {number}: was measured on other sources than those of "
                    f"{commit}; check out the commit that was copied to the machine"
                )
            if row.get("commit") is None:
                row |= {"commit": commit, "dirty": False}
    devices = {row["device"] for own in rows.values() for row in own}
    if len(devices) != 1:
        parser.error(f"FOLDER must hold rows of one device, got {', '.join(sorted(devices))}")
    target = options.to / devices.pop().lower().replace(" ", "-")
    target.mkdir(parents=True, exist_ok=True)
    for name, own in rows.items():
        with (target / name).open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in own)
    for name in ("failures.txt", "log.txt", "profile.txt"):
        if (options.folder / name).exists():
            shutil.copy(options.folder / name, target / name)
    plot.write(target)


def _git(*words: str) -> str:
    command = ["git", "-C", str(_REPOSITORY), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
