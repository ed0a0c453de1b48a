"""lm-evaluation-harness for the arms of an evaluation; what is measured already stays."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import AutoConfig

from memdlm.evaluation.options import EvalOptions
from memdlm.evaluation.records import Arm
from memdlm.inference import first_line

_FOLDER = "lm_eval"
_LENGTH_UNIT = 1024


def check_harness(options: EvalOptions) -> None:
    """Refuse what the harness could not do, before any work.

    Raises:
        ValueError: the harness is not installed, or a length that BABILong has no data for.
    """
    if not options.harness_tasks:
        return
    try:
        import memdlm.evaluation.lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(f"lm_eval cannot be measured: {error}") from error
    odd = [length for length in options.token_lengths if length % _LENGTH_UNIT]
    if "babilong" in options.harness_tasks and odd:
        raise ValueError(
            f"lengths must be multiples of {_LENGTH_UNIT} with lm_eval babilong, got {odd[0]}"
        )


def run_harness(options: EvalOptions, arms: Sequence[Arm]) -> None:
    """Measure every arm on the harness's tasks, and keep the results in the folder.

    RULER and BABILong are asked at those of `lengths` that the model has positions for.

    Args:
        options: see `EvalOptions`.
        arms: what to measure.

    Raises:
        ValueError: what a task needs is not there, or no length fits the model.
    """
    # Imported late: it is an extra.
    from memdlm.evaluation.lm_eval import read_lengths, run_lm_eval

    own = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    for arm in arms:
        lengths = None
        if read_lengths(options.harness_tasks):
            most = _positions(arm.folder)
            lengths = [length for length in options.token_lengths if length <= most]
        if lengths == []:
            raise ValueError(
                f"lengths must hold one for lm_eval within the {most:,} positions of {arm.folder}, "
                f"got {options.lengths}"
            )
        folder = Path(options.out) / _FOLDER / arm.name.replace(" ", "_")
        path = folder / "results.json"
        asked = {"tasks": options.harness_tasks, "lengths": lengths, "limit": options.count}
        if path.exists() and json.loads(path.read_text(encoding="utf-8"))["asked"] == asked:
            continue
        model_args: dict[str, Any] = {
            "dtype": options.dtype,
            "device": options.device,
            "load_in_4bit": options.load_in_4bit,
            "seed": options.seed,
        }
        if arm.memory:
            model_args["budget_gib"] = options.budget_gib
        found = run_lm_eval(
            arm.folder,
            options.harness_tasks,
            memory=arm.memory,
            out=folder,
            limit=options.count,
            sampler={**options.sampler, **own},
            batch_size=options.batch_size,
            lengths=lengths,
            chat=options.chat,
            model_args=model_args,
        )
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"arm": arm.name, "asked": asked, "results": found["results"]}
        path.write_text(json.dumps(kept, indent=2, default=str) + "\n", encoding="utf-8")


def _positions(folder: str) -> int:
    """Positions that the model of a folder or hub name has."""
    try:
        if (Path(folder) / "adapter_config.json").is_file():
            folder = str(PeftConfig.from_pretrained(folder).base_model_name_or_path)
        return int(AutoConfig.from_pretrained(folder).max_position_embeddings)
    except (OSError, ValueError) as error:
        raise ValueError(f"model {folder} cannot be read: {first_line(error)}") from error


def read_harness(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The results that a folder holds: arm to task to metric to value."""
    paths = sorted((out / _FOLDER).glob("*/results.json"))
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return {one["arm"]: one["results"] for one in kept}
