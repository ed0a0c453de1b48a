"""Rows of `bench.prompt_kv` in Markdown, and as the sentence in the option's docstring."""

from bench.ratios import over_base
from bench.results import Row
from bench.table import table

_SENTENCE_K = 2  # inner steps of the figures in the docstring: the paper's best


def newest_rows(rows: list[Row]) -> list[Row]:
    """Those of the newest run, in their order; none where it never ran."""
    own = [row for row in rows if row["bench"] == "prompt_kv"]
    last = max((row["run"] for row in own), default=None)
    return [row for row in own if row["run"] == last]


def lines(rows: list[Row]) -> list[str]:
    """What was measured, and a table: a row for each prompt share and K.

    Args:
        rows: of one run.

    Returns:
        Lines of Markdown.
    """
    first = rows[0]
    said = (
        f"`prefix_reuse: prompt_kv` beside the exact memory, on the demo's model after "
        f"{first['train_steps']} training steps, {first['batches']} held-out batches of "
        f"{first['batch_size']} x {first['length']} tokens (`python -m bench.prompt_kv`, "
        f"{first['run'][:10]}, commit `{first['commit'][:7]}`, {first['device']}, "
        f"{first['threads']} threads). Changes are relative; beside them, what leaving the memory "
        "out altogether changes."
    )
    head = ["prompt", "K", "cosine of what the inner loop wrote, mean and least"]
    head += [
        "outer loss",
        "without memory",
        "outer gradient",
        "without memory",
        "forward and backward, time over exact",
    ]
    body = [
        [
            f"{row['prompt_share']:.0%}",
            str(row["k"]),
            f"{row['fast_weight_cosine']:.6f}, {row['fast_weight_cosine_min']:.6f}",
            *(
                f"{row[key]:.1e}"
                for key in (
                    "loss_change",
                    "memory_loss_change",
                    "gradient_change",
                    "memory_gradient_change",
                )
            ),
            f"{over_base(row):.2f}",
        ]
        for row in rows
    ]
    return [said, "", *table(head, body)]


def sentence(rows: list[Row]) -> str:
    """The figures with K = 2 in words, for the docstring of `MemoryConfig.prefix_reuse`.

    Args:
        rows: of one run.

    Returns:
        One sentence.
    """
    own = [row for row in rows if row["k"] == _SENTENCE_K]
    first = own[0]

    def each(form: str, key: str) -> str:
        return ", ".join(form.format(row[key]) for row in own)

    shares = ", ".join(f"{100 * row['prompt_share']:.0f}" for row in own)
    times = ", ".join(f"{over_base(row):.2f}" for row in own)
    return (
        f"On the demo's model after {first['train_steps']} training steps, with K = {_SENTENCE_K} "
        f"and prompts of {shares} % of {first['length']} tokens: cosine to the exact fast weights' "
        f"change {each('{:.6f}', 'fast_weight_cosine')}; relative change of the outer loss "
        f"{each('{:.1e}', 'loss_change')} and of the outer gradient "
        f"{each('{:.1e}', 'gradient_change')}; time of forward and backward {times} of the exact "
        "on a CPU (`python -m bench.prompt_kv`)."
    )
