"""`memdlm probe`: what the memory of a prompt holds, in rows, tables and pictures."""

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from memdlm.demo.examples import check_demo_tokenizer
from memdlm.evaluation.held_out import no_memory
from memdlm.inference import Checkpoint, load_checkpoint
from memdlm.probe.anatomy import anatomy_rows, measure_anatomy
from memdlm.probe.options import ProbeOptions
from memdlm.probe.plots import plot_probe
from memdlm.probe.questions import TEXT, Question, build_questions
from memdlm.probe.report import Row, probe_report
from memdlm.probe.retrieval import retrieval_rows
from memdlm.probe.token_loss import masked_counts, measure_tokens, token_rows
from memdlm.prompt_memory import PromptMemory
from memdlm.sampler.command import GenerateOptions, prompt_tokens, read_prompts


def run_probe(options: ProbeOptions) -> str:
    """Probe every model, write the rows, the tables and the pictures.

    Args:
        options: see `ProbeOptions`.

    Returns:
        The tables.

    Raises:
        ValueError: a model that cannot be used or was trained without a memory, prompts that cannot
            be read or written from.
    """
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {out} cannot be written: {error.strerror}") from error
    rows: list[Row] = []
    report = ""
    for name, folder in zip(options.labels, options.folders, strict=True):
        rows += _probe(options, name, folder)
        gc.collect()
        # After each model: what was measured stays, should the next one fail.
        (out / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        report = probe_report(rows)
        pictures = [f"![{picture}]({picture})" for picture in plot_probe(out, rows)]
        text = "\n".join([f"# The memory of {', '.join(options.labels)}", "", report, *pictures])
        (out / "probe.md").write_text(text + "\n", encoding="utf-8")
    return report


def _probe(options: ProbeOptions, name: str, folder: str) -> list[Row]:
    """The rows of one model, which is let go of afterwards."""
    texts = None
    if not options.on_demo:
        given = GenerateOptions(folder, options.prompt, options.prompt_file)
        texts = read_prompts(given)
    checkpoint = load_checkpoint(folder, dtype=options.dtype, device=options.device)
    if checkpoint.memory is None:
        raise ValueError(
            f"model must be one that was trained with a memory, got {folder}, which was not"
        )
    questions: list[Question] = []
    if texts is None:
        check_demo_tokenizer(checkpoint.tokenizer, folder)
        questions = build_questions(options.question_count, options.question_length, options.seed)
        prompts, kinds = [q.prompt for q in questions], [q.kinds for q in questions]
    else:
        prompts = [prompt_tokens(checkpoint.tokenizer, text, None) for text in texts]
        kinds = [[TEXT] * len(prompt) for prompt in prompts]
    rows = _of_prompts(options, name, checkpoint, prompts, kinds)
    if questions:
        rows += retrieval_rows(
            name, checkpoint, checkpoint.memory, questions, options.batch_size, options.seed
        )
    return rows


def _of_prompts(
    options: ProbeOptions,
    name: str,
    checkpoint: Checkpoint,
    prompts: Sequence[list[int]],
    kinds: Sequence[list[str]],
) -> list[Row]:
    """Anatomy, the NLL of tokens by kind, and of every token of the first prompt."""
    assert checkpoint.memory is not None
    memory = PromptMemory.of(checkpoint, seed=options.seed)
    try:
        parts = measure_anatomy(memory, checkpoint.memory, prompts, options.batch_size)
        masked = masked_counts(memory, prompts, checkpoint.mask_token_id)
        off, on = (
            measure_tokens(
                checkpoint,
                prompts,
                adapt,
                checkpoint.memory.prompt_ratio,
                options.batch_size,
                options.seed,
            )
            for adapt in (no_memory, memory.adapt)
        )
    finally:
        memory.detach()
    rows = anatomy_rows(name, parts) + token_rows(name, kinds, off, on, masked)
    return [*rows, _strip(name, checkpoint, prompts[0], off[0], on[0], masked[0])]


def _strip(
    name: str, checkpoint: Checkpoint, prompt: list[int], off: Tensor, on: Tensor, masked: Tensor
) -> dict[str, Any]:
    tokens = [str(checkpoint.tokenizer.decode([token])) for token in prompt]
    return {
        "measure": "strip",
        "model": name,
        "tokens": [token.replace("\n", "↵") for token in tokens],
        "off": [round(value, 4) for value in off.tolist()],
        "on": [round(value, 4) for value in on.tolist()],
        "masked": masked.tolist(),
    }
