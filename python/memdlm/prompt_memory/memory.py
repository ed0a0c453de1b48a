"""`PromptMemory`: writes fast weights from prompts, for a model that then reads them."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from accelerate.utils import send_to_device
from torch import nn
from tqdm import tqdm

from memdlm.config import DiffusionConfig, MemoryConfig
from memdlm.data.collator import MaskCollator
from memdlm.fast_weights import FastWeights
from memdlm.inference import Checkpoint
from memdlm.objective import MemDLMObjective
from memdlm.prompt_memory.fingerprint import fingerprint
from memdlm.prompt_memory.memory_file import (
    Header,
    check_header,
    header,
    read_header,
    read_memory_file,
    write_memory_file,
)
from memdlm.prompt_memory.merging import merged, merges
from memdlm.prompt_memory.plan import Writing, plan, row_bytes
from memdlm.prompt_memory.prompts import checked_prompts
from memdlm.prompt_memory.trace import PromptTrace, joined

# The decoders whose memory is being written or read.
_in_use: WeakSet[nn.Module] = WeakSet()


class PromptMemory:
    """Writes fast weights from prompts, for a model that then reads them.

    Every prompt token is maskable, the anchor masks `prompt_ratio` of them, all weigh the same; the
    K steps are those of training. Writing and reading run in evaluation mode. Outside of `adapt`
    and `load` the model computes what it did without the memory, bit for bit; a model of experts
    runs them by another function (`Backbone`) until `detach`, so its last digits may be others.

    Args:
        model: as for `MDLMObjective`.
        diffusion: the schedule that the model was trained with.
        memory: the inner loop; each prompt gets fast weights of its own, whatever its scope.
            `inner_graph` changes the speed alone, and is left out where the model is not on CUDA.
        mask_token_id, pad_token_id, vocab_size: as for `MaskCollator`.
        seed: of the masks and of the fast weights' initial values.
        budget_gib: GiB that the activations of a writing may take, by an estimate (`row_bytes`);
            None for no limit. Prompts are then written in groups that fit, as if all together. One
            that does not fit alone is cut into chunks, and the K steps run on chunk after chunk:
            an approximation, where a chunk sees the tokens before it through the memory alone, and
            its positions begin at 0. `PromptTrace.chunks` tells how many there were.

    Raises:
        ValueError: as `MemDLMObjective` and `MaskCollator`; a budget that is not above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: DiffusionConfig,
        memory: MemoryConfig,
        *,
        mask_token_id: int,
        pad_token_id: int,
        vocab_size: int,
        seed: int = 0,
        budget_gib: float | None = None,
    ) -> None:
        if budget_gib is not None and not (math.isfinite(budget_gib) and budget_gib > 0):
            raise ValueError(f"budget_gib must be a number above 0, or None, got {budget_gib}")
        uniform = dataclasses.replace(diffusion, loss_weight="uniform")
        graph = memory.inner_graph and next(model.parameters()).device.type == "cuda"
        # There is no outer gradient here.
        own = dataclasses.replace(
            memory, scope="sample", inner_graph=graph, meta_gradient="first_order"
        )
        self._model = model
        self._budget_gib = budget_gib
        self._detached = False
        self._written: Header | None = None
        # What is made in inference mode cannot be written to or differentiated outside of it.
        with torch.inference_mode(False):
            self._objective = MemDLMObjective(model, uniform, own)
        self._collator = MaskCollator(
            mask_token_id,
            pad_token_id,
            vocab_size,
            uniform,
            own,
            seed=seed,
            pad_to_multiple_of=diffusion.block_size or 1,
            anchor_ratio=memory.prompt_ratio,
            right_shift_logits=self._objective.backbone.right_shift_logits,
        )

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, *, seed: int = 0, budget_gib: float | None = None
    ) -> "PromptMemory":
        """The memory that a checkpoint's model was trained with.

        Args:
            checkpoint: from `load_checkpoint`.
            seed, budget_gib: as for `PromptMemory`.

        Raises:
            ValueError: the model was trained without a memory.
        """
        if checkpoint.memory is None:
            raise ValueError(
                f"checkpoint must be of a model that was trained with a memory, got "
                f"{checkpoint.folder}, which was trained without one"
            )
        return cls(
            checkpoint.model,
            checkpoint.diffusion,
            checkpoint.memory,
            mask_token_id=checkpoint.mask_token_id,
            pad_token_id=checkpoint.pad_token_id,
            vocab_size=checkpoint.model.config.vocab_size,
            seed=seed,
            budget_gib=budget_gib,
        )

    @contextlib.contextmanager
    def adapt(
        self, prompts: Sequence[Sequence[int]], merge: bool | None = None
    ) -> Iterator[PromptTrace]:
        """Run the inner loop on prompts; in the context the model reads what it wrote.

        Args:
            prompts: B lists of token ids, of any lengths. Prompt b is read in row b of every
                forward, so all of them must be in it, in this order; a merged one in every row.
            merge: add the fast weights to the model's weights while they are read: True demands it,
                False never does. Merged ones are read by a forward of any number of rows; others
                need as many rows as there are prompts, a single one too. None merges a single
                prompt into float32 or float64 weights. Into bfloat16 it is lossy: in a layer 4,096
                wide, rounding left 83 to 85 % of the entries as they were, and what was added was
                wrong by 50 to 82 %.

        Yields:
            The trace of the inner steps.

        Raises:
            ValueError: no prompt; one that is empty, longer than the model's positions, or holds
                the mask token or something that is no token; a merge that is impossible; a budget
                that not one token fits, or that cuts a prompt with `inner_graph` on CUDA.
            RuntimeError: inside of another `adapt` or `load` on this model, by whichever
                `PromptMemory`, or after `detach`.
        """
        ids = checked_prompts(
            prompts,
            self._collator.mask_token_id,
            self._collator.vocab_size,
            self._objective.backbone.config.max_position_embeddings,
        )
        writings = self._plan([len(prompt) for prompt in ids])
        with self._alone():
            merge = merges(self._model, self._objective.fast_weights, len(ids), merge)
            self._written = None
            with torch.inference_mode(False):
                trace = self._write(ids, writings)
                self._written = header(
                    tuple(len(prompt) for prompt in ids),
                    self._objective.memory,
                    fingerprint(self._model),
                )
            with self._reading(merge):
                yield trace

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the last memory to a file (safetensors), for `load`.

        Args:
            path: the file; one of that name is replaced.

        Raises:
            ValueError: no memory has been written, or the file cannot be.
        """
        if self._written is None:
            raise ValueError("save must come after a memory was written with adapt, got none")
        write_memory_file(path, self._objective.fast_weights, self._written)

    @contextlib.contextmanager
    def load(
        self, path: str | os.PathLike[str], merge: bool | None = None
    ) -> Iterator[tuple[int, ...]]:
        """Read a saved memory, with the outputs of the context that wrote it.

        What the model is asked meanwhile need not be the prompts that it was written from: to read
        one text's memory under other prompts is what it is for. So none is checked against them.

        Args:
            path: from `save`.
            merge: as for `adapt`.

        Yields:
            The lengths of the prompts that it was written from, one for each row of a forward.

        Raises:
            ValueError: a file that cannot be read, or of another model, or with options that this
                memory does not read with; says what differs.
            RuntimeError: as `adapt`.
        """
        with self._alone():
            saved = read_header(path)
            fast_weights = self._objective.fast_weights
            check_header(path, saved, self._objective.memory, fingerprint(self._model))
            merge = merges(self._model, fast_weights, len(saved.lengths), merge)
            tensors = read_memory_file(path, fast_weights, len(saved.lengths))
            with torch.inference_mode(False):
                fast_weights.fill(torch.cat([t.flatten(1) for t in tensors.values()], dim=1))
            self._written = saved
            with self._reading(merge):
                yield saved.lengths

    @property
    def fast_weights(self) -> FastWeights:
        """Where the memory lies, to be looked at: a set for each prompt that was written last."""
        return self._objective.fast_weights

    def inner_batch(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What the inner loop is given for prompts that are written together, uncut.

        Args:
            prompts: B lists of token ids.

        Returns:
            The batch of `MaskCollator`, on the model's device: its `trajectory` holds the masked
            states, its `memory_seed` what the fast weights are reset with.
        """
        return self._batch(prompts, 0)

    def detach(self) -> None:
        """Take the fast weights' hooks off the model; nothing can be written afterwards.

        Experts run by the function that they had before, unless a `Backbone` of the model is left.
        """
        self._detached = True
        self._objective.fast_weights.detach()
        self._objective.backbone.release()

    def _plan(self, lengths: list[int]) -> list[Writing]:
        if self._budget_gib is None:
            return plan(lengths, None, 1)
        unit = self._collator.pad_to_multiple_of
        per_token = row_bytes(self._objective.backbone, self._objective.memory)
        most = int(self._budget_gib * 2**30) // per_token
        if most < unit:
            raise ValueError(
                f"budget_gib must be at least {unit * per_token / 2**30:.3g}, for {unit} token(s), "
                f"got {self._budget_gib}"
            )
        writings = plan(lengths, most, unit)
        longest = max(lengths)
        if self._objective.memory.inner_graph and any(len(w.chunks) > 1 for w in writings):
            raise ValueError(
                f"budget_gib must leave every prompt whole with inner_graph: at most {most} tokens "
                f"fit {self._budget_gib}, got a prompt of {longest}"
            )
        return writings

    def _write(self, prompts: list[list[int]], writings: list[Writing]) -> PromptTrace:
        fast_weights = self._objective.fast_weights
        values = None
        parts = []
        for writing in tqdm(
            writings, desc="writing memory", leave=False, disable=len(writings) == 1
        ):
            own = list(writing.prompts)
            parts.append(
                (
                    own,
                    [
                        self._run([prompts[b][chunk] for b in own], number)
                        for number, chunk in enumerate(writing.chunks)
                    ],
                )
            )
            if len(writings) > 1:
                if values is None:
                    values = fast_weights.param.new_empty(len(prompts), fast_weights.param.shape[1])
                values[own] = fast_weights.param
        if values is not None:
            fast_weights.fill(values)
        return joined(parts, len(prompts))

    def _run(self, prompts: list[list[int]], chunk: int) -> Any:
        return self._objective.write_memory(self._batch(prompts, chunk), reset=chunk == 0)

    def _batch(self, prompts: Sequence[Sequence[int]], chunk: int) -> dict[str, Any]:
        # One example number for all: a prompt's memory does not depend on its place in the batch.
        # Chunks differ, so that not every one is masked in the same places.
        features = [
            {"input_ids": prompt, "labels": prompt, "example": chunk, "epoch": 0}
            for prompt in prompts
        ]
        device = self._objective.backbone.head()[0].device
        batch: dict[str, Any] = send_to_device(self._collator(features), device)
        return batch

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """In here no other memory is written or read, and the model is in evaluation mode."""
        decoder = self._objective.backbone.decoder
        if decoder in _in_use:
            raise RuntimeError("a model can hold one memory at a time: leave the context first")
        if self._detached:
            raise RuntimeError("this PromptMemory was detached from its model: make another")
        modes = [(module, module.training) for module in self._model.modules()]
        _in_use.add(decoder)
        try:
            self._model.eval()
            yield
        finally:
            _in_use.discard(decoder)
            for module, training in modes:
                module.training = training

    def _reading(self, merge: bool) -> contextlib.AbstractContextManager[None]:
        fast_weights = self._objective.fast_weights
        return merged(fast_weights) if merge else fast_weights.reading()
