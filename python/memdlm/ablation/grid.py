"""A grid file: which options are varied, and the runs that this makes."""

import dataclasses
import hashlib
import itertools
import json
import re
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from memdlm.config import MemoryConfig
from memdlm.demo.examples import MIN_LENGTH
from memdlm.key_values import read_yaml, suggest, typed
from memdlm.options import Run, key_defaults, key_hints, make_run

# Keys that only inference reads: what differs in these alone is trained once.
INFERENCE_KEYS = ("prompt_ratio",)
_OWN_KEYS = ("seed", "output_dir")
# What every run is measured on cannot differ between them.
_FIXED_KEYS = ("dataset", "dataset_split", "eval_dataset", "max_length")
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Grid:
    """What `memdlm ablate` runs.

    Attributes:
        ablations: name to options and their values: `clip: {inner_clip: [tensor, global]}`; of
            several options every combination is run. Any key of `memdlm train`.
        run: keys of `memdlm train` for all runs. `model` and `dataset` may be left out: the demo's,
            with 300 steps and its learning rate, of which every key can be set here.
        seeds: each combination is trained with each.
        out: folder of the models, rows, tables and pictures.
        examples: held-out examples for the NLL and the exposure bias, at least 2; with a `dataset`
            of your own the first of its `eval_dataset`.
        exposure_bias: measure it; it takes about as long as the rest.
        recall_lengths: tokens of the prompts whose needles are asked for; read with the demo's data
            alone, where it is [256, 512] if not given; empty for none.
        recall_examples: questions of each length and kind, at least 1.

    Raises:
        ValueError: an option outside its range.
    """

    ablations: dict[str, Any]
    run: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    out: str = "runs/ablations"
    examples: int = 64
    exposure_bias: bool = True
    recall_lengths: list[int] | None = None
    recall_examples: int = 64

    def __post_init__(self) -> None:
        if not self.ablations:
            raise ValueError("ablations must name at least one, got none")
        for name, options in self.ablations.items():
            if not _NAME.fullmatch(str(name)):
                raise ValueError(
                    f"ablations must have names of letters, digits, . _ -, got {name!r}"
                )
            if not isinstance(options, dict) or not options:
                raise ValueError(f"ablations must map {name} to options, got {options!r}")
            for key, values in options.items():
                if not isinstance(values, list) or not values:
                    raise ValueError(
                        f"ablations.{name}.{key} must be a list of values, got {values!r}"
                    )
                if key in _FIXED_KEYS:
                    raise ValueError(f"{key} must be the same for all runs: set it in run")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different whole numbers from 0, got {self.seeds}")
        for name, least in (("examples", 2), ("recall_examples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.recall_lengths is not None and not self.on_demo:
            raise ValueError("recall_lengths is read with the demo's data alone, got a dataset")
        for length in self.recall_lengths or ():
            if length < MIN_LENGTH:
                raise ValueError(f"recall_lengths must be at least {MIN_LENGTH}, got {length}")
        if not self.on_demo and "eval_dataset" not in self.run:
            raise ValueError("run.eval_dataset must be given beside run.dataset: it is measured on")

    @property
    def on_demo(self) -> bool:
        """Whether the runs train on the demo's examples."""
        return "dataset" not in self.run


@dataclass(frozen=True)
class Cell:
    """One point of one ablation, with one seed.

    Attributes:
        ablation: its name.
        values: option to value.
        seed: of masks, order and fast weights.
        keys: of `memdlm train`, without `output_dir`.
    """

    ablation: str
    values: dict[str, Any]
    seed: int
    keys: dict[str, Any]

    @property
    def training(self) -> dict[str, Any]:
        """The keys that training reads; the same for cells that train alike."""
        defaults = key_defaults()
        return {
            key: value
            for key, value in self.keys.items()
            if key not in INFERENCE_KEYS and (key not in defaults or defaults[key] != value)
        }

    @property
    def prompt_ratio(self) -> float:
        """Of the memory that is written from a prompt."""
        return self.keys.get("prompt_ratio", MemoryConfig().prompt_ratio)

    @property
    def model_name(self) -> str:
        """Folder of the trained model: cells that train alike share it."""
        text = json.dumps(self.training, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def check(self) -> Run:
        """The run that `memdlm train` would make of the keys.

        Raises:
            ValueError: a key or value that it refuses; names the cell.
        """
        try:
            return make_run(self.keys | {"output_dir": self.model_name})
        except ValueError as error:
            shown = ", ".join(f"{key} {value}" for key, value in self.values.items())
            raise ValueError(f"ablation {self.ablation}, {shown}: {error}") from error


def read_grid(path: str, given: dict[str, Any]) -> Grid:
    """Read a grid file.

    Args:
        path: YAML with the keys of `Grid`.
        given: keys of the command line, which win.

    Returns:
        The grid.

    Raises:
        ValueError: not readable, an unknown key, a value of the wrong type or outside its range.
    """
    hints = get_type_hints(Grid)
    values = read_yaml(path) | given
    for key in values:
        if key not in hints:
            raise ValueError(f"unknown key {key!r} in {path}{suggest(key, hints)}")
    if "ablations" not in values:
        raise ValueError(f"ablations must be given in {path}")
    return Grid(**{key: typed(key, value, hints[key]) for key, value in values.items()})


def make_cells(grid: Grid, base: dict[str, Any]) -> list[Cell]:
    """Every run of a grid, checked as `memdlm train` would.

    Args:
        grid: the grid.
        base: keys of all runs that the grid may replace.

    Returns:
        Cells, ablation by ablation; a run may stand in several.

    Raises:
        ValueError: a key that does not exist, is this command's, or that nothing would read.
    """
    hints = key_hints()
    for key in (*grid.run, *(key for own in grid.ablations.values() for key in own)):
        if key not in hints:
            raise ValueError(f"unknown key {key!r}{suggest(key, hints)}")
        if key in _OWN_KEYS:
            raise ValueError(f"{key} cannot be set: seeds and out decide it")
    memory_keys = {option.name for option in dataclasses.fields(MemoryConfig)}
    cells = []
    for name, options in grid.ablations.items():
        for values in itertools.product(*options.values()):
            own = dict(zip(options, values, strict=True))
            keys = base | grid.run | own
            if keys.get("objective") == "mdlm":  # which has no memory to set up
                keys = {k: v for k, v in keys.items() if k not in memory_keys or k in own}
            for seed in grid.seeds:
                cell = Cell(name, own, seed, keys | {"seed": seed})
                run = cell.check()
                if grid.on_demo and run.arguments.max_steps < 1:
                    raise ValueError(
                        "max_steps must be at least 1 with the demo's data, which is made for so "
                        f"many steps, got {run.arguments.max_steps}"
                    )
                if grid.exposure_bias and run.diffusion.block_size is not None:
                    raise ValueError("exposure_bias must be false with block_size, got true")
                cells.append(cell)
    return cells
