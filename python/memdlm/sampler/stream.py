"""A response on the terminal while it is written."""

import itertools
import shutil
import textwrap
from collections.abc import Sequence
from typing import TextIO

from torch import Tensor
from transformers import PreTrainedTokenizerBase

MASK = "░"
DIM_MASK = f"\x1b[2m{MASK}\x1b[22m"
CLEAR_BELOW = "\x1b[J"


class Stream:
    """Shows a canvas of one row after each step: in place on a terminal, else a line for each step.

    Args:
        tokenizer: of the model.
        mask_token_id: of the mask token, shown as a block.
        start: where the response begins.
        out: usually stderr.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int, start: int, out: TextIO
    ) -> None:
        self._tokenizer = tokenizer
        self._mask_token_id = mask_token_id
        self._start = start
        self._out = out
        self._height = 0

    def show(self, step: int, canvas: Tensor) -> None:
        """Show a step, as `on_step` of `Sampler.generate`.

        Args:
            step: its number.
            canvas: [1, L] int64.
        """
        text = self._text(canvas[0, self._start :].tolist())
        if not self._out.isatty():
            print(f"step {step}: {' '.join(text.split())}", file=self._out, flush=True)
            return
        columns, rows = shutil.get_terminal_size()
        lines = [
            line
            for paragraph in text.split("\n")
            # A line of full width would put the cursor on the next by itself.
            for line in textwrap.wrap(paragraph, max(columns - 1, 1)) or [""]
        ][-max(rows - 1, 1) :]
        self._erase()
        drawn = "".join(f"{line}\n" for line in lines).replace(MASK, DIM_MASK)
        print(drawn, end="", file=self._out, flush=True)
        self._height = len(lines)

    def close(self) -> None:
        """Take the last canvas off a terminal: the answer follows on stdout."""
        if self._out.isatty():
            self._erase()
            self._out.flush()
        self._height = 0

    def _erase(self) -> None:
        up = f"\x1b[{self._height}A" if self._height else ""
        print(f"{up}\r{CLEAR_BELOW}", end="", file=self._out)

    def _text(self, tokens: Sequence[int]) -> str:
        parts = []
        for masked, run in itertools.groupby(tokens, key=self._mask_token_id.__eq__):
            own = list(run)
            parts.append(MASK * len(own) if masked else str(self._tokenizer.decode(own)))
        # Tokens may spell control sequences.
        return "".join(c for c in "".join(parts) if c.isprintable() or c == "\n")
