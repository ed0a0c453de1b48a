"""The command line: `memdlm COMMAND --key value`. A mistake is one line on stderr and exit 2."""

import dataclasses
import inspect
import json
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

HELP = ("-h", "--help")


def train(words: Sequence[str]) -> None:
    """Train a masked diffusion language model, with the memory or without."""
    # Imported late: `memdlm --help` answers at once.
    from memdlm.key_values import read_command_line, read_yaml
    from memdlm.options import key_hints, make_run

    if any(word in HELP for word in words):
        print(train_help())
        return
    hints = key_hints()
    given = read_command_line(words, hints | {"config": str})
    config = given.pop("config", None)
    run = make_run((read_yaml(config) if config else {}) | given)

    from memdlm.training import train as train_run

    metrics = train_run(run)
    if metrics:
        print(json.dumps(metrics, indent=2))


def demo(words: Sequence[str]) -> None:
    """Train MDLM and MemDLM side by side on real English, and write a report."""
    from memdlm.demo.options import DemoOptions

    options = _read("demo", DemoOptions, words)
    if options is None:
        return

    from memdlm.demo.run import run_demo

    run_demo(options)


def convert(words: Sequence[str]) -> None:
    """Make a causal language model a bidirectional one with a mask token."""
    from memdlm.convert import ConvertOptions
    from memdlm.convert import convert as convert_model

    options = _read("convert", ConvertOptions, words)
    if options is not None:
        print(convert_model(options))


def env(words: Sequence[str]) -> None:
    """Say what is installed, what was built, and which backend each op takes, and why."""
    from memdlm.environment import describe_environment

    if any(word in HELP for word in words):
        print(f"usage: memdlm env\n\n{inspect.getdoc(env)}")
        return
    if words:
        raise ValueError(f"memdlm env takes no options, got {' '.join(words)!r}")
    print(describe_environment())


def plan(words: Sequence[str]) -> None:
    """Estimate what a run costs, in time and memory, and what would make it cheaper."""
    from memdlm.cost.options import PlanOptions

    short = {"--batch": "--batch_size"}
    heads = (word.partition("=") for word in words)
    full = [short.get(head, head) + equals + rest for head, equals, rest in heads]
    options = _read("plan", PlanOptions, full)
    if options is None:
        return

    from memdlm.cost.plan import make_plan
    from memdlm.cost.text import describe_plan

    print(describe_plan(make_plan(options)))


def _read(command: str, kind: type[Any], words: Sequence[str]) -> Any:
    """The options of a command, a dataclass; None where help was asked for, which it prints."""
    from memdlm.key_values import describe, read_command_line, suggest, typed

    hints = get_type_hints(kind)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    required = [name for name, default in defaults.items() if default is dataclasses.MISSING]
    if any(word in HELP for word in words):
        lines = [f"usage: memdlm {command} [--key value ...]", ""]
        for name, meaning in _meanings(kind).items():
            default = "required" if name in required else f"default {_yaml(defaults[name])}"
            lines += _entry(name, describe(hints[name]), default, meaning)
        print("\n".join(lines))
        return None
    given = read_command_line(words, hints)
    for key in given:
        if key not in hints:
            raise ValueError(f"unknown key {key!r}{suggest(key, hints)}")
    for key in required:
        if not given.get(key):
            raise ValueError(f"{key} must be given")
    return kind(**{key: typed(key, value, hints[key]) for key, value in given.items()})


# A command is a function of the words after its name, and a line here.
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "convert": convert,
    "demo": demo,
    "env": env,
    "plan": plan,
    "train": train,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        words: after the program's name; None for the process's own.

    Returns:
        0, or 2 after bad input, which is told on stderr.
    """
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in HELP:
        print(_commands_help())
        return 0 if words else 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        if words[0] not in COMMANDS:
            raise ValueError(f"command must be one of {', '.join(COMMANDS)}, got {words[0]!r}")
        COMMANDS[words[0]](words[1:])
    except ValueError as error:
        message = " ".join(str(error).split())
        print(f"memdlm: error: {message}", file=sys.stderr)
        return 2
    return 0


def _commands_help() -> str:
    lines = [f"  {name:<8} {inspect.getdoc(command)}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: memdlm COMMAND ...", "", *lines, "", "memdlm COMMAND --help tells its options."]
    )


def train_help() -> str:
    """Every key of `memdlm train`, with its type, default and meaning."""
    from transformers import TrainingArguments

    from memdlm.config import DiffusionConfig, MemoryConfig
    from memdlm.key_values import describe
    from memdlm.options import RunOptions, key_defaults, key_hints

    hints, defaults = key_hints(), key_defaults()
    sections: list[tuple[str, dict[str, str]]] = [
        ("Model, data and outer adapter", _meanings(RunOptions)),
        ("Noise and outer loss", _meanings(DiffusionConfig)),
        ("Memory (objective memdlm)", _meanings(MemoryConfig)),
    ]
    own = set().union(*(meanings for _, meanings in sections))
    arguments = {
        field.name: str(field.metadata.get("help", ""))
        for field in dataclasses.fields(TrainingArguments)
        if field.name in hints and field.name not in own
    }
    sections.append(("The Trainer (transformers.TrainingArguments)", arguments))
    lines = [
        "usage: memdlm train [--config run.yaml] [--key value ...]",
        "",
        "Keys of the YAML file and of the command line are the same; the command line wins.",
    ]
    for title, meanings in sections:
        lines += ["", title]
        for name, meaning in meanings.items():
            default = f"default {_yaml(defaults[name])}" if name in defaults else "required"
            lines += _entry(name, describe(hints[name]), default, meaning)
    return "\n".join(lines)


def _entry(name: str, kind: str, default: str, meaning: str) -> list[str]:
    indent = " " * 6
    text = textwrap.wrap(meaning, 96, initial_indent=indent, subsequent_indent=indent)
    return [f"  --{name}: {kind} ({default})", *text]


def _meanings(kind: type[Any]) -> dict[str, str]:
    """Field name to meaning, from the `Attributes:` of a config class."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.split(r"^    (\w+): ", section, flags=re.MULTILINE)
    meanings = zip(entries[1::2], entries[2::2], strict=True)
    return {name: " ".join(text.split()) for name, text in meanings}


def _yaml(value: Any) -> str:
    plain = getattr(value, "value", value)
    return plain if isinstance(plain, str) and plain else json.dumps(plain)


if __name__ == "__main__":
    sys.exit(main())
