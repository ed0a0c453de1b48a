"""Data sets: where the examples come from, and the tokens and labels that they become."""

import logging
import os
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from memdlm.data.collator import IGNORE_INDEX, check_example, data_weight
from memdlm.data.response import chat_tokens, pair_tokens, saved_tokens, text_tokens

# The columns that make a form, and what turns such an example into tokens.
FORMS = {
    ("input_ids", "labels"): saved_tokens,
    ("messages",): chat_tokens,
    ("prompt", "response"): pair_tokens,
    ("text",): text_tokens,
}

_log = logging.getLogger(__name__)


def load_examples(name: str, split: str = "train") -> datasets.Dataset:
    """Read a data set.

    Args:
        name: a .json or .jsonl file, a folder written by `save_to_disk`, or a hub name.
        split: which one, where there are several.

    Returns:
        The examples.

    Raises:
        ValueError: nothing there, not readable as what it looks like, no such split, no example, or
            columns of no known form.
    """
    try:
        if name.endswith((".json", ".jsonl")):
            if not os.path.isfile(name):
                raise FileNotFoundError("no such file")
            # Split "train" is what the reader calls a file's only content.
            loaded = datasets.load_dataset("json", data_files=name, split="train")
        elif os.path.isdir(name) and _is_saved(Path(name)):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name)
    # An empty file ends the reader with StopIteration.
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or "it has no example"
        raise ValueError(f"dataset {name} cannot be read: {reason}") from error
    if isinstance(loaded, dict):
        if split not in loaded:
            raise ValueError(f"dataset_split must be one of {', '.join(loaded)}, got {split!r}")
        loaded = loaded[split]
    if not len(loaded):
        raise ValueError(f"dataset {name} has no example")
    find_form(name, loaded.column_names)
    return loaded


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def find_form(name: str, columns: list[str]) -> tuple[str, ...]:
    """Which of `FORMS` a data set has.

    Args:
        name: for the message.
        columns: of the data set.

    Returns:
        The first form whose columns are all there.

    Raises:
        ValueError: none is complete; says which columns there are.
    """
    for form in FORMS:
        if set(form) <= set(columns):
            return form
    wanted = ", or ".join(" and ".join(form) for form in FORMS)
    raise ValueError(
        f"dataset {name} must have the columns {wanted}; it has {', '.join(sorted(columns))}"
    )


def prepare_examples(
    name: str,
    examples: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    max_length: int,
    truncation: Literal["drop", "left", "right"] = "drop",
) -> datasets.Dataset:
    """Turn examples into tokens and labels.

    Args:
        name: of the data set, for messages.
        examples: of one of `FORMS`, optionally with a `weight`.
        tokenizer: the model's.
        vocab_size: V.
        max_length: most tokens of an example.
        truncation: "drop" leaves a longer example out, "left" cuts its beginning, "right" its end.

    Returns:
        `input_ids`, `labels` and, if it was there, `weight`. Examples without a label are left out.

    Raises:
        ValueError: an example that does not fit its form, a bad weight, or no example left.
    """
    make = FORMS[find_form(name, examples.column_names)]
    kept_part = {"drop": slice(0), "left": slice(-max_length, None), "right": slice(max_length)}

    def prepare(example: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            ids, labels = make(tokenizer, example)
            check_example(torch.tensor(ids), torch.tensor(labels), index, vocab_size)
            data_weight({**example, "example": index})
        except ValueError as error:
            raise ValueError(f"dataset {name}, example {index}: {error}") from error
        if len(ids) > max_length:
            ids, labels = ids[kept_part[truncation]], labels[kept_part[truncation]]
        return {"input_ids": ids, "labels": labels}

    extra = [column for column in examples.column_names if column != "weight"]
    made = examples.map(prepare, with_indices=True, remove_columns=extra, desc=f"Tokenizing {name}")
    kept = made.filter(_has_label, input_columns="labels")
    left_out = len(made) - len(kept)
    if not len(kept):
        raise ValueError(
            f"dataset {name} has no example with a label within max_length = {max_length} tokens"
        )
    if left_out:
        _log.warning(
            "dataset %s: left out %d of %d examples, longer than max_length %d or without label",
            name,
            left_out,
            len(made),
            max_length,
        )
    return kept


def _has_label(labels: list[int]) -> bool:
    return any(label != IGNORE_INDEX for label in labels)
