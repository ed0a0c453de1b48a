"""The demo's examples: prompts of real text with needles in it, and questions about them.

After RULER's multi-value needles: Hsieh et al., RULER, arXiv 2404.06654.
"""

import functools
import pathlib
import random
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from memdlm.data.corpus import passages
from memdlm.demo.needles import KEYS, answer, question, statement

BASE_FOLDER = pathlib.Path(__file__).parent / "base"
IGNORE_INDEX = -100
MIN_LENGTH = 96
TOKENS_PER_DISTRACTOR = 64
SEVERAL_VALUES = (2, 3)


@functools.cache
def load_tokenizer(folder: pathlib.Path = BASE_FOLDER) -> PreTrainedTokenizerBase:
    """The tokenizer that ships with the demo.

    Args:
        folder: path of a folder that holds tokenizer.json.

    Returns:
        transformers tokenizer with 4,096 tokens.
    """
    return AutoTokenizer.from_pretrained(folder)


def check_demo_tokenizer(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Whether the demo's examples, which are token ids, mean anything to a model.

    Args:
        tokenizer: the model's.
        model: its name, for the message.

    Raises:
        ValueError: another tokenizer than the demo's.
    """
    if tokenizer.get_vocab() != load_tokenizer().get_vocab():
        raise ValueError(
            f"dataset must be given for {model}: its tokenizer is not the demo's, whose examples "
            "are the default"
        )


class DemoText:
    """The tokens of one split, and the windows and sentences that examples are made of.

    Args:
        split: "train" or "validation".
        tokenizer: the demo's tokenizer.
    """

    def __init__(self, split: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.stream: list[int] = []
        for ids in tokenizer(passages(split)).input_ids:
            self.stream += [*ids, tokenizer.eos_token_id]
        vocabulary = tokenizer.get_vocab().items()
        special = set(tokenizer.all_special_ids)
        self.ordinary = [i for i in range(len(tokenizer)) if i not in special]
        # "Ċ" is a newline in the byte-level alphabet.
        self.sentence_ends = {i for token, i in vocabulary if token.endswith(".") or "Ċ" in token}

    def window(self, rng: random.Random, length: int) -> list[int]:
        """A run of text.

        Args:
            rng: random.Random.
            length: number of tokens.

        Returns:
            list of `length` token ids.
        """
        start = rng.randrange(len(self.stream) - length)
        return self.stream[start : start + length]

    def random_tokens(self, rng: random.Random, length: int) -> list[int]:
        """Tokens drawn evenly from the vocabulary, without the special ones.

        Args:
            rng: random.Random.
            length: number of tokens.

        Returns:
            list of `length` token ids.
        """
        return rng.choices(self.ordinary, k=length)

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019 - lives as long as the process
    def encode(self, sentence: str) -> tuple[int, ...]:
        """The tokens of a sentence.

        Args:
            sentence: str.

        Returns:
            tuple of token ids.
        """
        return tuple(self.tokenizer(sentence).input_ids)

    def haystack(
        self, rng: random.Random, sentences: Sequence[Sequence[int]], length: int
    ) -> list[int]:
        """Text with sentences placed in it, in their order, where a sentence or a line ends.

        Args:
            rng: random.Random.
            sentences: list of token sequences, which must fit in `length`.
            length: number of tokens, sentences included.

        Returns:
            list of `length` token ids.
        """
        text = self.window(rng, length - sum(map(len, sentences)))
        ends = [i + 1 for i, token in enumerate(text) if token in self.sentence_ends]
        places = sorted(rng.choices(ends or range(len(text) + 1), k=len(sentences)))
        tokens: list[int] = []
        done = 0
        for place, sentence in zip(places, sentences, strict=True):
            tokens += [*text[done:place], *sentence]
            done = place
        return tokens + text[done:]


@functools.cache
def load_text(split: str) -> DemoText:
    """The text of one split under the shipped tokenizer, tokenized once in a process.

    Args:
        split: "train" or "validation".

    Returns:
        DemoText.
    """
    return DemoText(split, load_tokenizer())


def random_value(rng: random.Random) -> str:
    """A value: four digits, which are two tokens.

    Args:
        rng: random.Random.

    Returns:
        str.
    """
    return str(rng.randint(1000, 9999))


def _labelled(prompt: Sequence[int], response: Sequence[int]) -> dict[str, Any]:
    return {
        "input_ids": [*prompt, *response],
        "labels": [IGNORE_INDEX] * len(prompt) + list(response),
    }


def recall_example(text: DemoText, rng: random.Random, length: int, values: int) -> dict[str, Any]:
    """A prompt that hides the values of a key among other keys', and asks for them.

    Args:
        text: DemoText.
        rng: random.Random.
        length: number of tokens of prompt and response, at least 96.
        values: how many values the key has; one distractor key stands beside them per 64 tokens.

    Returns:
        dict with `input_ids`, `labels` (-100 on the prompt), `kind` "recall", `key`, `values` (list
        of str, in the order of the text) and `value_positions` (the index in `input_ids` of each
        value's first token of two).
    """
    key, *others = rng.sample(KEYS, 1 + length // TOKENS_PER_DISTRACTOR)
    answers = [random_value(rng) for _ in range(values)]
    needles = [(key, value) for value in answers] + [(other, random_value(rng)) for other in others]
    rng.shuffle(needles)
    answers = [value for name, value in needles if name == key]
    sentences = [text.encode(statement(*needle)) for needle in needles]
    asked = text.encode(question(key, values > 1))
    response = [*text.encode(answer(answers)), text.tokenizer.eos_token_id]
    prompt = text.haystack(rng, sentences, length - len(asked) - len(response)) + list(asked)
    example = _labelled(prompt, response)
    # " 48 21 , 90 34 and 17 55 .": two tokens of value, then one of punctuation.
    positions = [len(prompt) + 3 * i for i in range(values)]
    return {
        **example,
        "kind": "recall",
        "key": key,
        "values": answers,
        "value_positions": positions,
    }


def continuation_example(text: DemoText, rng: random.Random, length: int) -> dict[str, Any]:
    """A run of text whose last quarter is the response.

    Args:
        text: DemoText.
        rng: random.Random.
        length: number of tokens.

    Returns:
        dict with `input_ids`, `labels` (-100 on the prompt) and `kind` "continuation".
    """
    tokens = text.window(rng, length)
    prompt_length = length - length // 4
    return {
        **_labelled(tokens[:prompt_length], tokens[prompt_length:]),
        "kind": "continuation",
    }


def build_examples(
    split: str,
    n: int,
    length: int,
    seed: int,
    *,
    recall_share: float = 0.75,
    several_share: float = 0.5,
) -> list[dict[str, Any]]:
    """The demo's examples, the same for the same arguments.

    Args:
        split: "train" or "validation"; their texts do not overlap.
        n: number of examples.
        length: number of tokens of each, at least 96.
        seed: int.
        recall_share: share of recall examples in [0, 1]; the rest continue the text.
        several_share: share of recall examples whose key has two or three values, in [0, 1].

    Returns:
        list of dict: see `recall_example` and `continuation_example`.

    Raises:
        ValueError: `n`, `length` or a share is out of range.
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    if length < MIN_LENGTH:
        raise ValueError(f"length must be at least {MIN_LENGTH} tokens, got {length}")
    for name, share in (("recall_share", recall_share), ("several_share", several_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
    text = load_text(split)
    examples: list[dict[str, Any]] = []
    for index in range(n):
        rng = random.Random(f"{split}/{seed}/{length}/{index}")
        if rng.random() >= recall_share:
            examples.append(continuation_example(text, rng, length))
        else:
            values = rng.choice(SEVERAL_VALUES) if rng.random() < several_share else 1
            examples.append(recall_example(text, rng, length, values))
    return examples
