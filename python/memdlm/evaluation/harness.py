"""lm-evaluation-harness for the arms of an evaluation; what is measured already stays."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm.evaluation.arm import Arm, read_positions
from memdlm.evaluation.atomic_write import write_whole
from memdlm.evaluation.files_hash import short_hash
from memdlm.evaluation.options import EvalOptions

_FOLDER = "lm_eval"
_FILE = "results.json"


def check_harness(options: EvalOptions, arms: Sequence[Arm]) -> None:
    """Refuse what the harness could not do, before any work.

    Args:
        options: see `EvalOptions`.
        arms: what is to be measured.

    Raises:
        ValueError: the harness is not installed, a task that it does not have, a length that
            BABILong has no data for, or none of the lengths fits a model.
    """
    if not options.harness_tasks:
        return
    try:
        from memdlm.evaluation.lm_eval import check_task
    except ImportError as error:
        raise ValueError(f"lm_eval cannot be measured: {error}") from error
    for arm in arms:
        _runs(options, arm)
    for task in options.harness_tasks:
        check_task(task, options.token_lengths)


def run_harness(options: EvalOptions, arm: Arm) -> None:
    """Measure an arm on the harness's tasks, and keep each result in a file of the folder.

    RULER and BABILong are asked at those of `lengths` that the model has positions for, each
    length for itself. A task that has nothing to write a memory from is left out with a note.

    Args:
        options: see `EvalOptions`; `chat` is true or false.
        arm: what to measure.

    Raises:
        ValueError: what a task needs is not there.
    """
    # Imported late: it is an extra.
    from memdlm.evaluation.lm_eval import MemDLM, NoPromptError, run_lm_eval

    missing = []
    for task, length in _runs(options, arm):
        asked: dict[str, Any] = {"task": task, "length": length, "limit": options.count}
        name = re.sub(r"[^\w.-]", "_", f"{task}_{length or 'any'}_{options.count}")
        name += "_" + short_hash(json.dumps(asked).encode())[:8]
        folder = Path(options.out) / _FOLDER / arm.name.replace(" ", "_") / name
        if not (folder / _FILE).exists():
            missing.append((asked, folder))
    if not missing:
        return
    model_args: dict[str, Any] = {"budget_gib": options.budget_gib} if arm.memory else {}
    model = MemDLM(
        arm.folder,
        memory=arm.memory,
        dtype=options.dtype,
        device=options.device,
        load_in_4bit=options.load_in_4bit,
        seed=options.seed,
        batch_size=options.batch_size,
        **model_args,
    )
    own = {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}
    for asked, folder in missing:
        kept: dict[str, Any] = {"arm": arm.name, "asked": asked, "results": {}}
        try:
            kept["results"] = run_lm_eval(
                model,
                asked["task"],
                out=folder,
                limit=options.count,
                sampler={**options.sampler, **own},
                length=asked["length"],
                chat=options.chat,
            )
        except NoPromptError as error:
            kept["left_out"] = str(error)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _FILE, json.dumps(kept, indent=2, default=str) + "\n")


def _runs(options: EvalOptions, arm: Arm) -> list[tuple[str, int | None]]:
    """Tasks with the lengths that they are asked at; None where a task has its own."""
    from memdlm.evaluation.lm_eval import reads_length

    runs: list[tuple[str, int | None]] = []
    for task in options.harness_tasks:
        if not reads_length(task):
            runs.append((task, None))
            continue
        most = read_positions(arm.folder)
        lengths = [length for length in options.token_lengths if length <= most]
        if not lengths:
            raise ValueError(
                f"lengths must hold one for lm_eval within the {most:,} positions of {arm.folder}, "
                f"got {options.lengths}"
            )
        runs += [(task, length) for length in lengths]
    return runs


def read_harness(out: Path) -> list[dict[str, Any]]:
    """What a folder holds of the harness.

    Args:
        out: of the evaluation.

    Returns:
        For each run `arm`; `asked`, its task, length and limit; `results`, task to metric to value;
        and `left_out`, why there are none, where there are none.

    Raises:
        ValueError: a file that is no JSON.
    """
    kept = []
    for path in sorted((out / _FOLDER).glob(f"*/*/{_FILE}")):
        try:
            kept.append(json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} cannot be read, delete it: {error}") from error
    return kept
