"""Train the demo's tokenizer: byte-level BPE in which a value is always two tokens."""

from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from memdlm.data.corpus import passages
from memdlm.demo.needles import KEYS, answer, question, statement

VOCABULARY = 4096
PAD, MASK, END = "<pad>", "<mask>", "<eos>"
# Words, digits in pairs (with the space before them, if any), punctuation, white space.
PIECES = r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _training_text() -> Iterator[str]:
    yield from passages("train")
    # Every key, and every pair of digits with and without a space, becomes one token.
    for number in range(100):
        for key in KEYS:
            value = f"{number:02d}{99 - number:02d}"
            yield statement(key, value) + question(key, number % 2 == 0) + answer([value])


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer that ships with the demo.

    Returns:
        transformers.PreTrainedTokenizerFast with 4,096 tokens, among them pad, mask and end of
        sequence; digits are split in pairs, so that a four-digit value is two tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, MASK, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, mask_token=MASK, eos_token=END
    )
