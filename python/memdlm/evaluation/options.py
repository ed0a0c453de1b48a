"""What `memdlm eval` can be told. Apart from the run, so that its help answers at once."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

from memdlm.evaluation.tasks import TASKS
from memdlm.sampler.aliases import ALIASES
from memdlm.sampler.config import SamplerConfig


@dataclass(frozen=True)
class EvalOptions:
    """What `memdlm eval` measures. Every option of the sampler may stand beside these.

    Attributes:
        base: the model before training, a folder or a hub name: arm "base".
        plain: the same trained as a standard MDLM: arm "MDLM".
        model: the same trained with the memory: arms "train-only" (memory off) and "train &
            inference" (a memory is written from each prompt).
        tasks: which probes, with commas: mv, vt, cwe (RULER), qa1, qa2, qa3 (BABILong); "none"
            where only `lm_eval` is asked for.
        lengths: tokens of prompt and answer together, with commas.
        count: examples of each task and length; with `lm_eval`, of each of its tasks.
        batch_size: examples of a batch.
        out: folder of examples.jsonl, table.md, heatmap.png and summary.json. A run that was cut
            off goes on there, and other arms, tasks and lengths can be added.
        seed: of examples, samples and memories.
        chat: ask through the tokenizer's chat template; if not given, where all arms have one.
        dtype: of the weights; "auto" is what they were saved in.
        device: where the models run; the first GPU if there is one.
        load_in_4bit: quantise the weights to NF4.
        budget_gib: memory that writing a memory may take; no limit if not given.
        lm_eval: tasks or groups of lm-evaluation-harness, with commas, for instance
            ruler,babilong,longbench; measured for every arm besides.
        max_new_tokens: room for the answer, part of the length; if not given, the task's own.
        sampler: the other options of the sampler, name to value.

    Raises:
        ValueError: an option outside its range, no model, or nothing to measure.
    """

    base: str | None = None
    plain: str | None = None
    model: str | None = None
    tasks: str = ",".join(TASKS)
    lengths: str = "1024,2048,4096,8192,16384,32768"
    count: int = 50
    batch_size: int = 8
    out: str = "runs/eval"
    seed: int = 0
    chat: bool | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None
    load_in_4bit: bool = False
    budget_gib: float | None = None
    lm_eval: str | None = None
    max_new_tokens: int | None = None
    sampler: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.model is None and self.base is None and self.plain is None:
            raise ValueError("model, base or plain must be given")
        for name, least in (("count", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in self.task_names:
            if name not in TASKS:
                raise ValueError(f"tasks must be of {', '.join(TASKS)}, got {name!r}")
        for key, given in (("tasks", self.task_names), ("lm_eval", self.harness_tasks)):
            if len(set(given)) < len(given):
                raise ValueError(f"{key} must be named once each, got {', '.join(given)}")
        for word in _split(self.lengths):
            if not word.isdecimal() or int(word) < 1:
                raise ValueError(f"lengths must be whole numbers of tokens, got {word!r}")
        if not self.task_names and not self.harness_tasks:
            raise ValueError("tasks must not be none where lm_eval is not given")
        if self.task_names and not self.token_lengths:
            raise ValueError("lengths must hold at least one, got none")
        if self.budget_gib is not None and not self.budget_gib > 0:
            raise ValueError(f"budget_gib must be above 0, got {self.budget_gib}")
        if self.budget_gib is not None and self.model is None:
            raise ValueError("budget_gib would not be read: model is not given")
        for name in ("seed", "max_new_tokens"):
            if name in self.sampler:
                raise ValueError(f"sampler must not hold {name}, which is an option of its own")

    @property
    def task_names(self) -> list[str]:
        """The probes, one by one."""
        return [] if self.tasks == "none" else _split(self.tasks)

    @property
    def token_lengths(self) -> list[int]:
        """The lengths, rising."""
        return sorted({int(word) for word in _split(self.lengths)})

    @property
    def harness_tasks(self) -> list[str]:
        """The harness's tasks, one by one."""
        return _split(self.lm_eval or "")


def sampler_hints() -> dict[str, Any]:
    """The options of the sampler that `EvalOptions` does not have, under each of their names."""
    hints = get_type_hints(SamplerConfig)
    hints |= {name: hints[ours] for name, ours in ALIASES.items()}
    # The names of algorithms are others', too.
    hints["alg"] = str
    own = {field.name for field in fields(EvalOptions)}
    return {name: hint for name, hint in hints.items() if ALIASES.get(name, name) not in own}


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
