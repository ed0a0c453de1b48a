"""`memdlm bias`: the exposure bias of checkpoints, with and without a memory, in one figure."""

import contextlib
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from memdlm.data.dataset import load_examples, prepare_examples
from memdlm.demo.examples import build_examples, check_demo_tokenizer
from memdlm.evaluation.exposure_bias import STEPS, ExposureBias, check_canvas, exposure_bias
from memdlm.evaluation.folders import folders_of, labels_of
from memdlm.evaluation.held_out import Adapt, check_prompts, no_memory
from memdlm.inference import Checkpoint, load_checkpoint
from memdlm.prompt_memory import PromptMemory

_DEMO_LENGTH = 256
_COLOURS = ("#d08a2e", "#2e6fd0", "#3f9b5c", "#8a4fb0", "#9a9a9a", "#c0392b")


@dataclass(frozen=True)
class BiasOptions:
    """What `memdlm bias` is told.

    Attributes:
        models: checkpoints to compare: folders, with a comma in between.
        names: their names in the figure, all different, with a comma in between; if not given,
            those of the folders.
        dataset: examples with a prompt and a response, in the forms of `memdlm train`; if not
            given, the demo's held-out set, for models with its tokenizer.
        dataset_split: which split of a dataset that has several.
        count: how many examples, at least 2.
        memory: "off", "on", or "both"; "on" writes a memory from each prompt, which needs
            checkpoints that were trained with one; "both" leaves it off for those that were not.
        steps: of the trajectory that denoises a response, at least 2; R is measured after each,
            and depends on their number.
        batch_size: examples of a batch.
        max_length: most tokens of an example; the model's own limit if not given.
        out: folder of `bias.jsonl`, `bias.md` and `bias.png`.
        seed: of the static masks.
        dtype: of the weights; "auto" is what they were saved in.
        device: where the model runs; the first GPU if there is one.

    Raises:
        ValueError: an option outside its range.
    """

    models: str
    names: str | None = None
    dataset: str | None = None
    dataset_split: str | None = None
    count: int = 64
    memory: Literal["off", "on", "both"] = "both"
    steps: int = STEPS
    batch_size: int = 8
    max_length: int | None = None
    out: str = "runs/bias"
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("count", 2), ("steps", 2), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        labels_of(self.names, self.folders)
        for name in ("dataset_split", "max_length"):
            if self.dataset is None and getattr(self, name) is not None:
                raise ValueError(f"{name} would not be read: dataset is not given")

    @property
    def folders(self) -> list[str]:
        """The models, one by one."""
        return folders_of(self.models)

    @property
    def labels(self) -> list[str]:
        """Their names."""
        return labels_of(self.names, self.folders)


