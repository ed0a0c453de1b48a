"""What the gradient through the inner loop costs, and what checkpointing saves.

`python -m bench.unroll` measures one forward and backward of the objective on the same batch:

- with `meta_gradient` "first_order", K = 2 and each `inner_checkpoint`, and of that the inner steps
  alone (`inner_steps`), whose peak is seldom the whole pass's;
- but for llada_moe_small, for several K with each `meta_gradient`, and as `kept_graph`: "exact"
  written plainly, which keeps the graphs of all inner steps until backward (`bench.kept_graph`).

Before anything is timed, "exact" must give the gradient that `kept_graph` gives.
"""

import argparse
import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from bench import plot, variants
from bench.cases import SMALL, SUITES, StepCase
from bench.kept_graph import kept_graph_loss
from bench.results import ROOT, Row, read_rows
from bench.run import folder_name
from bench.timing import interleaved_ms, machine, peak_mib, percentiles, write_rows
from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.inner_loop import adapt
from memdlm.objective import MemDLMObjective, anchor_boundary

# One of their layers is adapted; of llada_moe_small it is two, so that "layer" means something.
_UNROLLED = {case.model: case for case in SUITES["quick"].costs}
CASES = _UNROLLED | {"llada_moe_small": replace(SMALL["llada_moe_small"], batch_size=1)}
INNER_STEPS = (1, 2, 4, 8)
CHECKPOINTED_K = 2  # inner steps with which `inner_checkpoint` is compared
_CHECKPOINTS = ("none", "layer", "auto")
_GRADIENTS = ("first_order", "exact", "exact_suffix")
# Both sum in float32, in other orders; a wrong gradient is off by a whole digit.
_LARGEST_DIFFERENCE = 1e-3
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """One way to the gradient of the outer loss.

    Attributes:
        name: a `meta_gradient`, "kept_graph", or "inner_steps".
        k: inner steps.
        inner_checkpoint: of the inner loop, also of forward with an exact gradient; None where
            nothing is checkpointed.
    """

    name: str
    k: int
    inner_checkpoint: str | None = "auto"

    @property
    def memory(self) -> MemoryConfig:
        """Options of its inner loop."""
        options: dict[str, Any] = {"inner_steps": self.k}
        if self.inner_checkpoint is not None:
            options["inner_checkpoint"] = self.inner_checkpoint
        if self.name in _GRADIENTS:
            options["meta_gradient"] = self.name
        return MemoryConfig(**options)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print one line for each variant, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=CASES, nargs="+", default=list(CASES), help="models")
    parser.add_argument("--k", type=int, nargs="+", default=INNER_STEPS, help="inner steps")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds")
    parser.add_argument(
        "--out", type=Path, help="folder of the rows; by default bench/results/<this device>"
    )
    options = parser.parse_args(arguments)
    folder = options.out or ROOT / folder_name(_CPU)
    if any(folder.glob("*.jsonl")):
        read_rows(folder)  # refuses what an older version wrote, before an hour goes by
    run = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for name in options.cases:
        k = options.k if name in _UNROLLED else ()
        rows = measure(CASES[name], k, options.repeats, run)
        write_rows(folder / "unroll.jsonl", rows)
        print(f"\n{rows[0]['case']}\n{'variant':<13}{'checkpoint':>11}{'K':>3}{'ms':>9}{'MiB':>8}")
        for row in rows:
            print(
                f"{row['variant']:<13}{row['inner_checkpoint'] or '-':>11}{row['k']:>3}"
                f"{row['p50_ms']:>9,.0f}{row['peak_mib']:>8,.0f}"
            )
    plot.write(folder)


