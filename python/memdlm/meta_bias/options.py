"""What `memdlm meta-bias` can be told, and the inner loops that this makes."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from memdlm.config import MemoryConfig
from memdlm.evaluation.folders import folders_of, labels_of

CENTRE = "centre"
VARIED = ("inner_steps", "inner_lr", "inner_max_norm")


@dataclass(frozen=True)
class Setting:
    """One inner loop that gradients are compared for.

    Attributes:
        varied: the option in which it differs from the model's own, one of `VARIED`; or `CENTRE`.
        memory: its options, first order.
    """

    varied: str
    memory: MemoryConfig

    @property
    def max_norm(self) -> float | None:
        """What clipping keeps; None without it."""
        return None if self.memory.inner_clip == "none" else self.memory.inner_max_norm


@dataclass(frozen=True)
class MetaBiasOptions:
    """What `memdlm meta-bias` is told.

    Attributes:
        models: checkpoints, in the order of their training: folders, or "demo" for the base that
            the demo starts from, with a comma in between.
        names: their names in the tables, all different, with a comma in between; if not given,
            those of the folders.
        dataset: what batches are made of, in the forms of `memdlm train`; if not given, examples as
            the demo trains on, for models with its tokenizer.
        dataset_split: which split of a dataset that has several.
        count: batches, at least 2.
        batch_size: examples of a batch.
        inner_steps: K, with a comma in between. One option is varied at a time; the others are the
            model's, or the paper's for a model that was trained without a memory.
        inner_lr: learning rates, likewise.
        inner_max_norm: norms that clipping keeps, likewise; "none" does not clip.
        max_length: most tokens of an example; the model's own limit if not given.
        out: folder of `meta_bias.jsonl`, `meta_bias.md` and the pictures.
        seed: of the demo's examples, the masks and the fast weights' initial values.
        dtype: of the weights; "auto" is what they were saved in.
        device: where the model runs; the first GPU if there is one.

    Raises:
        ValueError: an option outside its range.
    """

    models: str
    names: str | None = None
    dataset: str | None = None
    dataset_split: str | None = None
    count: int = 8
    batch_size: int = 8
    inner_steps: str = "1,2,4"
    inner_lr: str = "0.03,0.1,0.3,1.0"
    inner_max_norm: str = "0.1,1,10,none"
    max_length: int | None = None
    out: str = "runs/meta_bias"
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    device: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("count", 2), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        labels_of(self.names, self.folders)
        for name in ("dataset_split", "max_length"):
            if self.dataset is None and getattr(self, name) is not None:
                raise ValueError(f"{name} would not be read: dataset is not given")
        self.settings(MemoryConfig())

    @property
    def folders(self) -> list[str]:
        """The models, one by one."""
        return folders_of(self.models)

    @property
    def labels(self) -> list[str]:
        """Their names."""
        return labels_of(self.names, self.folders)

    def settings(self, memory: MemoryConfig) -> list[Setting]:
        """The inner loops to compare, each once, the model's own first.

        Args:
            memory: the model's own.

        Returns:
            Settings, all first order and without what the exact gradient does not go with.

        Raises:
            ValueError: a value that cannot be read, or outside its range.
        """
        own = dataclasses.replace(
            memory, meta_gradient="first_order", prefix_reuse="none", inner_graph=False
        )
        clip = "tensor" if own.inner_clip == "none" else own.inner_clip
        found = [Setting(CENTRE, own)]
        for name in VARIED:
            for value in self._values(name):
                changes: dict[str, Any] = {name: value}
                if name == "inner_max_norm":
                    changes = (
                        {"inner_clip": "none"}
                        if value is None
                        else {"inner_clip": clip, "inner_max_norm": value}
                    )
                setting = Setting(name, dataclasses.replace(own, **changes))
                if all(_read(setting) != _read(other) for other in found):
                    found.append(setting)
        return found

    def _values(self, name: str) -> list[int | float | None]:
        read: Callable[[str], int | float] = int if name == "inner_steps" else float
        values: list[int | float | None] = []
        for word in getattr(self, name).split(","):
            if name == "inner_max_norm" and word.strip() == "none":
                values.append(None)
                continue
            try:
                values.append(read(word))
            except ValueError as error:
                kind = "whole numbers" if read is int else "numbers"
                raise ValueError(
                    f"{name} must be {kind} with a comma in between, got {getattr(self, name)!r}"
                ) from error
        return values


def _read(setting: Setting) -> tuple[int, float, float | None]:
    return setting.memory.inner_steps, setting.memory.inner_lr, setting.max_norm
