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

from memdlm.backbone import Backbone
from memdlm.inference import Checkpoint, token_logits
from memdlm.sampler.confidence import guess
from memdlm.sampler.config import SamplerConfig
from memdlm.sampler.row import Row, row_seeds

# Models of these types attend block by block, in blocks of 32 as published.
BLOCK_CAUSAL_TYPES = ("llada2_moe",)
PUBLISHED_BLOCK_LENGTH = 32

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
    as it would be alone. Put the model in evaluation mode first.

    Args:
        model: as for `Backbone`.
        mask_token_id: of the mask token, which is never written.
        pad_token_id: what fills the canvas behind shorter rows; nothing sees it.
        end_token_ids: the tokens that end a response.
        max_length: most tokens of a prompt and its response; the model's positions if not given.
        block_size: tokens of a block of the block diffusion that the model was trained with; None
            where every token sees every other. LLaDA2.x is always block diffusion, of 32 if not
            given.

    Raises:
        ValueError: as `Backbone`.
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
        if block_size is None and config.model_type in BLOCK_CAUSAL_TYPES:
            block_size = PUBLISHED_BLOCK_LENGTH
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
            seeds: of each row's draws; `row_seeds(config.seed, B)` if not given.
            progress: show a bar of the tokens.
            on_step: called after each step with its number, from 1, and the canvas, [B, L] int64
                on the CPU.

        Returns:
            The responses and the canvas.

        Raises:
            ValueError: no prompt, an empty one, one with a mask token or an unknown token, one that
                leaves too few positions for the response; fewer steps than blocks, or steps that
                do not share evenly among them; a number of seeds that is not that of the prompts.
        """
        config = config or SamplerConfig()
        self._check("prompts", prompts, config, seeds)
        for number, prompt in enumerate(prompts):
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
        block_length = self._block_length(config)
        steps = config.steps_of_block(block_length)
        rows = []
        for prompt, seed in zip(prompts, self._seeds(seeds, config, len(prompts)), strict=True):
            start, stop = len(prompt), len(prompt) + config.max_new_tokens
            first = start if self.block_size is None else 0
            rows.append(
                Row(
                    [*prompt, *[self.mask_token_id] * config.max_new_tokens],
                    _blocks(range(start, stop), block_length, first),
                    steps,
                    config,
                    mask_token_id=self.mask_token_id,
                    end_token_ids=self.end_token_ids if config.stop_at_end else (),
                    seed=seed,
                    device=self.device,
                )
            )
        count = self._denoise(rows, config, progress, on_step)
        responses = []
        for prompt, row in zip(prompts, rows, strict=True):
            response = row.tokens[len(prompt) :]
            end = next((i for i, token in enumerate(response) if token in self.end_token_ids), None)
            responses.append(response[:end])
        return SamplerOutput(responses, self._canvas(rows), [len(r.tokens) for r in rows], count)

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
        its blocks that hold masks, rounded up.

        Args:
            canvases: B lists of token ids, of any lengths.
            config, seeds, progress, on_step: as for `generate`; `max_new_tokens` and `stop_at_end`
                are not read.

        Returns:
            The sequences, filled.

        Raises:
            ValueError: no sequence, an empty one, one with an unknown token or longer than the
                model's positions, or without a mask token; a number of seeds that is not that of
                the sequences.
        """
        config = config or SamplerConfig()
        self._check("canvases", canvases, config, seeds)
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
        for canvas, seed in zip(canvases, self._seeds(seeds, config, len(canvases)), strict=True):
            masked = [i for i, token in enumerate(canvas) if token == self.mask_token_id]
            blocks = _blocks(masked, block_length, 0)
            rows.append(
                Row(
                    canvas,
                    blocks,
                    None if config.steps is None else math.ceil(config.steps / len(blocks)),
                    config,
                    mask_token_id=self.mask_token_id,
                    end_token_ids=(),
                    seed=seed,
                    device=self.device,
                )
            )
        count = self._denoise(rows, config, progress, on_step)
        filled = [row.tokens for row in rows]
        return SamplerOutput(filled, self._canvas(rows), [len(tokens) for tokens in filled], count)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.backbone.head()[0].device

    def _denoise(
        self, rows: Sequence[Row], config: SamplerConfig, progress: bool, on_step: OnStep | None
    ) -> int:
        given = self._canvas(rows) != self.mask_token_id
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
                    on_step(step, self._canvas(rows))
        return step

    def _logits(
        self, rows: Sequence[Row], wanted: list[list[int]], config: SamplerConfig, given: Tensor
    ) -> Tensor:
        """[B, W, V]: those of each row's wanted positions, then of its first token as padding."""
        width = max(map(len, wanted))
        positions = torch.tensor([[*at, *[0] * (width - len(at))] for at in wanted])
        canvas = self._canvas(rows)
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

    def _canvas(self, rows: Sequence[Row]) -> Tensor:
        length = max(len(row.tokens) for row in rows)
        padded = [[*row.tokens, *[self.pad_token_id] * (length - len(row.tokens))] for row in rows]
        return torch.tensor(padded)

    def _block_length(self, config: SamplerConfig) -> int | None:
        return self.block_size if config.block_length is None else config.block_length

    def _seeds(
        self, seeds: Sequence[int] | None, config: SamplerConfig, count: int
    ) -> Sequence[int]:
        return row_seeds(config.seed, count) if seeds is None else seeds

    def _check(
        self,
        name: str,
        sequences: Sequence[Sequence[int]],
        config: SamplerConfig,
        seeds: Sequence[int] | None,
    ) -> None:
        """What `generate` and `infill` ask of their input alike."""
        if len(sequences) == 0:
            raise ValueError(f"{name} must hold at least one list of token ids, got none")
        vocabulary = self.backbone.head()[0].shape[0]
        for number, tokens in enumerate(sequences):
            if len(tokens) == 0:
                raise ValueError(f"{name} must not be empty, got no token in number {number}")
            unknown = next((token for token in tokens if not 0 <= token < vocabulary), None)
            if unknown is not None:
                raise ValueError(
                    f"{name} must hold token ids in [0, {vocabulary}), got {unknown} in number "
                    f"{number}"
                )
        for key in ("suppress_tokens", "begin_suppress_tokens"):
            for token in getattr(config, key) or ():
                if token >= vocabulary:
                    raise ValueError(f"{key} must be in [0, {vocabulary}), got {token}")
        if seeds is not None and len(seeds) != len(sequences):
            raise ValueError(
                f"seeds must be one for each of {len(sequences)} {name}, got {len(seeds)}"
            )


def _blocks(positions: Sequence[int], block_length: int | None, first: int) -> list[list[int]]:
    """Positions by block, where blocks are counted from position `first`; None is one block."""
    if block_length is None:
        return [list(positions)]
    of_block = itertools.groupby(positions, key=lambda at: (at - first) // block_length)
    return [list(own) for _, own in of_block]
