"""The JSON lines of a folder of results as Markdown tables: `python -m bench.summary FOLDER`."""

import argparse
import json
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(arguments).folder
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        parser.error(f"folder must hold .jsonl files, got none in {folder}")
    for file in files:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        print(f"## {file.stem}\n")
        first = rows[0]
        print(f"{first['device']}, torch {first['torch']}, commit {(first['commit'] or '-')[:7]}\n")
        timed = [row for row in rows if "p50_ms" in row]
        print("\n".join(_table(timed) if timed else _counts(rows)), "\n")


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| case | variant | p20 ms | p50 ms | p80 ms | ratio | peak MiB |", "|" + "---|" * 7]
    for row in rows:
        case = _case(row)
        base = next((other for other in rows if _case(other) == case and _is_base(other)), None)
        ratio = "" if base is None else f"{row['p50_ms'] / base['p50_ms']:.2f}"
        variant = row["variant"] + (f" K={row['k']}" if row.get("k") else "")
        times = " | ".join(f"{row[key]:.3f}" for key in ("p20_ms", "p50_ms", "p80_ms"))
        lines.append(f"| {case} | {variant} | {times} | {ratio} | {row['peak_mib']:.0f} |")
    return lines


def _counts(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| model | K | kernels launched by the inner loop |", "|---|---|---|"]
    return lines + [f"| {row['preset']} | {row['k']} | {row['launches']} |" for row in rows]


def _case(row: dict[str, Any]) -> str:
    own = row.get("case") or row.get("preset")
    return f"{row.get('op', 'step')}: {own}, {row['dtype']}"


def _is_base(row: dict[str, Any]) -> bool:
    """What the others of its case are divided by."""
    return row["variant"] in (row.get("bound"), "mdlm")


if __name__ == "__main__":
    main()
