"""Tasks of lm-evaluation-harness on a checkpoint, in one call."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.tasks
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from memdlm.evaluation.lm_eval.arguments import generation_arguments
from memdlm.evaluation.lm_eval.model import MemDLM

RESULTS_FILE = "lm_eval.json"
# The lengths, in tokens, that the harness's RULER takes if it is told none.
RULER_LENGTHS = (4096,)
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
    folder: str,
    tasks: list[str],
    *,
    memory: bool,
    out: Path,
    limit: int | None,
    sampler: dict[str, Any],
    batch_size: int,
    lengths: Sequence[int] | None = None,
    chat: bool | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness on a checkpoint.

    Args:
        folder: as for `load_checkpoint`.
        tasks: names of the harness: "ruler", "babilong" and "longbench" are groups; any other
            group, tag or task will do, "ruler_cwe" for instance.
        memory: write a memory from each context.
        out: folder of lm_eval.json.
        limit: examples of each task; None for all.
        sampler: options of the sampler, which replace the tasks' own.
        batch_size: requests of a batch.
        lengths: tokens of RULER's prompts and answers; and, of BABILong, the texts' of the first
            five tasks, multiples of 1,024. None for 4,096, and for BABILong without any text
            around its facts.
        chat: ask through the chat template; None for where the tokenizer has one.
        model_args: other arguments of `MemDLM`.

    Returns:
        `results`: each task and group to its metrics, by the harness's names.

    Raises:
        ValueError: no task, an unknown one, one that needs what is not here and cannot be fetched,
            a length that the model has no positions for, or what `MemDLM` refuses.
    """
    if not tasks:
        raise ValueError("tasks must hold at least one, got none")
    arguments = generation_arguments(sampler)
    own = dict(model_args or {})
    if "seed" in arguments:  # it is also that of the bound and the memory
        own.setdefault("seed", arguments.pop("seed"))
    lm = MemDLM(folder, memory=memory, batch_size=batch_size, **own)
    if lengths and not read_lengths(tasks):
        raise ValueError(f"lengths would not be read: tasks are {', '.join(tasks)}")
    for length in lengths or ():
        if length > lm.max_length:
            raise ValueError(
                f"lengths must be at most the model's {lm.max_length} positions, got {length}"
            )
    with_template = bool(lm.tokenizer.chat_template) if chat is None else chat
    if with_template and not lm.tokenizer.chat_template:
        raise ValueError(f"chat must be false: the tokenizer of {folder} has no chat template")
    options: dict[str, Any] = {
        "limit": limit,
        "log_samples": False,
        "apply_chat_template": with_template,
        "gen_kwargs": arguments or None,
    }
    found: dict[str, Any] = {}
    every: dict[str, Any] = {}
    for task, suffix, data in _harness_tasks(tasks, lengths, lm):
        manager = _Tasks(
            metadata={"tokenizer": str(lm.tokenizer.name_or_path), **data}, **_where(task)
        )
        if task not in manager.all_tasks:
            raise ValueError(f"tasks must be of lm-evaluation-harness, got {task!r}")
        results = lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=manager, **options)
        every[task + suffix] = results
        for each, metrics in results["results"].items():
            found[each + suffix] = _measured(metrics, data.get("max_seq_lengths"))
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULTS_FILE).write_text(
        json.dumps(every, indent=2, default=handle_non_serializable), encoding="utf-8"
    )
    return {"results": found}


def _harness_tasks(
    tasks: Sequence[str], lengths: Sequence[int] | None, lm: MemDLM
) -> list[tuple[str, str, dict[str, Any]]]:
    """Of each run: the task, what tells it from others of its name, what its data depends on."""
    runs: list[tuple[str, str, dict[str, Any]]] = []
    for task in tasks:
        if _folder(task) == "ruler":
            own = list(lengths or RULER_LENGTHS)
            if max(own) > lm.max_length:
                raise ValueError(
                    f"{task} is of {max(own)} tokens if no lengths are given, and the model has "
                    f"{lm.max_length} positions"
                )
            runs.append((task, "", {"max_seq_lengths": own}))
        elif _folder(task) == "babilong" and lengths:
            for length in lengths:
                if length % 1024:
                    raise ValueError(
                        f"lengths must be multiples of 1024 for babilong, got {length}"
                    )
                size = f"{length // 1024}k"
                data = {"max_seq_lengths": size}
                runs.append((WITH_TEXT.get(task, task), f" {size}", data))
        else:
            runs.append((task, "", {}))
    return runs


def _measured(metrics: Mapping[str, Any], lengths: Any) -> dict[str, Any]:
    """The metrics of a task; of RULER's, which are named by length, those of the lengths it had."""
    if not isinstance(lengths, list):
        return dict(metrics)
    names = {str(length) for length in lengths}
    wanted = {*names, *(f"{name}_stderr" for name in names)}
    is_length = [key.partition(",")[0].removesuffix("_stderr").isdecimal() for key in metrics]
    return {
        key: value
        for (key, value), unsure in zip(metrics.items(), is_length, strict=True)
        if not unsure or key.partition(",")[0] in wanted
    }


def read_lengths(tasks: Sequence[str]) -> bool:
    """Whether any of the tasks can be asked at a length of one's choice."""
    return any(_folder(task) in WITH_LENGTHS for task in tasks)


def _folder(task: str) -> str | None:
    return next((name for name, starts in FOLDERS.items() if task.startswith(starts)), None)


def _where(task: str) -> dict[str, Any]:
    """Where to look for a task: arguments of `TaskManager`."""
    folder = _folder(task)
    if folder is None:
        return {}
    path = Path(lm_eval.tasks.__file__).parent / folder
    return {"include_path": str(path), "include_defaults": False} if path.is_dir() else {}
