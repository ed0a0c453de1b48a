"""Values of options: from YAML text and the command line to the type that an option has."""

import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.2's rules for plain words: `no` is a word, and 1e-4 a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: str) -> dict[str, Any]:
    """The keys of a YAML file.

    Args:
        path: a file that holds one flat mapping.

    Returns:
        Key to value.

    Raises:
        ValueError: no such file, or not YAML, or not a mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config must be a readable YAML file, got {path}: {error}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config {path} is not valid YAML: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"config {path} must hold lines of the form `key: value`")
    return content


def read_command_line(words: Sequence[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a command line.

    Args:
        words: `--key value`, `--key=value`, or `--key` alone for true.
        hints: the keys there are, to their types.

    Returns:
        Key to value, of its type where the text can be read so.

    Raises:
        ValueError: a word that belongs to no key.
    """
    values: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"expected --key value, got {word!r}")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            alone = not rest or rest[0].startswith("--")
            if alone and key in hints and _is_text(hints[key]):
                raise ValueError(f"{key} needs a value: --{key} TEXT, or --{key}=TEXT")
            text = "true" if alone else rest.pop(0)
        values[key] = _from_text(key, text, hints[key]) if key in hints else text
    return values


def _from_text(key: str, text: str, hint: Any) -> Any:
    """YAML's reading of the text if that has the type of the key, else the text itself.

    What is text stays as it is, quotes, comment signs and blanks too, but for the word null where
    there may be none.
    """
    if _is_text(hint):
        optional = type(None) in get_args(hint)
        return None if optional and text == "null" else text
    try:
        return typed(key, yaml.load(text, Loader=_Loader), hint)
    except (ValueError, yaml.YAMLError):
        return text


def _is_text(hint: Any) -> bool:
    """Whether a key takes text, or null, and nothing else."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return str in kinds and set(kinds) <= {str, type(None)}


def typed(key: str, value: Any, hint: Any) -> Any:
    """The value, if it has the type that the key asks for.

    Args:
        key: for the message.
        value: what YAML made of it.
        hint: a type, `Literal` or union of them.

    Returns:
        The value; a whole number becomes a float where one is asked for.

    Raises:
        ValueError: another type.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if _fits(value, kind):
            whole = kind is float and int not in kinds
            return float(value) if whole else value
    raise ValueError(f"{key} must be {describe(hint)}, got {value!r}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if kind is list or get_origin(kind) is list:
        inner = get_args(kind)
        return isinstance(value, list) and all(_fits(v, k) for v in value for k in inner)
    if kind is dict or get_origin(kind) is dict:
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


_WORDS = {
    bool: "true or false",
    dict: "a mapping",
    float: "a number",
    int: "a whole number",
    str: "text",
    type(None): "null",
}


def describe(hint: Any) -> str:
    """A type in words, for messages and help."""
    if get_origin(hint) in (Union, types.UnionType):
        # An enumeration stands beside `str`, which is how it is written.
        kinds = [kind for kind in get_args(hint) if kind in _WORDS or get_origin(kind)]
        return " or ".join(describe(kind) for kind in kinds)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) is list:
        return "a list [a, b]"
    return _WORDS.get(get_origin(hint) or hint, str(hint))


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the closest known ones, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
