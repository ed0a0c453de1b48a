"""How figures and tables look in Markdown."""


def table(head: list[str], body: list[list[str]]) -> list[str]:
    """Lines of a Markdown table.

    Args:
        head: of the columns.
        body: cells of each row.

    Returns:
        One line for the head, one below it, and one for each row.
    """
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return [rows[0], "|" + "---|" * len(head), *rows[1:]]


def figure(value: float) -> str:
    """A time in ms or a size in MiB, with three significant digits but no more than measured."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def span(values: list[float]) -> str:
    """The least and the greatest of some ratios."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low} ×" if low == high else f"{low} to {high} ×"


def or_dash(value: float | None, form: str = "{}") -> str:
    """The value in a form, or a dash where there is none."""
    return "-" if value is None else form.format(value)