def run_bias(options: BiasOptions) -> str:
    """Measure every model, write the rows, the table and the figure.

    Args:
        options: see `BiasOptions`.

    Returns:
        The table.

    Raises:
        ValueError: a model or data set that cannot be used.
    """
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {out} cannot be written: {error.strerror}") from error
    curves: dict[str, ExposureBias] = {}
    table = ""
    for name, folder in zip(options.labels, options.folders, strict=True):
        curves |= _curves(options, name, folder)
        gc.collect()
        # After each model: what was measured stays, should the next one fail.
        rows = [row for each, curve in curves.items() for row in bias_rows(each, curve)]
        (out / "bias.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        table = bias_table(curves)
        (out / "bias.md").write_text(table + "\n", encoding="utf-8")
        plot_bias(out / "bias.png", curves)
    return table


def _curves(options: BiasOptions, name: str, folder: str) -> dict[str, ExposureBias]:
    """What is measured of one model, which is let go of afterwards."""
    checkpoint = load_checkpoint(folder, dtype=options.dtype, device=options.device)
    check_canvas(checkpoint.diffusion.block_size)
    states = _states(options, checkpoint)
    examples = _examples(options, checkpoint)
    if "on" in states:
        check_prompts(examples)
    return {
        f"{name}, memory {state}": _measure(options, checkpoint, examples, state)
        for state in states
    }


def _states(options: BiasOptions, checkpoint: Checkpoint) -> list[str]:
    if options.memory == "on" and checkpoint.memory is None:
        raise ValueError(
            f"memory must be off for {checkpoint.folder}, which was trained without one, got on"
        )
    if options.memory == "both":
        return ["off"] if checkpoint.memory is None else ["off", "on"]
    return [options.memory]


def _examples(options: BiasOptions, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    if options.dataset is None:
        check_demo_tokenizer(checkpoint.tokenizer, checkpoint.folder)
        return build_examples("validation", options.count, _DEMO_LENGTH, 2)
    loaded = load_examples(options.dataset, options.dataset_split or "train")
    prepared = prepare_examples(
        options.dataset,
        loaded.select(range(min(options.count, len(loaded)))),
        checkpoint.tokenizer,
        checkpoint.model.config.vocab_size,
        options.max_length or checkpoint.max_length,
        "drop",
    )
    return [dict(example) for example in prepared]


def _measure(
    options: BiasOptions, checkpoint: Checkpoint, examples: Sequence[dict[str, Any]], state: str
) -> ExposureBias:
    with contextlib.ExitStack() as stack:
        adapt: Adapt = no_memory
        if state == "on":
            memory = PromptMemory.of(checkpoint, seed=options.seed)
            stack.callback(memory.detach)
            adapt = memory.adapt
        return exposure_bias(
            checkpoint.model,
            examples,
            mask_token_id=checkpoint.mask_token_id,
            pad_token_id=checkpoint.pad_token_id,
            steps=options.steps,
            adapt=adapt,
            batch_size=options.batch_size,
            seed=options.seed,
        )


def bias_rows(name: str, curve: ExposureBias) -> list[dict[str, Any]]:
    """One JSON row for each mask ratio: both losses, both R, and their bands."""
    whole, exposure = curve.ratio(), curve.ratio("remaining")
    rows = []
    for i, ratio in enumerate(curve.ratios):
        means = {
            f"{part}_nll": round(getattr(curve, part)[:, i].mean().item(), 6)
            for part in ("static", "sequential", "remaining")
        }
        rows.append(
            {
                "name": name,
                "mask_ratio": round(ratio, 6),
                "masked_share": round(curve.shares[i], 6),
                "examples": len(curve.static),
                **means,
                "R": [round(part[i].item(), 6) for part in whole],
                "R_exposure": [round(part[i].item(), 6) for part in exposure],
            }
        )
    return rows


def bias_table(curves: dict[str, ExposureBias]) -> str:
    """Markdown: R of each curve at some mask ratios, and its mean over all below 1."""
    first = next(iter(curves.values()))
    shown = [i for i, _ in enumerate(first.ratios)][1:]
    shown = shown[:: max(1, len(shown) // 4)]
    head = ["", "mean R"] + [f"R at {first.ratios[i]:.0%}" for i in shown] + ["mean R, exposure"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, curve in curves.items():
        R, low, high = curve.ratio()
        exposure = curve.ratio("remaining")[0]
        cells = [name, f"{R[1:].mean():.3f}"]
        cells += [f"{R[i]:.3f} ({low[i]:.3f} to {high[i]:.3f})" for i in shown]
        lines.append("| " + " | ".join([*cells, f"{exposure[1:].mean():.3f}"]) + " |")
    return "\n".join(lines)


def plot_bias(path: Path, curves: dict[str, ExposureBias]) -> None:
    """R with its band, the part of it that is exposure, and both losses, against the mask ratio.

    Args:
        path: of the PNG.
        curves: name to what was measured; "..., memory on" is drawn dashed, in its model's colour.
    """
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6))
    models = list(dict.fromkeys(name.rpartition(", memory")[0] or name for name in curves))
    for name, curve in curves.items():
        model = name.rpartition(", memory")[0] or name
        colour = _COLOURS[models.index(model) % len(_COLOURS)]
        style = "--" if name.endswith("memory on") else "-"
        at = [100 * share for share in curve.shares]
        for panel, over in zip(panels, ("static", "remaining"), strict=False):
            R, low, high = curve.ratio(over)
            panel.plot(at, R, style, color=colour, label=name)
            panel.fill_between(at, low, high, color=colour, alpha=0.12, linewidth=0)
        panels[2].plot(at, curve.static.mean(0), style, color=colour, alpha=0.5)
        panels[2].plot(at, curve.sequential.mean(0), style, color=colour, marker=".")
    panels[0].set(title="R = sequential / static loss", ylabel="R, with its 95 % band")
    panels[1].set(title="of it exposure: the same tokens masked,\npredictions beside them / truth")
    panels[2].set(title="the losses: sequential (dots), static (pale)", ylabel="nats per token")
    for panel in panels:
        panel.set(xlabel="masked response tokens, %")
        panel.invert_xaxis()
        panel.grid(alpha=0.25)
    for panel in panels[:2]:
        panel.axhline(1, color="black", linewidth=0.8)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
