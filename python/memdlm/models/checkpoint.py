"""Checkpoints under their published names: conversions that families share, and strict loading."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
)

SHOWN = 5


def stack_experts() -> list[WeightConverter]:
    """Linear layers of every expert to stacked tensors [E, 2 * I, D] and [E, D, I], and back."""
    return [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            "mlp.experts.*.down_proj.weight",
            "mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


class SplitQueryKeyValue(ConversionOps):
    """One projection [(H + 2 * H_kv) * head_dim, D], or its bias, to those of q, k, v, and back."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        (fused,) = input_dict.values()
        tensor = fused[0] if isinstance(fused, list) else fused
        config = kwargs["config"]
        key = config.num_key_value_heads * config.head_width
        parts = tensor.split((len(tensor) - 2 * key, key, key))
        return {name: [part.clone()] for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return Concatenate(dim=0)


def load_complete(load: Callable[..., Any], checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a model, and refuse a checkpoint that Hugging Face would only warn about.

    Args:
        load: `from_pretrained` of Hugging Face.
        checkpoint: its first argument, `pretrained_model_name_or_path`.
        args, kwargs: its other arguments.

    Returns:
        What it returns.

    Raises:
        ValueError: tensors are missing, unknown or of another shape; lists the first few.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    any_shape = kwargs.pop("ignore_mismatched_sizes", False)
    try:
        model, info = load(
            checkpoint, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except RuntimeError as error:
        if "conversion" not in str(error):
            raise
        raise ValueError(
            f"the checkpoint {checkpoint} does not fit its config: the tensors of a layer cannot "
            "be put together, see the report above; is an expert incomplete?"
        ) from error
    problems = [
        *_first("missing", sorted(info["missing_keys"])),
        *_first("unknown", sorted(info["unexpected_keys"])),
        *_first(
            "of another shape",
            [
                f"{name} {tuple(found)}, the config says {tuple(expected)}"
                for name, found, expected in sorted(info["mismatched_keys"])
                if not any_shape
            ],
        ),
    ]
    if problems:
        raise ValueError(
            f"the checkpoint {checkpoint} does not fit its config: tensors {'; '.join(problems)}"
        )
    return (model, info) if wants_info else model


def _first(what: str, names: list[str]) -> list[str]:
    """The first few names, or nothing where there are none."""
    if not names:
        return []
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{what}: {', '.join(names[:SHOWN])}{rest}"]
