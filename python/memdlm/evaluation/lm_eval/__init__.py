"""lm-evaluation-harness: its tasks on a masked diffusion model, with the memory off or on.

Importing this registers the model "memdlm". `python -m memdlm.evaluation.lm_eval` is the harness's
own command line with it.
"""

try:
    import lm_eval  # noqa: F401 - asked for here, so that what is missing is told once
except ImportError as error:
    raise ImportError(
        f"memdlm.evaluation.lm_eval needs lm-eval ({error}): pip install memdlm-kernels[eval]"
    ) from error

from memdlm.evaluation.lm_eval.model import MemDLM, NoPromptError
from memdlm.evaluation.lm_eval.run import check_task, reads_length, run_lm_eval

__all__ = ["MemDLM", "NoPromptError", "check_task", "reads_length", "run_lm_eval"]
