"""What a checkpoint says about the method, and whether a run can go on from it."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers.trainer import TRAINER_STATE_NAME

from memdlm.data.collator import MaskCollator

METHOD_FILE = "memdlm.json"

# What decides the shapes of a model's weights, and how many experts a token gets. The names are
# Hugging Face's where it has one; a config may be saved under others.
_SHAPES: tuple[str, ...] = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "embedding_size",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_shared_experts",
    "shared_expert_intermediate_size",
    "first_k_dense_replace",
    "moe_layer_freq",
)
# Names without an order: a set in one place, a list in another.
_LORA_TARGETS: tuple[str, ...] = ("target_modules", "target_parameters")
_LORA: tuple[str, ...] = (
    "r",
    "lora_alpha",
    "lora_dropout",
    *_LORA_TARGETS,
    "base_model_name_or_path",
)


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


def last_checkpoint(folder: str) -> str:
    """The newest complete checkpoint of an output folder; one cut short by a kill is passed over.

    Raises:
        ValueError: there is none.
    """
    # The Trainer writes its state last.
    complete = [path.parent for path in Path(folder).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    if not complete:
        raise ValueError(
            f"resume_from_checkpoint is true, but output_dir {folder} has no complete checkpoint"
        )
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2])))


def check_resumable(
    folder: str, collator: MaskCollator, model_config: Any, lora: LoraConfig | None
) -> None:
    """Check that a checkpoint belongs to this run's model and method.

    Args:
        folder: the checkpoint.
        collator: the run's.
        model_config: of the model that is about to be loaded.
        lora: the outer LoRA, None for full fine-tuning.

    Raises:
        ValueError: not a checkpoint of this program, or another model's, or of other options; names
            what differs.
    """
    path = Path(folder)
    kind = "config.json" if lora is None else "adapter_config.json"
    for name in (TRAINER_STATE_NAME, METHOD_FILE, kind):
        if not (path / name).is_file():
            raise ValueError(f"resume_from_checkpoint {folder} has no {name}: not of this run")
    saved = json.loads((path / kind).read_text(encoding="utf-8"))
    if lora is None:
        _check_same(folder, "model", _shapes(model_config), saved)
    else:
        ours = lora.to_dict()
        own = {name: _sorted_targets(name, ours.get(name)) for name in _LORA}
        theirs = {name: _sorted_targets(name, saved.get(name)) for name in _LORA}
        _check_same(folder, "model", own, theirs)
    method = json.loads((path / METHOD_FILE).read_text(encoding="utf-8"))
    _check_same(folder, "run", _flat(method_of(collator)), _flat(method))


def _shapes(config: Any) -> dict[str, Any]:
    """A config's `_SHAPES` under the names that it is saved with; None where it has none."""
    values = config.to_dict()
    saved_as = [config.attribute_map.get(name, name) for name in _SHAPES]
    return {name: values.get(name) for name in saved_as}


def _sorted_targets(name: str, value: Any) -> Any:
    return sorted(value or ()) if name in _LORA_TARGETS and not isinstance(value, str) else value


def _check_same(folder: str, what: str, ours: dict[str, Any], saved: dict[str, Any]) -> None:
    for name, value in ours.items():
        other = saved.get(name)
        if value != other:
            raise ValueError(
                f"resume_from_checkpoint {folder} is another {what}'s: its {name} is {other!r}, "
                f"here it is {value!r}"
            )


def _flat(method: dict[str, Any]) -> dict[str, Any]:
    nested = {name: value for name, value in method.items() if isinstance(value, dict)}
    plain = {name: value for name, value in method.items() if name not in nested}
    return plain | {f"{group}.{k}": v for group, part in nested.items() for k, v in part.items()}
