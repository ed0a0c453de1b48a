"""How a masked diffusion model writes: the options of the sampler."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

TIME_EPSILON = 1e-3
MAX_POST_STEPS = 16
# These choose by how sure the model is; the others do not look at its logits.
BY_CONFIDENCE = ("low_confidence", "entropy", "margin")


@dataclass(frozen=True)
class SamplerConfig:
    """The options of iterative denoising.

    Attributes:
        max_new_tokens: length of the response, in tokens, at least 1. `infill` does not read it.
        steps: denoising steps in all (LLaDA, Dream), a multiple of the number of blocks; every
            block gets the same share. One for each token if not given. Steps in which no token is
            due are left out. Not for a model of block diffusion, whose blocks depend on the prompt.
        steps_per_block: instead, the steps of each block, at least 1. What LLaDA2.x calls steps is
            this.
        min_reveal: instead, the least tokens that a step reveals, at least 1 (LLaDA2.1's
            num_to_transfer).
        block_length: tokens of a block, at least 1; blocks are filled one after the other. If not
            given, that of the model's block diffusion, or else one block for the whole response. A
            model of block diffusion attends block by block: its blocks are counted from the first
            token of the prompt, share their steps as blocks of full length, and the last is
            filled to its end and then cut.
        remasking: which masked tokens a step reveals: those whose drawn token is the most probable
            ("low_confidence", LLaDA; Dream's maskgit_plus), those with the lowest "entropy", or the
            largest "margin" between the two most probable tokens (Dream's topk_margin), a "random"
            choice, or "origin": each with probability 1 - s/t between the times t and s of Dream's
            grid, without a fixed number.
        reveal: how many tokens a step reveals: an "even" share of its block (LLaDA), or on Dream's
            "time_grid" floor(n (1 - s/t)) of the n that are masked, between its times t and s, and
            all of them in the last step.
        temperature: tokens are drawn from softmax(logits / temperature), in float64; 0 takes the
            most probable.
        top_k: draw among the so many most probable tokens, at least 1.
        top_p: draw among the most probable tokens, as few as have this probability together (after
            `top_k`), in (0, 1]; 1 keeps them all.
        tempered_confidence: take confidences from the distribution that tokens are drawn from
            (Dream, LLaDA2.x), not from softmax(logits) (LLaDA).
        remasking_temperature: draw the tokens to reveal without replacement, with probabilities
            softmax(confidence / remasking_temperature) (Dream's alg_temp), above 0; if not given,
            the most confident ones.
        cfg_scale: classifier-free guidance, at least 0: logits are u + (1 + cfg_scale) (c - u),
            where u is made with the prompt masked. A second forward in every step; both read the
            memory, if one is read.
        suppress_tokens: ids of tokens that are never written. The mask token never is.
        begin_suppress_tokens: ids of tokens whose confidence counts as 0, so that they are revealed
            last (LLaDA does so with its end tokens in long responses).
        threshold: parallel decoding (Fast-dLLM, LLaDA2.x): reveal every token with a confidence
            above this, in (0, 1), and at least as many as the step would have revealed.
        edit_threshold: token editing (LLaDA2.1), in [0, 1): a revealed token of the current block
            changes where the model draws another one with a confidence above this.
        max_post_steps: steps that a block may be edited for after its last mask, at least 0; it
            ends earlier where nothing changes. 16 if not given.
        time_epsilon: where the time grid of "origin" and "time_grid" ends, in (0, 1); 0.001 if not
            given.
        stop_at_end: a row is done when no mask stands before its first end token (with edits: once
            that block is finished); masks behind become that token. `infill` does not read it.
        seed: of all draws, at least 0.

    Raises:
        ValueError: an option outside its range, or one that nothing would read.
    """

    max_new_tokens: int = 128
    steps: int | None = None
    steps_per_block: int | None = None
    min_reveal: int | None = None
    block_length: int | None = None
    remasking: Literal["low_confidence", "entropy", "margin", "random", "origin"] = "low_confidence"
    reveal: Literal["even", "time_grid"] = "even"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    tempered_confidence: bool = False
    remasking_temperature: float | None = None
    cfg_scale: float = 0.0
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    threshold: float | None = None
    edit_threshold: float | None = None
    max_post_steps: int | None = None
    time_epsilon: float | None = None
    stop_at_end: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("remasking", "reveal"):
            choices = get_args(hints[name])
            known = ", ".join(repr(choice) for choice in choices)
            self._check(name, f"one of {known}", choices.__contains__)
        counts = "max_new_tokens steps steps_per_block min_reveal block_length top_k"
        for name in counts.split():
            self._check(name, "a whole number, at least 1", lambda value: _is_whole(value, 1))
        for name in ("max_post_steps", "seed"):
            self._check(name, "a whole number, at least 0", lambda value: _is_whole(value, 0))
        for name in ("temperature", "cfg_scale"):
            self._check(name, "a number, at least 0", lambda value: _is_number(value, 0))
        self._check(
            "remasking_temperature", "above 0", lambda value: _is_number(value, 0) and value > 0
        )
        for name in ("threshold", "time_epsilon"):
            self._check(name, "in (0, 1)", lambda value: _is_number(value, 0) and 0 < value < 1)
        self._check("top_p", "in (0, 1]", lambda value: _is_number(value, 0) and 0 < value <= 1)
        self._check("edit_threshold", "in [0, 1)", lambda value: _is_number(value, 0) and value < 1)
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            self._check(
                name,
                "a list of token ids, not empty",
                _is_list_of_ids,
            )
        given = [name for name in ("steps", "steps_per_block", "min_reveal") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(
                f"{given[0]} and {given[1]} must not both be given: each says how many tokens a "
                "step reveals"
            )
        self._refuse_unread()

    def _check(self, name: str, must: str, ok: Callable[[Any], bool]) -> None:
        value = getattr(self, name)
        optional = value is None and self._default(name) is None
        if not optional and not ok(value):
            raise ValueError(f"{name} must be {must}, got {value!r}")

    def _refuse_unread(self) -> None:
        by_confidence = self.remasking in BY_CONFIDENCE
        unread = [
            (self.temperature == 0, "top_k top_p tempered_confidence", "temperature is 0"),
            (
                not by_confidence,
                "tempered_confidence remasking_temperature",
                f"remasking {self.remasking!r} has no confidence",
            ),
            (
                self.remasking != "low_confidence",
                "threshold begin_suppress_tokens",
                "remasking is not 'low_confidence'",
            ),
            (
                self.remasking != "origin" and self.reveal != "time_grid",
                "time_epsilon",
                "remasking is not 'origin', nor reveal 'time_grid'",
            ),
            (
                self.remasking == "origin",
                "reveal min_reveal",
                "remasking 'origin' reveals no fixed number",
            ),
            (self.reveal == "time_grid", "min_reveal", "reveal is 'time_grid'"),
            (
                self.threshold is not None,
                "remasking_temperature reveal",
                "threshold chooses what is revealed",
            ),
            (self.threshold is None, "edit_threshold", "threshold is not given"),
            (self.edit_threshold is None, "max_post_steps", "edit_threshold is not given"),
        ]
        for condition, names, reason in unread:
            for name in names.split():
                if condition and getattr(self, name) != self._default(name):
                    raise ValueError(f"{name} would not be read: {reason}")

    def _default(self, name: str) -> Any:
        return next(field.default for field in dataclasses.fields(self) if field.name == name)

    def steps_of_block(self, block_length: int | None) -> int | None:
        """The denoising steps of each block of a response.

        Args:
            block_length: tokens of a block, or None for one block.

        Returns:
            int, or None where neither `steps` nor `steps_per_block` was given.

        Raises:
            ValueError: `steps` is not a multiple of the number of blocks.
        """
        if self.steps is None:
            return self.steps_per_block
        blocks = math.ceil(self.max_new_tokens / (block_length or self.max_new_tokens))
        if self.steps < blocks or self.steps % blocks:
            raise ValueError(
                f"steps must be a multiple of the number of blocks, {blocks} (for "
                f"{self.max_new_tokens} tokens in blocks of {block_length}), got {self.steps}"
            )
        return self.steps // blocks


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_list_of_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_whole(i, 0) for i in value) and value != []


def _is_number(value: Any, least: float) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value) and value >= least
