"""`memdlm meta-bias`: what the first-order outer gradient leaves out, in rows, tables, pictures."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import send_to_device
from peft import PeftModel

from memdlm.config import MemoryConfig
from memdlm.data.collator import MaskCollator
from memdlm.data.dataset import load_examples, prepare_examples
from memdlm.demo.examples import BASE_FOLDER, build_examples, check_demo_tokenizer
from memdlm.inference import Checkpoint, load_checkpoint
from memdlm.meta_bias.measure import Row, compare_gradients
from memdlm.meta_bias.options import MetaBiasOptions
from memdlm.meta_bias.plots import plot_meta_bias
from memdlm.meta_bias.report import meta_bias_report

_DEMO = "demo"
_DEMO_LENGTH = 256


def run_meta_bias(options: MetaBiasOptions) -> str:
    """Compare the gradients of every model and setting; write rows, tables and pictures.

    Args:
        options: see `MetaBiasOptions`.

    Returns:
        The tables.

    Raises:
        ValueError: a model or data set that cannot be used.
    """
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {out} cannot be written: {error.strerror}") from error
    rows: list[Row] = []
    report = ""
    for name, folder in zip(options.labels, options.folders, strict=True):
        rows += [{"model": name, **row} for row in _compare(options, folder)]
        gc.collect()
        # After each model: what was measured stays, should the next one fail.
        (out / "meta_bias.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = meta_bias_report(rows)
        (out / "meta_bias.md").write_text(report + "\n", encoding="utf-8")
        plot_meta_bias(out, rows)
    return report


def _compare(options: MetaBiasOptions, folder: str) -> list[Row]:
    """The rows of one model, which is let go of afterwards."""
    source = str(BASE_FOLDER) if folder == _DEMO else folder
    checkpoint = load_checkpoint(source, dtype=options.dtype, device=options.device)
    if isinstance(checkpoint.model, PeftModel):
        checkpoint.model.set_adapter(checkpoint.model.active_adapter)  # loaded frozen
    batches = _feature_batches(options, checkpoint)
    rows = []
    for setting in options.settings(checkpoint.memory or MemoryConfig()):
        made = _batches(options, checkpoint, setting.memory, batches)
        rows += compare_gradients(checkpoint.model, checkpoint.diffusion, setting, made)
    return rows


def _feature_batches(
    options: MetaBiasOptions, checkpoint: Checkpoint
) -> list[list[dict[str, Any]]]:
    """Examples of each batch, numbered, which is what their masks depend on."""
    count = options.count * options.batch_size
    if options.dataset is None:
        check_demo_tokenizer(checkpoint.tokenizer, checkpoint.folder)
        examples = build_examples("train", count, _DEMO_LENGTH, options.seed)
    else:
        loaded = load_examples(options.dataset, options.dataset_split or "train")
        prepared = prepare_examples(
            options.dataset,
            loaded,
            checkpoint.tokenizer,
            checkpoint.model.config.vocab_size,
            options.max_length or checkpoint.max_length,
        )
        examples = [dict(each) for each in prepared.select(range(min(count, len(prepared))))]
    if len(examples) < count:
        raise ValueError(
            f"dataset must have count * batch_size = {count} examples, got {len(examples)}"
        )
    numbered = [
        {**example, "example": number, "epoch": 0} for number, example in enumerate(examples)
    ]
    size = options.batch_size
    return [numbered[first : first + size] for first in range(0, count, size)]


def _batches(
    options: MetaBiasOptions,
    checkpoint: Checkpoint,
    memory: MemoryConfig,
    features: list[list[dict[str, Any]]],
) -> Iterator[dict[str, Any]]:
    config = checkpoint.model.config
    collator = MaskCollator(
        checkpoint.mask_token_id,
        checkpoint.pad_token_id,
        config.vocab_size,
        checkpoint.diffusion,
        memory,
        seed=options.seed,
        pad_to_multiple_of=checkpoint.diffusion.block_size or 1,
        right_shift_logits=bool(getattr(config, "right_shift_logits", False)),
    )
    for each in features:
        yield send_to_device(collator(each), checkpoint.device)
