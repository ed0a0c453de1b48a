"""Iterative denoising: a canvas of masked tokens is filled step by step.

After LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487), Fast-dLLM (arXiv 2505.22618) and LLaDA2.x
(arXiv 2512.15745).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from memdlm.backbone import Backbone, check_blocks
from memdlm.inference import Checkpoint, token_logits
from memdlm.sampler.confidence import guess
from memdlm.sampler.config import SamplerConfig
from memdlm.sampler.row import Row, row_seeds
from memdlm.sampler.token_lists import checked_seeds, checked_token_lists

OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class SamplerOutput:
    """What was written.

    Attributes:
        responses: of `generate`, for each prompt the new tokens before the first end token; of
            `infill`, the whole sequences.
        canvas: [B, L] int64 on the CPU, every row padded on the right.
        lengths: tokens of each row of the canvas.
        steps: denoising steps that the batch took; with guidance each is two forwards.
    """

    responses: list[list[int]]
    canvas: Tensor
    lengths: list[int]
    steps: int


class Sampler:
    """Writes with a masked diffusion model.

    Only the tokens that a step may reveal get logits: no [B, L, V] is made. Every forward has all
    rows in their order, so a memory of the prompts (`PromptMemory.adapt`) may be read meanwhile.
    Rows are padded on the right and draw from generators of their own: a row of a batch is written
    as it would be alone.

    Args:
        model: as for `Backbone`.
        mask_token_id: of the mask token, which is never written.
        pad_token_id: what fills the canvas behind shorter rows; nothing sees it.
        end_token_ids: the tokens that end a response.
        max_length: most tokens of a prompt and its response; the model's positions if not given.
        block_size: tokens of a block of the block diffusion that the model was trained with, at
            least 1 (32 for LLaDA2.x as published); None where every token sees every other.

    Raises:
        ValueError: as `Backbone`; a mask or pad token that the model does not have; a block size
            below 1, or any for a model with right-shifted logits.
    """

    def __init__(
        self,
        model: Any,
        *,
        mask_token_id: int,
        pad_token_id: int,
        end_token_ids: Sequence[int] = (),
        max_length: int | None = None,
        block_size: int | None = None,
    ) -> None:
        self.backbone = Backbone(model)
        config = self.backbone.config
        if block_size is not None and block_size < 1:
            raise ValueError(f"block_size must be at least 1, or None, got {block_size}")
        check_blocks(config, block_size)
        self.vocabulary = int(self.backbone.head()[0].shape[0])
        for name, token in (("mask_token_id", mask_token_id), ("pad_token_id", pad_token_id)):
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"{name} must be in [0, {self.vocabulary}), got {token}")
        self._model = model
        self._positions = int(config.max_position_embeddings)
        self.mask_token_id = mask_token_id
        self.pad_token_id = pad_token_id
        self.end_token_ids = tuple(end_token_ids)
        self.max_length = int(config.max_position_embeddings if max_length is None else max_length)
        self.block_size = block_size

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Sampler":
        """A sampler of a loaded model.

        Args:
            checkpoint: of `load_checkpoint`.

        Returns:
            The sampler.

        Raises:
            ValueError: as `Sampler`.
        """
        return cls(
            checkpoint.model,
            mask_token_id=checkpoint.mask_token_id,
            pad_token_id=checkpoint.pad_token_id,
            end_token_ids=checkpoint.end_token_ids,
            max_length=checkpoint.max_length,
            block_size=checkpoint.diffusion.block_size,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        config: SamplerConfig | None = None,
        *,
        seeds: Sequence[int] | None = None,
        progress: bool = False,
        on_step: OnStep | None = None,
    ) -> SamplerOutput:
        """Write a response to each prompt.

        Args:
            prompts: B lists of token ids, of any lengths.
            config: how; the defaults if not given.
            seeds: of each row's draws, in [0, 2^63); `row_seeds(config.seed, B)` if not given.
            progress: show a bar of the tokens.
            on_step: called after each step with its number, from 1, and the canvas, [B, L] int64
                on the CPU.

        Returns:
            The responses and the canvas.

        Raises:
            ValueError: as `check_prompts`; a model in training mode; seeds out of range, or of
                another number than the prompts.
        """
        config = config or SamplerConfig()
        prompts = self.check_prompts(prompts, config)
        own_seeds = self._seeds("prompts", seeds, config, len(prompts))
        block_length = self._block_length(config)
        steps = config.steps_of_block(block_length)
        rows = []
        for prompt, seed in zip(prompts, own_seeds, strict=True):
            start, kept = len(prompt), len(prompt) + config.max_new_tokens
            stop = self._stop(kept, config)
            first = start if self.block_size is None else 0
            rows.append(
                Row(
                    [*prompt, *[self.mask_token_id] * (stop - start)],
                    _blocks(range(start, stop), block_length, first),
                    steps,
                    config,
                    kept=kept,
                    block_length=None if self.block_size is None else block_length,
                    mask_token_id=self.mask_token_id,
                    end_token_ids=self.end_token_ids if config.stop_at_end else (),
                    seed=seed,
                    device=self.device,
                )
            )
        count = self._denoise(rows, config, progress, on_step)
        responses = []
        for prompt, row in zip(prompts, rows, strict=True):
            response = row.kept_tokens[len(prompt) :]
            end = next((i for i, token in enumerate(response) if token in self.end_token_ids), None)
            responses.append(response[:end])
        return self._output(responses, rows, count)

    def check_prompts(
        self, prompts: Sequence[Sequence[int]], config: SamplerConfig
    ) -> list[list[int]]:
        """Whether responses can be written to prompts, all batches of a run at once.

        Args:
            prompts, config: as for `generate`.

        Returns:
            The prompts, as lists of int.

        Raises:
            ValueError: something that is no token id; no prompt, an empty one, one with a mask
                token or an unknown token, one that leaves too few positions for the response;
                fewer steps than blocks, steps that do not share evenly among them, or any for a
                model of block diffusion; tokens to suppress that are unknown, or all there are.
        """
        checked = checked_token_lists("prompts", prompts, self.vocabulary)
        self._check(config)
        config.steps_of_block(self._block_length(config))
        for number, prompt in enumerate(checked):
            if self.mask_token_id in prompt:
                raise ValueError(
                    f"prompts must not hold the mask token, got {self.mask_token_id} in prompt "
                    f"{number}: `infill` fills masks"
                )
            length = len(prompt) + config.max_new_tokens
            if length > self.max_length:
                raise ValueError(
                    f"a prompt and max_new_tokens must be at most {self.max_length} tokens "
                    f"together, got {len(prompt)} + {config.max_new_tokens} for prompt {number}"
                )
            stop = self._stop(length, config)
            if stop > self._positions:
                raise ValueError(
                    f"a prompt and max_new_tokens must leave the last block within the model's "
                    f"{self._positions} positions, got {len(prompt)} + {config.max_new_tokens} for "
                    f"prompt {number}, whose last block of {self._block_length(config)} ends at "
                    f"{stop}"
                )
        return checked

    def infill(
        self,
        canvases: Sequence[Sequence[int]],
        config: SamplerConfig | None = None,
        *,
        seeds: Sequence[int] | None = None,
        progress: bool = False,
        on_step: OnStep | None = None,
    ) -> SamplerOutput:
        """Fill the mask tokens of sequences, wherever they are; no other token changes.

        Blocks are windows of the sequence, from its first token. A row's `steps` are shared among
        its blocks that hold masks, rounded up. A last block that is short stays so.

        Args:
            canvases: B lists of token ids, of any lengths.
            config, seeds, progress, on_step: as for `generate`; `max_new_tokens` and `stop_at_end`
                are not read.

        Returns:
            The sequences, filled.

        Raises:
            ValueError: something that is no token id; no sequence, an empty one, one with an
                unknown token or longer than the model's positions, or without a mask token; else
                as `generate`.
        """
        config = config or SamplerConfig()
        canvases = checked_token_lists("canvases", canvases, self.vocabulary)
        self._check(config)
        own_seeds = self._seeds("canvases", seeds, config, len(canvases))
        for number, canvas in enumerate(canvases):
            if self.mask_token_id not in canvas:
                raise ValueError(f"canvases must hold mask tokens, got none in canvas {number}")
            if len(canvas) > self.max_length:
                raise ValueError(
                    f"canvases must be at most {self.max_length} tokens, got {len(canvas)} for "
                    f"canvas {number}"
                )
        block_length = self._block_length(config)
        rows = []
        for canvas, seed in zip(canvases, own_seeds, strict=True):
            masked = [i for i, token in enumerate(canvas) if token == self.mask_token_id]
            blocks = _blocks(masked, block_length, 0)
            steps = config.steps_per_block
            if config.steps is not None:
                steps = math.ceil(config.steps / len(blocks))
            rows.append(
                Row(
                    canvas,
                    blocks,
                    steps,
                    config,
                    kept=len(canvas),
                    block_length=None if self.block_size is None else block_length,
                    mask_token_id=self.mask_token_id,
                    end_token_ids=(),
                    seed=seed,
                    device=self.device,
                )
            )
        count = self._denoise(rows, config, progress, on_step)
        return self._output([row.tokens for row in rows], rows, count)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.head()[0].device

    def _denoise(
        self, rows: Sequence[Row], config: SamplerConfig, progress: bool, on_step: OnStep | None
    ) -> int:
        given = self._canvas([row.tokens for row in rows]) != self.mask_token_id
        left = sum(row.masked_count() for row in rows)
        step = 0
        with tqdm(total=left, desc="tokens", unit="token", disable=not progress) as bar:
            while any(wanted := [row.next_positions() for row in rows]):
                step += 1
                logits = self._logits(rows, wanted, config, given)  # [B, W, V]
                pairs = list(zip(rows, wanted, logits, strict=True))
                # All guesses are queued on the device before the first is waited for.
                guesses = [guess(own[: len(at)], config, row.generator) for row, at, own in pairs]
                for (row, at, _), own_guess in zip(pairs, guesses, strict=True):
                    if at:
                        row.write(at, own_guess)
                still = sum(row.masked_count() for row in rows)
                bar.update(left - still)
                left = still
                if on_step is not None:
                    on_step(step, self._canvas([row.kept_tokens for row in rows]))
        return step

    def _logits(
        self, rows: Sequence[Row], wanted: list[list[int]], config: SamplerConfig, given: Tensor
    ) -> Tensor:
        """[B, W, V]: those of each row's wanted positions, then of its first token as padding."""
        width = max(map(len, wanted))
        positions = torch.tensor([[*at, *[0] * (width - len(at))] for at in wanted])
        canvas = self._canvas([row.tokens for row in rows])
        canvas_block = None
        if self.block_size is not None:
            # Nothing sees the blocks behind its own.
            canvas_block = self._block_length(config)
            assert canvas_block is not None
            last_block = int(positions.max()) // canvas_block
            canvas = canvas[:, : (last_block + 1) * canvas_block]
        length = canvas.shape[1]
        lengths = torch.tensor([len(row.tokens) for row in rows])
        visible = torch.arange(length) < lengths[:, None]
        mask = None if bool(visible.all()) else visible.to(self.device)

        def forward(input_ids: Tensor) -> Tensor:
            return token_logits(
                self.backbone,
                input_ids.to(self.device),
                positions.to(self.device),
                mask,
                canvas_block=canvas_block,
            )

        logits = forward(canvas)
        if config.cfg_scale > 0:
            # A second forward, not a larger batch: row b reads the memory of prompt b.
            unconditional = forward(canvas.masked_fill(given[:, :length], self.mask_token_id))
            logits = unconditional + (1 + config.cfg_scale) * (logits - unconditional)
        never = [self.mask_token_id, *(config.suppress_tokens or ())]
        return logits.index_fill_(-1, torch.tensor(never, device=logits.device), -torch.inf)

    def _canvas(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        length = max(map(len, sequences))
        pad = [self.pad_token_id] * length
        return torch.tensor([[*own, *pad[len(own) :]] for own in sequences])

    def _output(self, responses: list[list[int]], rows: Sequence[Row], steps: int) -> SamplerOutput:
        kept = [row.kept_tokens for row in rows]
        return SamplerOutput(responses, self._canvas(kept), [len(own) for own in kept], steps)

    def _block_length(self, config: SamplerConfig) -> int | None:
        return self.block_size if config.block_length is None else config.block_length

    def _stop(self, length: int, config: SamplerConfig) -> int:
        """Tokens of a canvas for so many that are kept: block diffusion knows full blocks only."""
        block_length = self._block_length(config)
        if self.block_size is None or block_length is None:
            return length
        return math.ceil(length / block_length) * block_length

    def _seeds(
        self, name: str, seeds: Sequence[int] | None, config: SamplerConfig, count: int
    ) -> list[int]:
        return row_seeds(config.seed, count) if seeds is None else checked_seeds(name, seeds, count)

    def _check(self, config: SamplerConfig) -> None:
        """What `generate` and `infill` ask of the model and the config alike."""
        if self._model.training:
            raise ValueError("model must be in evaluation mode, got it in training mode")
        if self.block_size is not None and config.steps is not None:
            raise ValueError(
                "steps must not be given for a model of block diffusion, whose number of blocks "
                f"depends on the prompt, got {config.steps}: steps_per_block counts those of a "
                "block, as LLaDA2.x does"
            )
        for key in ("suppress_tokens", "begin_suppress_tokens"):
            for token in getattr(config, key) or ():
                if token >= self.vocabulary:
                    raise ValueError(f"{key} must be in [0, {self.vocabulary}), got {token}")
        never = {self.mask_token_id, *(config.suppress_tokens or ())}
        if len(never) == self.vocabulary:
            raise ValueError(
                f"suppress_tokens must leave a token to write, got all {self.vocabulary} but the "
                "mask token"
            )


def _blocks(positions: Sequence[int], block_length: int | None, first: int) -> list[list[int]]:
    """Positions by block, where blocks are counted from position `first`; None is one block."""
    if block_length is None:
        return [list(positions)]
    of_block = itertools.groupby(positions, key=lambda at: (at - first) // block_length)
    return [list(own) for _, own in of_block]
