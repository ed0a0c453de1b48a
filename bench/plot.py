"""Draw the results and put their figures into Markdown: `python -m bench.plot [FOLDER ...]`.

From the newest rows of each suite in each folder it makes pictures and `summary.md` beside the
rows, and, from all folders in bench/results, the block of figures in README.md. Nothing there is
typed by hand.
"""

import argparse
import sys
from pathlib import Path

from bench.pages import BEGIN, END, PICTURES, UNROLL, picture, readme_block, summary
from bench.pictures import draw
from bench.results import ROOT, newest, read_rows, suites

README = ROOT.parent.parent / "README.md"


def main(arguments: list[str] | None = None) -> None:
    """Write pictures, summaries and the README's block, or only compare the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folders", type=Path, nargs="*", metavar="FOLDER", help="of one device; default: all"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 where README.md differs from what the rows give",
    )
    options = parser.parse_args(arguments)
    if options.check:
        readme = README.read_text(encoding="utf-8")
        if with_block(readme) != readme:
            sys.exit("README.md differs from what the rows give: run `python -m bench.plot`")
        return
    for folder in options.folders or sorted(path for path in ROOT.glob("*") if path.is_dir()):
        if not any(folder.glob("*.jsonl")):
            parser.error(f"FOLDER must hold .jsonl files, got none in {folder}")
        write(folder)


def write(folder: Path) -> None:
    """Draw the pictures of a folder, write its summary.md and, where it is its place, the README.

    Args:
        folder: of one device, with its rows; in bench/results its figures go into README.md.
    """
    rows = read_rows(folder)
    for suite in suites(rows):
        own = [row for bench in ("step", "op", "roof") for row in newest(rows, bench, suite)]
        for name in PICTURES:
            draw(name, own, folder / picture(suite, name))
    draw(UNROLL, newest(rows, "unroll", None), folder / UNROLL)
    (folder / "summary.md").write_text(summary(folder), encoding="utf-8")
    print(f"{folder}: pictures and summary.md")
    if folder.resolve().parent == ROOT:
        README.write_text(with_block(README.read_text(encoding="utf-8")), encoding="utf-8")


def with_block(readme: str) -> str:
    """The README with the block that today's rows give.

    Args:
        readme: its text.

    Returns:
        The text, in which nothing else is changed.

    Raises:
        ValueError: the text lacks one of the block's two lines.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"README.md must hold {BEGIN!r} and {END!r} once, got it otherwise")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + readme_block(ROOT) + after


if __name__ == "__main__":
    main()
