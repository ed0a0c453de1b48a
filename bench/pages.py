"""The pages that results are put on: the README's block, and a folder's summary.md."""

from pathlib import Path

from bench import op_table, step_table, unroll_table
from bench import prompt_kv_table as prompt_kv
from bench.ratios import against_previous
from bench.results import Row, newest, read_rows, suites

BEGIN = "<!-- bench: begin (python -m bench.plot) -->"
END = "<!-- bench: end -->"
PICTURES = {
    "cost_vs_k.png": "What a step costs over both standards, against K",
    "by_length.png": "Time and memory of a step against length",
    "parts.png": "Where the time of a step goes",
    "ops_roofline.png": "Each op under the most that the machine does",
}
UNROLL = "unroll.png"  # of no suite
_SUITES = {"gpu": ("gpu",), "cpu": ("cpu", "quick")}
_IN_README = ("cost_vs_k.png", "by_length.png", "ops_roofline.png")


def picture(suite: str, name: str) -> str:
    """A picture's file name: "quick" has its own, as it runs where another suite ran too."""
    return f"quick_{name}" if suite == "quick" else name


def readme_block(root: Path) -> str:
    """What stands in README.md from `BEGIN` to `END`.

    Args:
        root: folder that holds a folder of rows for each device.

    Returns:
        Markdown: the GPUs first, then the CPUs; what none has measured is said plainly.
    """
    devices: dict[str, list[list[str]]] = {"gpu": [], "cpu": []}
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        rows = read_rows(folder)
        ran = suites(rows)
        for device, sections in devices.items():
            # The quick suite stands in where a CPU has not run the whole one.
            own = [suite for suite in _SUITES[device] if suite in ran]
            if own:
                sections.append(_device(folder, rows, own[0]))
    said = []
    if not devices["gpu"]:
        said += ["**No GPU has run these benchmarks yet**: what they say holds for CPUs alone.", ""]
    if not devices["cpu"]:
        said += ["No CPU has either: `python -m bench.run` writes the rows.", ""]
    lines = [*said, *(line for own in devices.values() for section in own for line in section)]
    return "\n".join([BEGIN, *lines[:-1], END])


def summary(folder: Path) -> str:
    """Everything that a folder's newest rows say: its summary.md.

    Args:
        folder: of one device, with its pictures.

    Returns:
        Markdown: for each suite every case, variant, part and op.
    """
    rows = read_rows(folder)
    lines = [f"# {folder.name}", "", "Written by `python -m bench.plot`."]
    for suite in suites(rows):
        steps, ops = newest(rows, "step", suite), newest(rows, "op", suite)
        lines += ["", f"## Suite `{suite}`", "", *_source(rows, suite)]
        if steps:
            lines += ["", *step_table.findings(steps), "", *step_table.costs(steps)]
            lines += ["", *step_table.host_reads(steps)]
            lines += ["", "### Every step", "", *step_table.every_step(steps)]
            lines += ["", "### Parts of a step, ms", "", *step_table.parts(steps)]
        if ops:
            lines += ["", "### Ops", "", *map(op_table.roof, newest(rows, "roof", suite))]
            lines += ["", *op_table.every_op(ops)]
        for name, message in PICTURES.items():
            if (folder / picture(suite, name)).exists():
                lines += ["", f"![{message}]({picture(suite, name)})"]
    reuse = prompt_kv.newest_rows(rows)
    if reuse:
        lines += ["", "## Reuse of the prompt's keys and values", "", *prompt_kv.lines(reuse)]
    unrolled = newest(rows, "unroll", None)
    if unrolled:
        lines += ["", "## The gradient through the inner loop", "", *unroll_table.lines(unrolled)]
        lines += _unroll_picture(folder, UNROLL)
    return "\n".join(lines) + "\n"


def _device(folder: Path, rows: list[Row], suite: str) -> list[str]:
    """A device's part of the README, with an empty line after it."""
    place = f"bench/results/{folder.name}"
    steps, ops = newest(rows, "step", suite), newest(rows, "op", suite)
    pictures = {
        name: [f"![{PICTURES[name]}]({place}/{picture(suite, name)})", ""]
        for name in _IN_README
        if (folder / picture(suite, name)).exists()
    }
    device = (steps or ops or newest(rows, "roof", suite))[0]["device"]
    lines = [f"### {device}", "", *_source(rows, suite)]
    lines += [f"- Every case: [summary.md]({place}/summary.md); its rows: `{place}/*.jsonl`.", ""]
    if steps:
        lines += [*step_table.findings(steps), *_movement(rows, steps), ""]
        lines += [*step_table.costs(steps), ""]
        lines += [*step_table.host_reads(steps), ""]
    lines += pictures.get("cost_vs_k.png", []) + pictures.get("by_length.png", [])
    if ops:
        lines += [*op_table.first_cases(ops), "", *_movement(rows, ops), ""]
    lines += pictures.get("ops_roofline.png", [])
    reuse = prompt_kv.newest_rows(rows)
    if reuse:
        lines += [*prompt_kv.lines(reuse), ""]
    unrolled = newest(rows, "unroll", None)
    if unrolled:
        lines += [*unroll_table.lines(unrolled), *_unroll_picture(folder, f"{place}/{UNROLL}"), ""]
    return lines


def _unroll_picture(folder: Path, link: str) -> list[str]:
    """An empty line and the picture of `bench.unroll`, if the folder has it."""
    message = "Memory and time of the gradient through the inner loop, against K"
    return ["", f"![{message}]({link})"] if (folder / UNROLL).exists() else []


def _movement(rows: list[Row], shown: list[Row]) -> list[str]:
    """How far ratios are from those of the run before, if there was one.

    Args:
        rows: all of the folder.
        shown: those of one benchmark that the page shows.
    """
    alike = [row for row in rows if row["bench"] == shown[0]["bench"]]
    moved = against_previous(alike, max(row["run"] for row in shown))
    return [] if moved is None else [f"- How repeatable that is: {moved}."]


def _source(rows: list[Row], suite: str) -> list[str]:
    """Where the figures are from: software, commit and day of each benchmark."""
    lines = []
    for bench, name in (("step", "Steps"), ("op", "Ops")):
        own = newest(rows, bench, suite)
        if own:
            row = own[0]
            days = sorted({each["run"][:10] for each in own})
            software = f"torch {row['torch']}, Triton {row['triton'] or 'none'}"
            software += f", CUDA {row['cuda']}, driver {row['driver']}" if "cuda" in row else ""
            dirty = ", **with changes that are not committed**" if row["dirty"] else ""
            lines.append(
                f"- {name}: suite `{suite}` of {' and '.join(days)}, commit "
                f"`{(row['commit'] or 'none')[:7]}`{dirty}; {row['device']}, {row['threads']} "
                f"threads, {row['dtype']}, {software}."
            )
    return lines
