"""What `memdlm probe` can be told."""

from dataclasses import dataclass
from typing import Literal

from memdlm.demo.examples import MIN_LENGTH
from memdlm.evaluation.folders import folders_of, labels_of

_COUNT, _LENGTH = 64, 256


@dataclass(frozen=True)
class ProbeOptions:
    """What `memdlm probe` is told.

    Attributes:
        model: checkpoints that were trained with a memory: folders, with a comma in between. Their
            figures are averaged, so let them be seeds of one run.
        names: their names in the rows, all different, with a comma in between; if not given, those
            of the folders.
        prompt: a prompt; if neither it nor prompt_file is given, the demo's needles, for models
            with its tokenizer. Retrieval is measured on these alone.
        prompt_file: instead, a .txt file with one, or a .jsonl file with one in each row's
            `prompt`.
        count: how many of the demo's questions, at least 2; 64 if not given.
        length: tokens of each question with its answer, at least 96; 256 if not given.
        batch_size: prompts that are written and read together, at least 1.
        out: folder of `probe.jsonl`, `probe.md` and the pictures.
        seed: of the questions, the masks and the fast weights' initial values.
        dtype: of the weights; "auto" is what they were saved in.
        device: where the model runs; the first GPU if there is one.

    Raises:
        ValueError: an option outside its range, or one that nothing would read.
    """

    model: str
    names: str | None = None
    prompt: str | None = None
    prompt_file: str | None = None
    count: int | None = None
    length: int | None = None
    batch_size: int = 16
    out: str = "runs/probe"
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("prompt_file would not be read: prompt is given")
        for name in ("count", "length"):
            if not self.on_demo and getattr(self, name) is not None:
                raise ValueError(f"{name} would not be read: prompts are given")
        bounds = (("count", 2), ("length", MIN_LENGTH), ("batch_size", 1), ("seed", 0))
        for name, least in bounds:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        labels_of(self.names, self.folders)

    @property
    def on_demo(self) -> bool:
        """Whether the prompts are the demo's questions."""
        return self.prompt is None and self.prompt_file is None

    @property
    def question_count(self) -> int:
        """How many of the demo's questions."""
        return _COUNT if self.count is None else self.count

    @property
    def question_length(self) -> int:
        """Tokens of a question with its answer."""
        return _LENGTH if self.length is None else self.length

    @property
    def folders(self) -> list[str]:
        """The models, one by one."""
        return folders_of(self.model)

    @property
    def labels(self) -> list[str]:
        """Their names."""
        return labels_of(self.names, self.folders)