def measure(case: StepCase, inner_steps: Sequence[int], repeats: int, run: str) -> list[Row]:
    """Measure every variant of a case on the CPU, in float32.

    Args:
        case: the shape.
        inner_steps: the K.
        repeats: timed rounds, in which the variants take turns.
        run: when the invocation began, UTC, ISO seconds.

    Returns:
        One row for each variant.

    Raises:
        ValueError: "exact" and "kept_graph" differ.
    """
    torch.manual_seed(0)
    bare = AutoModelForCausalLM.from_config(case.config, dtype=torch.float32)
    if case.outer != "full":
        bare.requires_grad_(False)
    model, _ = variants._trained(bare, case)
    runs, held = {}, {}
    for variant in made_of(inner_steps):
        objective = MemDLMObjective(model, DiffusionConfig(), variant.memory)
        runs[variant] = _pass_of(variant, objective, case)
        held[variant] = objective.fast_weights.nbytes
    for k in tqdm(inner_steps, desc="comparing", leave=False):
        _check_gradients(model, runs[Variant("exact", k)], runs[Variant("kept_graph", k, None)])
    cleared = {variant: _cleared(take, model) for variant, take in runs.items()}
    times_ms = interleaved_ms({str(each): take for each, take in cleared.items()}, repeats, _CPU)
    facts = {
        "bench": "unroll",
        "suite": None,
        "run": run,
        **machine(_CPU),
        "case": case.name,
        "model": case.model,
        "batch_size": case.batch_size,
        "length": case.length,
        "prompt_share": case.prompt_share,
        "outer": case.outer,
        "dtype": "float32",
    }
    return [
        facts
        | {
            "variant": variant.name,
            "inner_checkpoint": variant.inner_checkpoint,
            "k": variant.k,
            "times_ms": [round(time_ms, 3) for time_ms in times_ms[str(variant)]],
            **percentiles(times_ms[str(variant)]),
            "peak_mib": round(peak_mib(take, _CPU) + held[variant] / 2**20, 1),
        }
        for variant, take in tqdm(cleared.items(), desc="memory", leave=False)
    ]


def made_of(inner_steps: Sequence[int]) -> list[Variant]:
    """What is measured: every gradient with every K, then the other checkpoints."""
    compared = [
        Variant(name, k, None if name == "kept_graph" else "auto")
        for k in inner_steps
        for name in (*_GRADIENTS, "kept_graph")
    ]
    others = [
        Variant(name, CHECKPOINTED_K, choice)
        for name in ("first_order", "inner_steps")
        for choice in _CHECKPOINTS
    ]
    return list(dict.fromkeys(compared + others))


def _pass_of(variant: Variant, objective: MemDLMObjective, case: StepCase) -> Callable[[], Tensor]:
    """A forward and backward on the case's batch; it leaves the gradients on the parameters."""
    (batch,) = variants.make_batches(case, DiffusionConfig(), variant.memory, 1, _CPU)
    if variant.name == "inner_steps":
        return _inner_steps(objective, batch)

    def take() -> Tensor:
        if variant.name == "kept_graph":
            loss = kept_graph_loss(objective, batch)
        else:
            loss = objective(batch).loss
        loss.backward()
        return loss.detach()

    return take


def _inner_steps(objective: MemDLMObjective, batch: dict[str, Any]) -> Callable[[], Tensor]:
    """The inner steps from the boundary on, which is made beforehand."""
    with torch.no_grad():
        anchor = anchor_boundary(objective.backbone, batch)
    boundaries = objective._boundaries(batch, anchor, None)
    teachers = [None] * len(boundaries)
    store = objective.fast_weights

    def take() -> Tensor:
        store.reset(batch["memory_seed"])
        states = batch["trajectory"]
        return adapt(objective.backbone, store, states, boundaries, teachers, objective.memory).loss

    return take


def _cleared(take: Callable[[], Tensor], model: Any) -> Callable[[], None]:
    """The same, which drops its gradients: they are of its own memory."""

    def run() -> None:
        take()
        model.zero_grad()

    return run


def _check_gradients(
    model: Any, exact: Callable[[], Tensor], kept_graph: Callable[[], Tensor]
) -> None:
    losses, gradients = [], []
    for take in (exact, kept_graph):
        losses.append(float(take()))
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found).double())
        model.zero_grad()
    one, other = gradients
    difference = ((one - other).norm() / other.norm()).item()
    largest = max(difference, abs(losses[0] / losses[1] - 1))
    if not largest < _LARGEST_DIFFERENCE:
        raise ValueError(
            f"exact and kept_graph must agree to {_LARGEST_DIFFERENCE:.0e}, got losses {losses} "
            f"and gradients {difference:.1e} apart"
        )


if __name__ == "__main__":
    main()
