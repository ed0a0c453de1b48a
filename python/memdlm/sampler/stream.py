"""A response on the terminal while it is written."""

import itertools
import shutil
import unicodedata
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
            for line in wrapped(paragraph, columns - 1)
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


def wrapped(text: str, columns: int) -> list[str]:
    """A paragraph as lines of a terminal, broken behind spaces where there are any.

    Replaces `textwrap.wrap`, which counts characters: many of East Asia take two columns.

    Args:
        text: without line ends.
        columns: of a line; a character that is wider has a line of its own.

    Returns:
        At least one line.
    """
    lines, line, behind_space = [], "", 0
    for character in text:
        if line and _columns(line + character) > columns:
            cut = behind_space or len(line)
            lines.append(line[:cut].rstrip(" "))
            line, behind_space = line[cut:], 0
        line += character
        if character == " ":
            behind_space = len(line)
    return [*lines, line]


def _columns(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(map(bool, map(unicodedata.combining, text)))
