"""One side of `bench.compare`: steps of one tree's packages, run whenever a line asks for one.

It is run as a file, so that nothing is imported before the paths are set: `memdlm` and
`memdlm_kernels` come from the folders it is told, `bench` and `tests` from this tree.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO


def main() -> None:
    """Read a setting from the command line, then names of variants from stdin."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        _set_paths(spec["root"], spec["folders"])
        steps, synchronize = _prepare(spec)
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        _answer(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    _answer(answers, {"variants": list(steps)})
    for line in sys.stdin:
        synchronize()
        start = time.perf_counter()
        for number in range(spec["batches"]):
            loss = steps[line.strip()](number)
        synchronize()
        time_ms = 1e3 * (time.perf_counter() - start) / spec["batches"]
        _answer(answers, {"time_ms": time_ms, "loss": float(loss)})


def _answer(answers: TextIO, fields: dict[str, Any]) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


def _set_paths(root: str, folders: list[str]) -> None:
    # An editable install leads every import of the packages to the tree it was made in.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not _is_editable(finder)]
    sys.path[:0] = [*folders, root]
    for name in ("memdlm", "memdlm_kernels"):
        found = Path(importlib.import_module(name).__file__ or "").resolve()
        if not any(found.is_relative_to(Path(folder).resolve()) for folder in folders):
            raise ImportError(f"{name} must come from {folders}, got {found}")


def _is_editable(finder: Any) -> bool:
    kind = finder if isinstance(finder, type) else type(finder)
    return kind.__module__.startswith("_editable_skbc_memdlm")


def _prepare(spec: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    import torch

    from bench.cases import StepCase
    from bench.variants import make_steps

    device = torch.device(spec["device"])
    steps = make_steps(
        StepCase(**spec["case"]),
        spec["inner_steps"],
        spec["batches"],
        device,
        getattr(torch, spec["dtype"]),
        naive=False,
        prompt_kv=spec["prompt_kv"],
    )
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return steps, synchronize


if __name__ == "__main__":
    main()
