"""Tables of a probe, made of its rows."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from memdlm.probe.retrieval import AS_TRAINED, OFF, UNRELATED, WITH, WITHOUT

Row = dict[str, Any]
# Experts of a projection that are listed: those with the largest updates.
_EXPERTS_SHOWN = 8


def select(rows: Sequence[Row], measure: str, **values: Any) -> list[Row]:
    """The rows of a measure that have these values."""
    return [
        row
        for row in rows
        if row["measure"] == measure and all(row[key] == own for key, own in values.items())
    ]


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation, of several values."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form)}"


def mean_and_error(lists: Sequence[Sequence[float | None]]) -> tuple[float, float]:
    """Mean and standard error over cases, each the mean of what the models have for it.

    Args:
        lists: of each model the cases, None where it has none of one.

    Returns:
        Both; the error is nan for a single case.
    """
    cases = []
    for values in zip(*lists, strict=True):
        known = [value for value in values if value is not None]
        cases += [statistics.fmean(known)] if known else []
    error = statistics.stdev(cases) / len(cases) ** 0.5 if len(cases) > 1 else float("nan")
    return statistics.fmean(cases), error


def pooled(rows: Sequence[Row], name: str) -> list[float]:
    """The lists of all models in one, without what is None."""
    return [value for row in rows for value in row[name] if value is not None]


def probe_tables(rows: Sequence[Row]) -> dict[str, str]:
    """Markdown tables.

    Args:
        rows: of every measure, of all models.

    Returns:
        "weights", "tokens", and where there are such rows "experts", "retrieval", "gain", "key".
    """
    tables: dict[str, Callable[[Sequence[Row]], list[list[str]]]] = {
        "weights": _weights,
        "experts": _experts,
        "tokens": _tokens,
        "retrieval": _retrieval,
        "gain": _gain,
        "key": _key,
    }
    made = {name: make(rows) for name, make in tables.items()}
    return {name: _markdown(lines) for name, lines in made.items() if len(lines) > 1}


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *body = lines
    texts = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(texts + ["| " + " | ".join(cells) + " |" for cells in body])


def _weights(rows: Sequence[Row]) -> list[list[str]]:
    found = select(rows, "projection")
    head = ["", "update / weight, %", "change of A / A, %", "effective rank"]
    experts = any(row["experts"] for row in found)
    lines = [[*head, "experts written, %"] if experts else head]
    for name in dict.fromkeys(row["projection"] for row in found):
        own = select(found, "projection", projection=name)
        moved = [100 * value for value in pooled(own, "moved_of_prompts")]
        relative = [100 * value for value in pooled(own, "relative_of_prompts")]
        cells = [
            name,
            spread(relative, ".3f"),
            spread(moved, ".3f") if moved else "",
            spread(pooled(own, "effective_rank_of_prompts"), ".2f"),
        ]
        written = [100 * value for value in pooled(own, "written_of_prompts")]
        lines.append([*cells, spread(written, ".0f")] if experts else cells)
    return lines


def _experts(rows: Sequence[Row]) -> list[list[str]]:
    found = select(rows, "expert")
    lines = [["", "expert", "update / weight, %", "prompts that wrote it, %", "routed to it, %"]]
    for name in dict.fromkeys(row["projection"] for row in found):
        own = select(found, "expert", projection=name)
        means = []
        for expert in dict.fromkeys(row["expert"] for row in own):
            same = [row for row in own if row["expert"] == expert]
            values = [
                100 * statistics.fmean(row[key] for row in same)
                for key in ("relative", "written", "routed")
            ]
            means.append((expert, *values))
        for expert, *values in sorted(means, key=lambda each: -each[1])[:_EXPERTS_SHOWN]:
            lines.append([name, str(expert), f"{values[0]:.3f}"] + [f"{v:.1f}" for v in values[1:]])
    return lines


def _tokens(rows: Sequence[Row]) -> list[list[str]]:
    found = select(rows, "tokens")
    lines = [["", "predicted in writing", "tokens", "NLL off", "on minus off", "fell, %"]]
    for kind, written in dict.fromkeys((row["kind"], row["written"]) for row in found):
        own = select(found, "tokens", kind=kind, written=written)
        mean, error = mean_and_error([row["change_of_prompts"] for row in own])
        lines.append(
            [
                kind,
                "yes" if written else "no",
                str(sum(row["tokens"] for row in own)),
                f"{statistics.fmean(row['off'] for row in own):.3f}",
                _signed(mean, error),
                f"{100 * statistics.fmean(row['fell'] for row in own):.0f}",
            ]
        )
    return lines


def _retrieval(rows: Sequence[Row]) -> list[list[str]]:
    found = select(rows, "retrieval")
    lines = [["context", "memory of", "setting", "recall, %", "NLL", "median rank", "minus off"]]
    keys = dict.fromkeys((row["context"], row["memory"], row["setting"]) for row in found)
    order = [(WITH, OFF), (WITH, WITH), (WITHOUT, OFF)]
    order += [(WITHOUT, source) for source in (WITH, WITHOUT, UNRELATED)]
    for context, memory, setting in sorted(keys, key=lambda key: order.index(key[:2])):
        own = select(found, "retrieval", context=context, memory=memory, setting=setting)
        off = select(found, "retrieval", context=context, memory=OFF)
        shown = [context, memory, "" if memory == OFF else setting]
        shown.append(spread([100 * statistics.fmean(row["right"]) for row in own], ".1f"))
        shown.append(spread([statistics.fmean(row["nll"]) for row in own], ".3f"))
        shown.append(f"{statistics.median(pooled(own, 'rank')):.0f}")
        lines.append(shown + ["" if memory == OFF else _signed(*difference(own, off))])
    return lines


def _gain(rows: Sequence[Row]) -> list[list[str]]:
    """What the needle in the memory adds where it is not in the context."""
    found = select(rows, "retrieval", context=WITHOUT)
    lines = [["setting", "all", "no token predicted", "one", "both", "against unrelated text"]]
    for setting in dict.fromkeys(row["setting"] for row in found if row["memory"] != OFF):
        own, without, unrelated = (
            select(found, "retrieval", setting=setting, memory=memory)
            for memory in (WITH, WITHOUT, UNRELATED)
        )
        cells = [_signed(*difference(own, without))]
        for count in range(3):
            chosen = [i for i, masked in enumerate(own[0]["masked"]) if masked == count]
            told = _signed(*difference(own, without, chosen)) if chosen else ""
            cells.append(f"{told} ({len(chosen)})")
        lines.append([setting, *cells, _signed(*difference(own, unrelated))])
    return lines


def _key(rows: Sequence[Row]) -> list[list[str]]:
    """Whether a memory brings up the asked value, or every value that it was written to predict."""
    found = select(rows, "retrieval", context=WITHOUT)
    lines = [["setting"]]
    for state in ("predicted", "not predicted"):
        lines[0] += [f"asked, {state}", f"others, {state}"]
    off = {row["model"]: row for row in found if row["memory"] == OFF}
    for setting in dict.fromkeys(row["setting"] for row in found if row["memory"] != OFF):
        cells = [setting]
        for predicted in (True, False):
            asked, others = [], []
            for row in select(found, "retrieval", setting=setting, memory=WITH):
                before = off[row["model"]]
                asked.append(_changes(row["nll"], before["nll"], row["masked"], predicted))
                parts = (row["others"], before["others"], row["others_masked"])
                own, old, masked = ([v for each in part for v in each] for part in parts)
                others.append(_changes(own, old, masked, predicted))
            for lists in (asked, others):
                known = any(value is not None for value in lists[0])
                cells.append(_signed(*mean_and_error(lists)) if known else "")
        lines.append(cells)
    return lines


def _changes(
    own: Sequence[float], before: Sequence[float], masked: Sequence[int], predicted: bool
) -> list[float | None]:
    """NLL minus what it was, None where a value is not (or is) one with a predicted token."""
    return [
        after - first if (count > 0) == predicted else None
        for after, first, count in zip(own, before, masked, strict=True)
    ]


def difference(
    rows: Sequence[Row], others: Sequence[Row], chosen: Sequence[int] | None = None
) -> tuple[float, float]:
    """Mean NLL of some rows minus that of others, paired by model and question, and its error.

    Args:
        rows, others: one for each model.
        chosen: the questions that count; None for all.
    """
    pairs = [
        (row["nll"], next(each["nll"] for each in others if each["model"] == row["model"]))
        for row in rows
    ]
    places = range(len(pairs[0][0])) if chosen is None else chosen
    return mean_and_error([[own[i] - other[i] for i in places] for own, other in pairs])


def _signed(mean: float, error: float) -> str:
    return f"{mean:+.4f}" if error != error else f"{mean:+.4f} ± {error:.4f}"


def probe_report(rows: Sequence[Row]) -> str:
    """The tables with what they mean, as `probe.md`."""
    tables = probe_tables(rows)
    parts = []
    for name, table in tables.items():
        parts += [f"## {_TITLES[name][0]}", "", table, "", _TITLES[name][1], ""]
    return "\n".join(parts)


_TITLES = {
    "weights": (
        "What was written",
        "Frobenius norms, ± the standard deviation over prompts and models. The effective rank is "
        "exp of the entropy of the squared singular values' shares.",
    ),
    "experts": ("Experts", "Those with the largest updates; means over prompts and models."),
    "tokens": (
        "Whose loss fell",
        "Nats per masked token, under masks that are not those of writing; ± the standard error "
        "over prompts. Predicted in writing: masked in a state that the inner loop visited.",
    ),
    "retrieval": (
        "Retrieval",
        "Recall ± its standard deviation over models, if there are several; NLL in nats per value "
        f'token; the last column is paired by question, ± its standard error. "{AS_TRAINED}": the '
        "checkpoint's own inner loop.",
    ),
    "gain": (
        "What the needle in the memory adds, without it in the context",
        "NLL under a memory of the prompt with the needle, minus that under one of the same prompt "
        "without it; below 0 the memory holds the value. Paired by question, ± its standard error; "
        "apart by how many of the value's two tokens the memory was written to predict, with the "
        "number of questions. The last column subtracts the memory of unrelated text instead.",
    ),
    "key": (
        "Is it bound to its key?",
        "NLL of values in the place of the answer, without the needle in the context: under a "
        "memory of the prompt with the needle, minus off. Asked: the value of the question; "
        "others: the values of other keys, which stand in memory and context. Predicted: at least "
        "one of a value's tokens was masked in writing. ± the standard error over values.",
    ),
}
