"""What every test shares."""

import os

import torch
from hypothesis import settings

# Before any kernel is imported: without a GPU, Triton's interpreter runs them on the CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.kernels import interpreter

    interpreter.mend()

# The same examples on every run; the first call of a torch op is slow, and that is no failure.
settings.register_profile("memdlm", deadline=None, derandomize=True)
settings.load_profile("memdlm")
