"""Long-context probes, made offline: after RULER (arXiv 2404.06654), BABILong (2406.10149)."""

from memdlm.evaluation.tasks.build import ANSWER_TOKENS, TASKS, build, encode
from memdlm.evaluation.tasks.example import Example

__all__ = ["ANSWER_TOKENS", "TASKS", "Example", "build", "encode"]
