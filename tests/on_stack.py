"""What must work in .stack (tools/stack.py): imports, a step of each family, compiled kernels.

Prints a line for each check; the exit code is 0 only if all passed.
"""

import importlib
import os
import sys
import time
import traceback
from collections import Counter
from importlib.metadata import version
from pathlib import Path

# Kernels are compiled for a GPU here, not interpreted.
os.environ["TRITON_INTERPRET"] = "0"

import torch

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator
from memdlm.objective import MemDLMObjective
from memdlm_kernels import _backends
from tests.families import FAMILIES, make_family_model
from tests.kernels import ahead_of_time
from tests.tiny import MASK, PAD, VOCABULARY, gradients, make_features

ROOT = Path(__file__).resolve().parent.parent
# What bench/on_gpu.sh may import, beside what memdlm loads for data and evaluation alone.
NEEDED = ("memdlm_kernels", "bench", "tests/gpu", "tests/kernels")
PACKAGES = ("python/memdlm", *NEEDED)
# Not on the GPU machine.
ABSENT = {"datasets", "lm_eval"}


def check_imports() -> str:
    """Every module; of memdlm those that need what the GPU machine lacks may say so."""
    counts, without = 0, Counter()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts).removeprefix("python.").removesuffix(".__init__")
            if parts[-1] == "__main__":
                continue
            try:
                importlib.import_module(name)
            except ImportError as error:
                absent = missing_module(error)
                if absent not in ABSENT or package in NEEDED:
                    raise RuntimeError(f"{name} cannot be imported") from error
                without[absent] += 1
            else:
                counts += 1
    others = ", ".join(f"{count} need {name}" for name, count in sorted(without.items()))
    return f"{counts} modules" + (f"; {others}" if others else "")


def missing_module(error: BaseException | None) -> str | None:
    """The module without which an import failed, whatever was made of that error."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__ or error.__context__
    return None if error is None else error.name


def check_steps() -> str:
    """A training step of each family, by the compiled ops."""
    if _backends.library_missing is not None:
        raise RuntimeError(f"{_backends.library_missing}; `make setup` builds it")
    diffusion, losses = DiffusionConfig(), []
    memory = MemoryConfig(rank=4, lora_alpha=8.0, layer_fraction=0.5)
    for family in FAMILIES:
        model = make_family_model(family, torch.float32)
        shifts = getattr(model.config, "right_shift_logits", False)
        collator = MaskCollator(MASK, PAD, VOCABULARY, diffusion, memory, right_shift_logits=shifts)
        output = MemDLMObjective(model, diffusion, memory)(collator(make_features()))
        output.loss.backward()
        found = [gradient for gradient in gradients(model).values() if gradient is not None]
        finite = all(tensor.isfinite().all() for tensor in (output.loss, *found))
        if not finite or not any(gradient.any() for gradient in found):
            raise RuntimeError(f"{family}: the loss is {output.loss.item()} or a gradient is wrong")
        losses.append(f"{family} {output.loss.item():.4f}")
    return "loss of " + ", ".join(losses)


def check_kernels() -> str:
    """Every kernel for sm_90."""
    compiled = ahead_of_time.compile_all(90)
    if problems := ahead_of_time.problems(compiled, 90):
        raise RuntimeError("\n".join(problems))
    products = [dot for each in compiled for dot in each.dots if dot.tensor_cores]
    return (
        f"{len({each.kernel for each in compiled})} in {len(compiled)} specialisations, at most "
        f"{max(each.registers for each in compiled)} registers, "
        f"{max(each.shared for each in compiled)} bytes of shared memory, no stack; "
        f"{sum(dot.wgmma for dot in products)} of {len(products)} products of tensor cores wgmma"
    )


def main() -> int:
    stack = ", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "transformers"))
    print(f"stack: Python {sys.version.split()[0]}, {stack}, numpy {version('numpy')}", flush=True)
    failed = []
    for check in (check_imports, check_steps, check_kernels):
        name, start = check.__name__.removeprefix("check_"), time.monotonic()
        print(f"stack: {name} ...", flush=True)
        try:
            result = check()
        except Exception:  # noqa: BLE001 - the next check runs all the same
            traceback.print_exc()
            failed.append(name)
            result = "FAILED"
        print(f"stack: {name}: {result} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"stack: {'failed: ' + ', '.join(failed) if failed else 'all checks passed'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
