"""`memdlm generate`: prompts in, responses out."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from memdlm.checkpoint import METHOD_FILE
from memdlm.data.collator import IGNORE_INDEX
from memdlm.data.response import pair_tokens
from memdlm.inference import Checkpoint, load_checkpoint
from memdlm.prompt_memory import PromptMemory
from memdlm.sampler.config import SamplerConfig
from memdlm.sampler.denoise import OnStep, Sampler
from memdlm.sampler.row import row_seeds
from memdlm.sampler.stream import Stream
from memdlm.sdpa import SdpaBackend


@dataclass(frozen=True)
class GenerateOptions:
    """What `memdlm generate` is told.

    Attributes:
        model: a folder that `memdlm train` or `memdlm convert` wrote, or any model of a known
            family, as a folder or a hub name.
        prompt: the prompt.
        prompt_file: instead, a .txt file with one, or a .jsonl file with one in each row's
            `prompt`.
        memory: write a memory from each prompt first; needs a model that was trained with one.
        save_memory: a file that keeps the memory, in a folder that exists.
        load_memory: read this memory instead of writing one; it has one for each prompt.
        budget_gib: GiB that the activations of writing a memory may take, above 0; prompts are then
            written in groups, a longer one in chunks.
        chat: put the tokenizer's chat template around a prompt; true if it has one.
        stream: show the response while it is written, on stderr; for one prompt.
        json: print a line of JSON for each prompt instead of its response.
        batch_size: prompts that are run together, at least 1.
        dtype: of the weights; "auto" is what they were saved in.
        device: where the model runs; the first GPU if there is one.
        attn_implementation: attention of transformers, say "sdpa", "eager", "flash_attention_2".
        sdpa_backend: which backend PyTorch's `scaled_dot_product_attention` tries first: "auto"
            leaves it to PyTorch; "cudnn" and "efficient" are for CUDA.
        load_in_4bit: quantise the weights to NF4 (bitsandbytes).

    Raises:
        ValueError: an option outside its range, or one that nothing would read.
    """

    model: str
    prompt: str | None = None
    prompt_file: str | None = None
    memory: bool = False
    save_memory: str | None = None
    load_memory: str | None = None
    budget_gib: float | None = None
    chat: bool | None = None
    stream: bool = False
    json: bool = False
    batch_size: int = 8
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None
    attn_implementation: str = "sdpa"
    sdpa_backend: SdpaBackend = "auto"
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_file is None):
            both = "both" if self.prompt is not None else "neither"
            raise ValueError(f"prompt or prompt_file must be given, got {both}")
        if self.memory and self.load_memory is not None:
            raise ValueError("memory would not be read: load_memory is given")
        if self.save_memory is not None and not self.memory:
            raise ValueError("save_memory would not be read: memory is false")
        if self.budget_gib is not None:
            if not self.memory:
                raise ValueError("budget_gib would not be read: memory is false")
            if not (math.isfinite(self.budget_gib) and self.budget_gib > 0):
                raise ValueError(f"budget_gib must be a number above 0, got {self.budget_gib}")
        if self.save_memory is not None:
            path = Path(self.save_memory)
            if path.is_dir() or not path.parent.is_dir():
                raise ValueError(
                    f"save_memory must be a file in a folder that exists, got {self.save_memory}"
                )
        if self.load_memory is not None and not Path(self.load_memory).is_file():
            raise ValueError(f"load_memory must be a file, got {self.load_memory}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


def run_generate(options: GenerateOptions, config: SamplerConfig) -> None:
    """Read prompts, write a response to each, and print them on stdout.

    Of several prompts, a line with the prompt's number, from 0, goes before each response.

    Args:
        options: see `GenerateOptions`.
        config: how the responses are written.

    Raises:
        ValueError: prompts that cannot be read, more than one where one is asked for, a model that
            cannot be loaded or that has no memory, or what `Sampler.generate` raises.
    """
    texts = read_prompts(options)
    if options.stream and len(texts) > 1:
        raise ValueError(f"stream must be false for several prompts, got {len(texts)} prompts")
    kept = options.save_memory or options.load_memory
    if kept is not None and len(texts) > options.batch_size:
        raise ValueError(
            f"batch_size must be at least the number of prompts, {len(texts)}, to save or load "
            f"their memory, got {options.batch_size}"
        )
    config.steps_of_block(config.block_length)
    checkpoint = load_checkpoint(
        options.model,
        dtype=options.dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        sdpa_backend=options.sdpa_backend,
        load_in_4bit=options.load_in_4bit,
    )
    needs_memory = options.memory or options.load_memory is not None
    if needs_memory and checkpoint.memory is None:
        raise ValueError(
            f"memory must be false for {options.model}: no memory in its {METHOD_FILE}, so it was "
            "not trained with one"
        )
    prompts = [prompt_tokens(checkpoint.tokenizer, text, options.chat) for text in texts]
    sampler = Sampler.of(checkpoint)
    # All of them, before the first batch is written or a file is.
    prompts = sampler.check_prompts(prompts, config)
    memory = None
    if needs_memory:
        memory = PromptMemory.of(checkpoint, seed=config.seed, budget_gib=options.budget_gib)
    seeds = row_seeds(config.seed, len(prompts))
    firsts = range(0, len(prompts), options.batch_size)
    for first in tqdm(firsts, desc="batches", disable=len(firsts) == 1):
        batch = slice(first, first + options.batch_size)
        stream = _stream(options, checkpoint, len(prompts[0]))
        on_step: OnStep | None = None if stream is None else stream.show
        try:
            with _reading(memory, prompts[batch], options):
                out = sampler.generate(
                    prompts[batch],
                    config,
                    seeds=seeds[batch],
                    progress=stream is None and len(firsts) == 1,
                    on_step=on_step,
                )
        finally:
            if stream is not None:
                stream.close()
        for number, (text, response) in enumerate(
            zip(texts[batch], out.responses, strict=True), first
        ):
            written = str(checkpoint.tokenizer.decode(response, skip_special_tokens=True))
            if options.json:
                counts = {"tokens": len(response), "steps": out.steps}
                print(json.dumps({"prompt": text, "response": written} | counts), flush=True)
            else:
                if len(texts) > 1:
                    print(f"# {number}")
                print(written, flush=True)


def read_prompts(options: GenerateOptions) -> list[str]:
    """The prompts of a run.

    Args:
        options: with `prompt` or `prompt_file`.

    Returns:
        At least one.

    Raises:
        ValueError: a file of another kind or that cannot be read, a row without a `prompt` that is
            text, or no prompt at all.
    """
    if options.prompt is not None:
        return [options.prompt]
    path = Path(str(options.prompt_file))
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompt_file must be a .txt or .jsonl file, got {path}")
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt_file {path} cannot be read: {error}") from error
    if path.suffix == ".txt":
        return [content.removesuffix("\n")]
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"prompt_file {path}, line {number} is not JSON: {error}") from error
        text = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ValueError(
                f"prompt_file {path}, line {number} must hold a prompt that is text, got {line}"
            )
        texts.append(text)
    if not texts:
        raise ValueError(f"prompt_file {path} must hold at least one prompt, got none")
    return texts


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool | None) -> list[int]:
    """The tokens of a prompt, as in training.

    Args:
        tokenizer: of the model.
        text: of the prompt.
        chat: put the chat template around it; None: if the tokenizer has one.

    Returns:
        Token ids.

    Raises:
        ValueError: the template is asked for and there is none.
    """
    if chat is None:
        chat = tokenizer.chat_template is not None
    if not chat:
        pair = pair_tokens(tokenizer, {"prompt": text, "response": ""})
        labelled = zip(pair.input_ids, pair.labels, strict=True)
        return [token for token, label in labelled if label == IGNORE_INDEX]
    if tokenizer.chat_template is None:
        raise ValueError("chat must be false: the tokenizer has no chat template")
    whole: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return ids


@contextlib.contextmanager
def _reading(
    memory: PromptMemory | None, prompts: Sequence[Sequence[int]], options: GenerateOptions
) -> Iterator[None]:
    """In here the model reads the memory of the prompts, if there is one."""
    if memory is None:
        yield
    elif options.load_memory is not None:
        with memory.load(options.load_memory) as lengths:
            if len(lengths) != len(prompts):
                raise ValueError(
                    f"load_memory must hold a memory for each of {len(prompts)} prompts, got "
                    f"{len(lengths)} in {options.load_memory}"
                )
            yield
    else:
        with memory.adapt(prompts):
            if options.save_memory is not None:
                memory.save(options.save_memory)
            yield


def _stream(options: GenerateOptions, checkpoint: Checkpoint, start: int) -> Stream | None:
    if not options.stream:
        return None
    return Stream(checkpoint.tokenizer, checkpoint.mask_token_id, start, sys.stderr)
