"""One sequence while it is written: which tokens a step looks at, and which of them it writes."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

from memdlm.sampler.confidence import Guess, gumbel
from memdlm.sampler.config import BY_CONFIDENCE, MAX_POST_STEPS, TIME_EPSILON, SamplerConfig
from memdlm.sampler.schedule import even_split, reveal_probabilities, time_grid_split


def row_seeds(seed: int, count: int) -> list[int]:
    """A seed for each row of a batch, a function of the run's seed and the row's number.

    Args:
        seed: of the run, at least 0.
        count: rows.

    Returns:
        Whole numbers below 2^63.
    """
    sequences = (np.random.SeedSequence([seed, row]) for row in range(count))
    return [int(sequence.generate_state(1, np.uint64)[0] >> 1) for sequence in sequences]


class Row:
    """A sequence that goes through its blocks at its own pace, whatever the rest of the batch does.

    Args:
        tokens: its L tokens.
        blocks: for each block the positions that are written, all masked now; none is empty.
        steps: denoising steps of a block; None for one for each token.
        config: how tokens are chosen.
        kept: tokens that are asked for, from the first; those behind only fill the last block.
        block_length: of blocks that share their steps as if all of it were masked; None where they
            share them among the tokens that are.
        mask_token_id: of the mask token.
        end_token_ids: tokens that end the row where no masked one is before; empty where none does.
        seed: of its draws.
        device: where its tokens are drawn.

    Attributes:
        tokens: as they are now.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        blocks: Sequence[Sequence[int]],
        steps: int | None,
        config: SamplerConfig,
        *,
        kept: int,
        block_length: int | None,
        mask_token_id: int,
        end_token_ids: Sequence[int],
        seed: int,
        device: torch.device,
    ) -> None:
        self.tokens = list(tokens)
        self.generator = torch.Generator(device).manual_seed(seed)
        self._written = list(itertools.chain.from_iterable(blocks))
        self._blocks = iter(blocks)
        self._steps = steps
        self._kept = kept
        self._block_length = block_length
        self._config = config
        self._mask_token_id = mask_token_id
        self._end_token_ids = set(end_token_ids)
        self._max_post_steps = 0
        if config.edit_threshold is not None:
            given = config.max_post_steps
            self._max_post_steps = MAX_POST_STEPS if given is None else given
        self._next_block()

    @property
    def kept_tokens(self) -> list[int]:
        """The tokens that are asked for, as they are now."""
        return self.tokens[: self._kept]

    def masked_count(self) -> int:
        """How many of the tokens that are asked for are still masked."""
        return self.kept_tokens.count(self._mask_token_id)

    def next_positions(self) -> list[int]:
        """Begin a step.

        Returns:
            The positions that the model must predict, all in one block; empty when the row is done.
        """
        while self._block:
            masked = [i for i in self._block if self.tokens[i] == self._mask_token_id]
            if not masked:
                self._post_steps += 1
                if self._post_steps > self._max_post_steps:
                    self._finish_block()
                    continue
                return self._block
            if self._config.edit_threshold is not None:
                return self._block
            chosen = self._choose_unseen(masked)
            if chosen:
                return chosen
        return []

    def write(self, positions: Sequence[int], guess: Guess) -> None:
        """End a step.

        Args:
            positions: what `next_positions` returned.
            guess: n tokens and confidences.
        """
        tokens, confidence = guess.tokens.tolist(), guess.confidence
        masked = [i for i, at in enumerate(positions) if self.tokens[at] == self._mask_token_id]
        chosen = self._choose(masked, confidence) if masked else []
        if self._config.edit_threshold is not None:
            sure = (confidence > self._config.edit_threshold).tolist()
            shown = set(range(len(positions))) - set(masked)
            edited = [i for i in shown if sure[i] and tokens[i] != self.tokens[positions[i]]]
            if not masked and not edited:
                self._finish_block()
            chosen = chosen + edited
        for i in chosen:
            self.tokens[positions[i]] = tokens[i]
        # What may still be edited does not end a row before its block is finished.
        if self._config.edit_threshold is None:
            self._stop_at_end()

    def _choose_unseen(self, masked: Sequence[int]) -> list[int]:
        """The masked positions to predict; all of them if the model's confidence chooses."""
        if self._config.remasking in BY_CONFIDENCE:
            return list(masked)
        draws = torch.rand(
            len(masked), dtype=torch.float64, device=self.generator.device, generator=self.generator
        ).tolist()
        if self._config.remasking == "origin":
            chance = self._chances.pop(0)
            return [at for at, draw in zip(masked, draws, strict=True) if draw < chance]
        order = sorted(range(len(masked)), key=draws.__getitem__)
        return [masked[i] for i in sorted(order[: self._due.pop(0)])]

    def _choose(self, masked: Sequence[int], confidence: torch.Tensor) -> list[int]:
        """Which of the predicted positions are revealed, as indices."""
        if self._config.remasking not in BY_CONFIDENCE:
            return list(masked)
        if self._config.remasking_temperature is not None:
            # The largest of confidence / temperature + Gumbel noise: draws without replacement.
            tempered = confidence.double() / self._config.remasking_temperature
            confidence = tempered + gumbel(confidence.shape, self.generator)
        scores = confidence.tolist()
        due = self._due.pop(0) if self._due else 1
        order = sorted(masked, key=lambda i: -scores[i])
        threshold = self._config.threshold
        if threshold is not None:
            due = max(due, sum(scores[i] > threshold for i in masked))
        return order[:due]

    def _next_block(self) -> None:
        self._block = list(next(self._blocks, ()))
        self._post_steps = 0
        if not self._block:
            return
        config, count = self._config, self._block_length or len(self._block)
        steps = self._steps or count
        time_epsilon = TIME_EPSILON if config.time_epsilon is None else config.time_epsilon
        self._chances = reveal_probabilities(steps, time_epsilon)
        if config.min_reveal is not None:
            self._due = [config.min_reveal] * math.ceil(count / config.min_reveal)
        elif config.reveal == "time_grid":
            self._due = time_grid_split(len(self._block), steps, time_epsilon)
        else:
            self._due = even_split(count, steps)

    def _finish_block(self) -> None:
        self._next_block()
        self._stop_at_end()

    def _stop_at_end(self) -> None:
        """Where the row has ended, put the token that ended it in the masked places behind."""
        for at in self._written:
            token = self.tokens[at]
            if token == self._mask_token_id:
                return
            if token in self._end_token_ids:
                for later in self._written:
                    if self.tokens[later] == self._mask_token_id:
                        self.tokens[later] = token
                self._block = []
                return
