"""The demo's report: a table on the terminal, `summary.json`, `report.md` and plots."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

STATES = ("memory off", "memory on")
COLOURS = {"base": "#9a9a9a", "MDLM": "#d08a2e", "MemDLM": "#2e6fd0"}


def write_report(out: Path, summary: dict[str, Any]) -> None:
    """Write everything about a finished demo, and print its table.

    Args:
        out: folder with `metrics.jsonl` in it.
        summary: from `run_demo`.
    """
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    _plot_loss(out / "loss.png", rows)
    _plot_recall(out / "recall.png", summary["results"])
    _plot_cost(out / "cost.png", summary["cost"])
    table = results_table(summary["results"])
    (out / "report.md").write_text(_markdown(summary, table), encoding="utf-8")
    print(table)
    print(_cost_sentence(summary["cost"]))
    print(f"\n{summary['seconds']:.0f} s; the report is in {out / 'report.md'}")


def results_table(results: dict[str, Any]) -> str:
    """Markdown table: a row for each model with memory off and on, a column for each figure."""
    names = list(next(iter(results.values()))[STATES[0]])
    head = ["model", "memory", *(_heading(name) for name in names)]
    body = [
        [model, state.removeprefix("memory "), *(_figure(n, results[model][state]) for n in names)]
        for model in results
        for state in STATES
    ]
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, body)])


def _heading(name: str) -> str:
    if name == "nll":
        return "NLL, nats/token"
    _, length, kind = name.split("_")
    return f"recall at {length}, {kind}"


def _figure(name: str, own: dict[str, float]) -> str:
    return f"{own[name]:.3f}" if name == "nll" else f"{100 * own[name]:.1f} %"


def _cost_sentence(cost: dict[str, Any]) -> str:
    times = cost["step_ms_p50"]
    return (
        f"Step time, median: MDLM {times['MDLM']:.0f} ms, MemDLM {times['MemDLM']:.0f} ms; "
        f"MemDLM / MDLM = {cost['ratio_p50']:.2f} (median of ratios, steps in alternation)."
    )


def _markdown(summary: dict[str, Any], table: str) -> str:
    return f"""# MDLM and MemDLM on the same batches

Both arms were fine-tuned for {summary["steps"]} steps from one base of
{summary["parameters"] / 1e6:.1f} M parameters, on the same batches of {summary["batch_size"]}
sequences of {summary["length"]} tokens with the same masks (seed {summary["seed"]}). MemDLM wrote
its memory with K = {summary["inner_steps"]} inner steps for every batch.

{table}

NLL is the masked-diffusion bound on held-out responses, each counted alike. Recall is the share of
the values asked for (one, or all of several) that stand in the response to a held-out prompt of so
many tokens, when the whole response is masked and filled in at once; chance is below 0.1 % for a
guess, and 100 / (number of facts in the prompt) % for copying a fact at random. Training prompts
have {summary["length"]} tokens. "Memory on": each prompt writes its own fast weights before it is
answered; for the base and MDLM, which were trained without a memory, that row shows what the same
procedure does to them.

{_finding(summary["results"], summary["recall_examples"])}

{_cost_sentence(summary["cost"])} ({summary["threads"]} threads, torch {summary["torch"]})

![training loss](loss.png)

![recall](recall.png)

![cost of a step](cost.png)
"""


def _finding(results: dict[str, Any], questions: int) -> str:
    """What the table says, in words, whichever way it went."""
    off, on = (results["MemDLM"][state] for state in STATES)
    plain = results["MDLM"][STATES[0]]
    lines = [
        "What this run says (one seed, a small model). Differences of NLL within 1 % and of recall",
        "within two standard errors, are called even.",
        "",
    ]
    for name in off:
        lines.append(
            f"- {_heading(name)}: MemDLM with memory off is "
            f"{_verdict(name, off[name], plain[name], questions)} MDLM; turning the memory on is "
            f"{_verdict(name, on[name], off[name], questions)} leaving it off."
        )
    return "\n".join(lines)


def _verdict(name: str, ours: float, theirs: float, questions: int) -> str:
    if name == "nll":
        gain, noise = theirs - ours, 0.01 * theirs
    else:
        share = (ours + theirs) / 2
        gain, noise = ours - theirs, 2 * math.sqrt(2 * share * (1 - share) / questions)
    if abs(gain) <= noise:
        return "even with"
    return "better than" if gain > 0 else "worse than"


def _plot_loss(path: Path, rows: list[dict[str, Any]]) -> None:
    figure, (above, below) = plt.subplots(2, figsize=(7, 6), sharex=True)
    losses = {arm: [r["loss"] for r in rows if r["arm"] == arm] for arm in ("MDLM", "MemDLM")}
    for arm, own in losses.items():
        steps = range(1, len(own) + 1)
        above.plot(steps, own, color=COLOURS[arm], alpha=0.2, linewidth=0.8)
        above.plot(steps, _smooth(own), color=COLOURS[arm], label=f"{arm}, mean of 21 steps")
    gap = [ours - plain for ours, plain in zip(losses["MemDLM"], losses["MDLM"], strict=True)]
    below.plot(steps, gap, color=COLOURS["MemDLM"], alpha=0.2, linewidth=0.8)
    below.plot(steps, _smooth(gap), color=COLOURS["MemDLM"])
    below.axhline(0, color="black", linewidth=0.8)
    above.set(ylabel="training loss", ylim=(0, None), title="Same batches, same masks")
    below.set(xlabel="step", ylabel="MemDLM - MDLM")
    above.legend()
    _save(figure, path)


def _smooth(values: list[float], window: int = 21) -> list[float]:
    half = window // 2
    spans = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(span) / len(span) for span in spans]


def _plot_recall(path: Path, results: dict[str, Any]) -> None:
    names = [name for name in results["base"][STATES[0]] if name != "nll"]
    bars = [(model, state) for model in results for state in STATES]
    width = 0.8 / len(bars)
    figure, axes = plt.subplots(figsize=(7, 4))
    for number, (model, state) in enumerate(bars):
        places = [i + (number - (len(bars) - 1) / 2) * width for i in range(len(names))]
        heights = [100 * results[model][state][name] for name in names]
        on = state == STATES[1]
        axes.bar(
            places,
            heights,
            width * 0.95,
            color=COLOURS[model],
            alpha=0.55 if on else 1.0,
            hatch="//" if on else None,
            label=f"{model}, {state}",
        )
    labels = [name.removeprefix("recall_").replace("_", " tokens,\n") for name in names]
    axes.set_xticks(range(len(names)), [f"{label} asked" for label in labels])
    axes.set(ylabel="values recalled, %", ylim=(0, 125), title="Needle recall on held-out text")
    axes.legend(fontsize=8, ncols=3, loc="upper center")
    _save(figure, path)


def _plot_cost(path: Path, cost: dict[str, Any]) -> None:
    figure, axes = plt.subplots(figsize=(5, 4))
    arms = list(cost["step_ms"])
    axes.boxplot(
        [cost["step_ms"][arm] for arm in arms],
        tick_labels=arms,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": "#dde6f5"},
        medianprops={"color": "black"},
    )
    axes.set(
        ylabel="time of a training step, ms",
        ylim=(0, None),
        title=f"MemDLM / MDLM = {cost['ratio_p50']:.2f}",
    )
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
