"""Which example comes when, and in which epoch: the two numbers that every random draw hangs on."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset, Sampler

# The collator's streams of an example are 0 and 1; the order of an epoch must not repeat them.
_ORDER_STREAM = 2


class Examples(Protocol):
    """What can be trained on: a sequence of mappings, such as a list or a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class NumberedDataset(Dataset[dict[str, Any]]):
    """Adds `example` and `epoch` to each example, from the index pair that a sampler yields.

    The pair travels with the index, so loader processes, prefetching and resuming change nothing.

    Args:
        examples: mappings with `input_ids` and `labels`.
    """

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:
        """The example, for `index` = (epoch, example).

        An example of -1 fills up a batch: it has the first one's tokens and no label, so it counts
        nowhere.
        """
        epoch, example = index
        if example >= 0:
            return {**self.examples[example], "example": example, "epoch": epoch}
        feature = dict(self.examples[0])
        labels = [-100] * len(feature["input_ids"])
        return {**feature, "labels": labels, "example": 0, "epoch": epoch, "filler": True}


class TrainOrder(Sampler[tuple[int, int]]):
    """Every example once an epoch, in an order that is a function of the seed and the epoch.

    Args:
        length: number of examples.
        seed: at least 0.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = np.random.default_rng([self.seed, self.epoch, 0, _ORDER_STREAM])
        for example in generator.permutation(self.length):
            yield self.epoch, int(example)


class EvaluationOrder(Sampler[tuple[int, int]]):
    """Every example in its place, always of epoch 0: each evaluation sees the same masks.

    Args:
        length: number of examples.
        multiple: fill up with examples of -1 to a multiple of this, so that several processes get
            equal shares and none counts an example twice.
    """

    def __init__(self, length: int, multiple: int = 1) -> None:
        self.length = length
        self.filled_length = -(-length // multiple) * multiple

    def __len__(self) -> int:
        return self.filled_length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for example in range(self.filled_length):
            yield 0, example if example < self.length else -1
