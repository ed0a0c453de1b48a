"""Examples of a task at a length: as much text as fits, and no more."""

import functools
import random
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from memdlm.evaluation.tasks.common_words import draft_common_words
from memdlm.evaluation.tasks.example import Draft, Example
from memdlm.evaluation.tasks.multi_value import draft_multi_value
from memdlm.evaluation.tasks.supporting_facts import draft_supporting_facts
from memdlm.evaluation.tasks.variable_tracking import draft_variable_tracking

_DRAFTS: dict[str, Callable[[random.Random, int], Draft]] = {
    "mv": draft_multi_value,
    "vt": draft_variable_tracking,
    "cwe": draft_common_words,
    "qa1": functools.partial(draft_supporting_facts, supporting=1),
    "qa2": functools.partial(draft_supporting_facts, supporting=2),
    "qa3": functools.partial(draft_supporting_facts, supporting=3),
}
TASKS = tuple(_DRAFTS)
# Room for the answer, in tokens.
ANSWER_TOKENS = {"mv": 64, "vt": 64, "cwe": 64, "qa1": 16, "qa2": 16, "qa3": 16}
_FIRST_SIZE = 32
# A little farther than the guess, to get past the largest size that fits.
_STRIDE = 1.03


def build(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int,
    *,
    answer_tokens: int | None = None,
    chat: bool = False,
) -> list[Example]:
    """Make examples; each is the same for the same task, length, index and seed.

    The prompt is as long as leaves room for the answer: the next word would be too much.

    Args:
        task: "mv", multi-value needles; "vt", variable tracking; "cwe", common words (RULER);
            "qa1", "qa2", "qa3", one to three supporting facts (BABILong).
        tokenizer: the model's.
        length: tokens of prompt and answer together.
        count: how many, at least 1.
        seed: int.
        answer_tokens: room for the answer; None for `ANSWER_TOKENS`.
        chat: ask through the tokenizer's chat template.

    Returns:
        list of Example.

    Raises:
        ValueError: an unknown task; a count below 1; a length that cannot hold the task (the
            message names the least), or that the task's words cannot fill; no chat template.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if chat and tokenizer.chat_template is None:
        raise ValueError("chat must be false for a tokenizer without a chat template, got true")
    room = ANSWER_TOKENS[task] if answer_tokens is None else answer_tokens

    def draft_all(length: int) -> tuple[list[Draft], int]:
        """The drafts, and the tokens that the longest needs without any text around it."""
        keys = [f"{task}/{length}/{index}/{seed}" for index in range(count)]
        drafts = [_DRAFTS[task](random.Random(key), length) for key in keys]
        bare = [encode(tokenizer, d.body(0), d.answer_prefix, chat)[1] for d in drafts]
        return drafts, room + max(map(len, bare))

    drafts, needed = draft_all(length)
    if needed > length:
        # At another length other things are drawn, which may need more.
        least = needed
        while (needed := draft_all(least)[1]) > least:
            least = needed
        raise ValueError(
            f"length must be at least {least} tokens for {task}, {room} of them for the answer, "
            f"got {length}"
        )
    examples = []
    title = f"{task}, {length:,} tokens"
    for index, draft in enumerate(tqdm(drafts, desc=title, leave=False)):
        prompt, ids = _fill(tokenizer, draft, length - room, chat, f"{task} at length {length}")
        examples.append(
            Example(
                task=task,
                length=length,
                index=index,
                prompt=prompt,
                prompt_ids=ids,
                question=draft.question,
                references=draft.references,
                answer="place" if task.startswith("qa") else "all",
            )
        )
    return examples


def encode(
    tokenizer: PreTrainedTokenizerBase, question: str, answer_prefix: str, chat: bool
) -> tuple[str, list[int]]:
    """A prompt and its tokens.

    Args:
        tokenizer: the model's.
        question: what the user says.
        answer_prefix: the beginning of the answer.
        chat: put the chat template around the question.

    Returns:
        The text, and its token ids, behind the token that the tokenizer begins every text with.
    """
    if chat:
        messages = [{"role": "user", "content": question}]
        asked: Any = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        text = asked + answer_prefix
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]
    text = f"{question}\n{answer_prefix}"
    begin = tokenizer.bos_token_id
    start = [begin] if begin is not None and begin in tokenizer("")["input_ids"] else []
    return text, start + tokenizer(text, add_special_tokens=False)["input_ids"]


def _fill(
    tokenizer: PreTrainedTokenizerBase, draft: Draft, budget: int, chat: bool, title: str
) -> tuple[str, list[int]]:
    """The prompt of the largest size that fits, and its tokens; size 0 does."""

    def prompt(size: int) -> tuple[str, list[int]]:
        return encode(tokenizer, draft.body(size), draft.answer_prefix, chat)

    fits, found = 0, prompt(0)
    size = _FIRST_SIZE
    while True:
        size = min(size, draft.most or size)
        tried = prompt(size)
        if len(tried[1]) > budget:
            too_large, tokens = size, len(tried[1])
            break
        if size == draft.most:
            raise ValueError(f"{title} can be filled to {len(tried[1])} tokens only: choose less")
        per_size = max((len(tried[1]) - len(found[1])) / (size - fits), 0.1)
        fits, found = size, tried
        size += int((budget - len(found[1])) / per_size * _STRIDE) + 1
    # Between a size that fits and one that does not, by their token counts.
    halve = False
    while too_large - fits > 1:
        share = (budget - len(found[1])) / (tokens - len(found[1]))
        # Where one end no longer moves, halving brings it near.
        share, halve = (0.5 if halve else share), not halve
        size = min(max(fits + int(share * (too_large - fits)), fits + 1), too_large - 1)
        tried = prompt(size)
        if len(tried[1]) <= budget:
            fits, found = size, tried
        else:
            too_large, tokens = size, len(tried[1])
    return found
