"""What a checkpoint says about the method, and whether a run can go on from it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from memdlm.data.collator import MaskCollator

METHOD_FILE = "memdlm.json"


def method_of(collator: MaskCollator) -> dict[str, Any]:
    """What decides the noise, the loss and the memory: a JSON object.

    Args:
        collator: the run's.

    Returns:
        `objective`, `mask_token_id`, `seed`, `diffusion` and `memory` (None for plain MDLM).
    """
    memory = collator.memory
    return {
        "objective": "mdlm" if memory is None else "memdlm",
        "mask_token_id": collator.mask_token_id,
        "seed": collator.seed,
        "diffusion": dataclasses.asdict(collator.diffusion),
        "memory": None if memory is None else dataclasses.asdict(memory),
    }


def write_method(folder: str | os.PathLike[str], collator: MaskCollator) -> None:
    """Write `memdlm.json` beside a model, for inference with the same memory."""
    text = json.dumps(method_of(collator), indent=2) + "\n"
    (Path(folder) / METHOD_FILE).write_text(text, encoding="utf-8")
