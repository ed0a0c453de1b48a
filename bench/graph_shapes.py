"""How many CUDA graphs `inner_graph` needs, and how much it pads: `python -m bench.graph_shapes`.

Counts alone, no model: a stream of batches is drawn as the collator draws them, and the rows of its
states are padded by the rule that is used, and by others beside it.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np

from bench.table import table
from memdlm.data.collator import GRAPH_ROWS, _graph_rows
from memdlm.inner_graph import _MOST_RECORDINGS
from memdlm.trajectory import state_counts

_BATCHES = 2_000
# Name to B, L and the response's tokens: a number, or median and spread of a lognormal.
_STREAMS: dict[str, tuple[int, int, int | tuple[int, float]]] = {
    "2 x 4,096, 90 % prompt": (2, 4_096, 410),
    "2 x 4,096, 50 % prompt": (2, 4_096, 2_048),
    "8 x 2,048, 80 % prompt": (8, 2_048, 410),
    "8 x 2,048, responses of 300": (8, 2_048, (300, 0.8)),
    "2 x 4,096, responses of 400": (2, 4_096, (400, 0.9)),
}
# The counts of each state's masked tokens, by state and sequence.
Counts = list[list[int]]
# From the counts to the padded (W, M) of each state.
Rule = Callable[[Counts], list[tuple[int, int]]]


def main() -> None:
    """Print a table: a row for each stream, K and rule."""
    head = ["stream", "K", "padded to", "shapes", f"captures in {_BATCHES:,}", "W", "M"]
    print("\n".join(table(head, [row for name in _STREAMS for row in _rows(name)])))


def _rows(name: str) -> list[list[str]]:
    batch_size, length, response = _STREAMS[name]
    rows = []
    for k in (2, 4):
        batches = list(_stream(batch_size, length, response, k))
        bare = [_bare(counts) for counts in batches]
        for label, rule in _RULES.items():
            sizes = [rule(counts) for counts in batches]
            shares = [1 - _total(bare, axis) / _total(sizes, axis) for axis in (0, 1)]
            shapes = len({tuple(own) for own in sizes})
            padding = [f"{share:.0%}" for share in shares]
            rows.append([name, str(k), label, str(shapes), f"{_captures(sizes):,}", *padding])
    return rows


def _stream(
    batch_size: int, length: int, response: int | tuple[int, float], k: int
) -> Iterator[Counts]:
    generator = np.random.default_rng(0)
    for _ in range(_BATCHES):
        if isinstance(response, int):
            maskable = [response] * batch_size
        else:
            drawn = generator.lognormal(math.log(response[0]), response[1], batch_size)
            maskable = np.clip(drawn, 8, 0.85 * length).astype(int).tolist()
        times = generator.uniform(1e-3, 1, batch_size)
        anchors = generator.binomial(maskable, times).tolist()
        per_sequence = [
            state_counts("anchor_consistent", k, 1.5, anchor, most)
            for anchor, most in zip(anchors, maskable, strict=True)
        ]
        yield [list(counts) for counts in zip(*per_sequence, strict=True)]


def _bare(counts: Counts) -> list[tuple[int, int]]:
    """Without padding for a graph: the states before the anchor share a width."""
    *noisier, anchor = [(max(1, *own), sum(own)) for own in counts]
    widest = max(width for width, _ in noisier)
    return [*((widest, rows) for _, rows in noisier), anchor]


def _each_alone(counts: Counts) -> list[tuple[int, int]]:
    return [(_graph_rows(width), _graph_rows(rows)) for width, rows in _bare(counts)]


def _shared(size: Callable[[int], int]) -> Rule:
    def rule(counts: Counts) -> list[tuple[int, int]]:
        largest = [size(max(column)) for column in zip(*_bare(counts), strict=True)]
        return [(largest[0], largest[1])] * len(counts)

    return rule


def _finer(count: int) -> int:
    """Steps of a quarter of the power of two below, where the rule in use has halves."""
    multiple = max(GRAPH_ROWS, 1 << max(0, count.bit_length() - 3))
    return -(-max(1, count) // multiple) * multiple


_RULES: dict[str, Rule] = {
    "each state's own size": _each_alone,
    "the largest state's": _shared(_graph_rows),
    "the same, finer": _shared(_finer),
}


def _total(batches: list[list[tuple[int, int]]], axis: int) -> int:
    return sum(size[axis] for own in batches for size in own)


def _captures(batches: list[list[tuple[int, int]]]) -> int:
    """Batches whose shapes are not among those that are kept."""
    kept: OrderedDict[tuple[tuple[int, int], ...], None] = OrderedDict()
    captures = 0
    for own in batches:
        captures += tuple(own) not in kept
        kept[tuple(own)] = None
        kept.move_to_end(tuple(own))
        if len(kept) > _MOST_RECORDINGS:
            kept.popitem(last=False)
    return captures


if __name__ == "__main__":
    main()
