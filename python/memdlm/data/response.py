"""From prompt and response to tokens: the prompt stays visible, the response may be masked.

Prompt and response are tokenized apart, as they are at inference, and joined. The response ends
with the end-of-sequence token, so that the model learns where to stop.
"""

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from memdlm.data.collator import IGNORE_INDEX


class Tokens(NamedTuple):
    """Token ids, and the labels: the ids again where a token may be masked, else -100."""

    input_ids: list[int]
    labels: list[int]


def saved_tokens(tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]) -> Tokens:
    """`input_ids` and `labels` as they are; the tokenizer is not asked."""
    return Tokens(list(example["input_ids"]), list(example["labels"]))


def text_tokens(tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]) -> Tokens:
    """A `text`: every token may be masked.

    Raises:
        ValueError: not text.
    """
    return _join(tokenizer, _start(tokenizer), _text(example, "text"))


def pair_tokens(tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]) -> Tokens:
    """A `prompt` and a `response`, both as they are: no template is put around them.

    Raises:
        ValueError: not text.
    """
    prompt = _start(tokenizer) + _ids(tokenizer, _text(example, "prompt"))
    return _join(tokenizer, prompt, _text(example, "response"))


def chat_tokens(tokenizer: PreTrainedTokenizerBase, example: dict[str, Any]) -> Tokens:
    """A chat, `messages` of `role` and `content`: the last message is the response.

    The prompt is the messages before it, through the tokenizer's chat template with its generation
    prompt; the response is what the template puts after that for the whole chat. A tokenizer
    without a template gets lines of `role: content`, and `assistant: ` before the response.

    Raises:
        ValueError: not a chat that ends with the assistant, or a template that writes the prompt
            otherwise once the response follows.
    """
    messages = example["messages"]
    if not messages or messages[-1].get("role") != "assistant":
        raise ValueError("messages must end with one whose role is 'assistant'")
    for message in messages:
        _text(message, "content")
    if tokenizer.chat_template is None:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages[:-1]]
        prompt = _start(tokenizer) + _ids(tokenizer, "".join(lines) + "assistant: ")
        return _join(tokenizer, prompt, messages[-1]["content"])
    whole: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    before: Any = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    if not whole.startswith(before):
        raise ValueError(
            "the chat template does not begin the whole chat with its prompt; use the columns "
            "prompt and response"
        )
    return _join(tokenizer, _ids(tokenizer, before), whole[len(before) :])


def _text(example: dict[str, Any], key: str) -> str:
    value = example.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, got {value!r}")
    return value


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, where the tokenizer puts one by itself."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and begin in tokenizer("")["input_ids"] else []


def _join(tokenizer: PreTrainedTokenizerBase, prompt: list[int], response: str) -> Tokens:
    ids = _ids(tokenizer, response)
    end = tokenizer.eos_token_id
    if end is not None and end not in ids:
        ids = [*ids, end]
    return Tokens(prompt + ids, [IGNORE_INDEX] * len(prompt) + ids)
