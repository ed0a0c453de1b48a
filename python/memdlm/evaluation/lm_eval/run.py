"""Tasks of lm-evaluation-harness on a checkpoint, in one call."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from memdlm.evaluation.atomic_write import write_whole
from memdlm.evaluation.lm_eval.arguments import generation_arguments
from memdlm.evaluation.lm_eval.model import MemDLM

RESULTS_FILE = "lm_eval.json"
# The length, in tokens, that the harness's RULER takes if it is told none.
RULER_LENGTH = 4096
_LENGTH_UNIT = 1024
# How the names of a folder's tasks begin. The harness reads 15,000 files to find any other.
FOLDERS = {"ruler": ("ruler", "niah_"), "babilong": ("babilong",), "longbench": ("longbench",)}
WITH_LENGTHS = ("ruler", "babilong")
# The group of those tasks that exist with text around their facts.
WITH_TEXT = {"babilong": "babilong_longctx"}


class _Tasks(TaskManager):
    """The harness's tasks, where what cannot be fetched is one clear error."""

    def load(self, task_list: Any) -> Any:
        """Load tasks and groups."""
        try:
            return super().load(task_list)
        except (OSError, ImportError, LookupError) as error:
            # A download, an optional package, or data of one.
            raise ValueError(
                f"task {', '.join(map(str, task_list))} of lm-evaluation-harness cannot be loaded, "
                "something it needs is not on this machine and could not be fetched: "
                f"{_reason(error)}"
            ) from error


def _reason(error: Exception) -> str:
    """The first line of words: some errors begin with a line of stars."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if re.search(r"\w", line)), type(error).__name__)


def run_lm_eval(
    model: MemDLM,
    task: str,
    *,
    out: Path,
    limit: int | None,
    sampler: Mapping[str, Any],
    length: int | None = None,
    chat: bool | None = None,
) -> dict[str, dict[str, Any]]:
    """Run a task of lm-evaluation-harness on a model.

    Args:
        model: what is asked.
        task: a name of the harness: "ruler", "babilong" and "longbench" are groups; any other
            group, tag or task will do, "ruler_cwe" for instance.
        out: folder of lm_eval.json, all that the harness gives.
        limit: examples of each task; None for all.
        sampler: options of the sampler, which replace the tasks' own.
        length: tokens of RULER's prompts and answers; of BABILong, the texts' of the first five
            tasks, a multiple of 1,024. One for each run: `limit` would take examples of the first
            of several only. None for 4,096, and for BABILong without any text around its facts.
        chat: ask through the chat template; None for where the tokenizer has one.

    Returns:
        Each task and group to its metrics, by the harness's names.

    Raises:
        ValueError: an unknown task, one that needs what is not here and cannot be fetched, a length
            that the model has no positions for or that the task does not read, or what the model
            refuses.
        NoPromptError: the model's memory is on, and the task's texts have no prompt.
    """
    if length is not None and not reads_length(task):
        raise ValueError(f"length would not be read: task is {task}")
    if length is not None and length > model.max_length:
        raise ValueError(
            f"length must be at most the model's {model.max_length} positions, got {length}"
        )
    with_template = bool(model.tokenizer.chat_template) if chat is None else chat
    if with_template and not model.tokenizer.chat_template:
        raise ValueError("chat must be false: the tokenizer has no chat template, got true")
    check_task(task, () if length is None else (length,))
    name, suffix, lengths = task, "", None
    metadata: dict[str, Any] = {"tokenizer": str(model.tokenizer.name_or_path)}
    if _folder(task) == "ruler":
        lengths = [length or RULER_LENGTH]
        metadata["max_seq_lengths"] = lengths
        if lengths[0] > model.max_length:
            raise ValueError(
                f"{task} is of {RULER_LENGTH} tokens if no length is given, and the model has "
                f"{model.max_length} positions"
            )
    elif length is not None:
        name, size = WITH_TEXT.get(task, task), f"{length // _LENGTH_UNIT}k"
        suffix = f" {size}"
        metadata["max_seq_lengths"] = size
    every = lm_eval.simple_evaluate(
        model=model,
        tasks=[name],
        task_manager=_manager(_folder(task), json.dumps(metadata)),
        limit=limit,
        log_samples=False,
        apply_chat_template=with_template,
        gen_kwargs=generation_arguments(sampler) or None,
    )
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(every, indent=2, default=handle_non_serializable)
    write_whole(out / RESULTS_FILE, text)
    return {
        each + suffix: _measured(metrics, lengths) for each, metrics in every["results"].items()
    }


def check_task(task: str, lengths: Sequence[int]) -> None:
    """Refuse a task that the harness does not have, or has no data of a length for.

    Args:
        task: as for `run_lm_eval`.
        lengths: likewise, those that it will be asked at.

    Raises:
        ValueError: as said.
    """
    odd = [length for length in lengths if length % _LENGTH_UNIT]
    if _folder(task) == "babilong" and odd:
        raise ValueError(f"lengths must be multiples of {_LENGTH_UNIT} for babilong, got {odd[0]}")
    if task not in _manager(_folder(task), "{}").all_tasks:
        raise ValueError(f"tasks must be of lm-evaluation-harness, got {task!r}")


def _measured(metrics: Mapping[str, Any], lengths: Sequence[int] | None) -> dict[str, Any]:
    """The metrics of a task; of RULER's, which are named by length, those of the length it had."""
    if lengths is None:
        return dict(metrics)
    names = {str(length) for length in lengths}
    wanted = {*names, *(f"{name}_stderr" for name in names)}
    is_length = [key.partition(",")[0].removesuffix("_stderr").isdecimal() for key in metrics]
    return {
        key: value
        for (key, value), unsure in zip(metrics.items(), is_length, strict=True)
        if not unsure or key.partition(",")[0] in wanted
    }


def reads_length(task: str) -> bool:
    """Whether a task can be asked at a length of one's choice."""
    return _folder(task) in WITH_LENGTHS


@functools.cache
def _manager(folder: str | None, metadata: str) -> _Tasks:
    """The tasks of a folder; without one all, whose 15,000 files take a while to read."""
    return _Tasks(metadata=json.loads(metadata), **_where(folder))


def _folder(task: str) -> str | None:
    return next((name for name, starts in FOLDERS.items() if task.startswith(starts)), None)


def _where(folder: str | None) -> dict[str, Any]:
    """Where to look for a folder's tasks: arguments of `TaskManager`."""
    if folder is None:
        return {}
    path = Path(lm_eval.tasks.__file__).parent / folder
    return {"include_path": str(path), "include_defaults": False} if path.is_dir() else {}
