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


def bias(words: Sequence[str]) -> None:
    """Measure the exposure bias of checkpoints, with the memory off and on, and draw it."""
    from memdlm.bias import BiasOptions, run_bias

    options = _read("bias", BiasOptions, words)
    if options is not None:
        print(run_bias(options))


def meta_bias(words: Sequence[str]) -> None:
    """Compare the first-order outer gradient with the exact one, at checkpoints of a run."""
    from memdlm.meta_bias.options import MetaBiasOptions

    options = _read("meta-bias", MetaBiasOptions, words)
    if options is None:
        return

    from memdlm.meta_bias.run import run_meta_bias

    print(run_meta_bias(options))


def probe(words: Sequence[str]) -> None:
    """Look into the memory of prompts: norms and spectra, whose loss fell, what it recalls."""
    from memdlm.probe.options import ProbeOptions
    from memdlm.probe.run import run_probe

    options = _read("probe", ProbeOptions, words)
    if options is not None:
        print(run_probe(options))


def ablate(words: Sequence[str]) -> None:
    """Train and measure a grid of options: `memdlm ablate grid.yaml`, with a table for each."""
    from memdlm.ablation.grid import Grid, read_grid
    from memdlm.key_values import read_command_line

    if not words or any(word in HELP for word in words):
        print("\n".join(_help_of("ablate GRID.yaml", Grid)))
        return
    if words[0].startswith("--"):
        raise ValueError(f"the grid file must come first, got {words[0]!r}")
    hints = get_type_hints(Grid)
    grid = read_grid(words[0], read_command_line(words[1:], hints))

    from memdlm.ablation.run import run_grid

    print(run_grid(grid))


def evaluate(words: Sequence[str]) -> None:
    """Ask a model long-context questions, before training and after, memory off and on."""
    from memdlm.evaluation.options import EvalOptions, sampler_hints
    from memdlm.key_values import read_command_line, suggest, typed

    own, others = get_type_hints(EvalOptions), sampler_hints()
    if any(word in HELP for word in words):
        names = textwrap.wrap(f"Options of the sampler: {', '.join(sorted(others))}.", 100)
        print("\n".join([*_help_of("eval", EvalOptions), "", *names]))
        return
    known = others | own
    given = read_command_line(words, known)
    for key in given:
        if key not in known:
            raise ValueError(f"unknown key {key!r}{suggest(key, known)}")
    values = {key: typed(key, value, known[key]) for key, value in given.items()}
    sampler = {key: values.pop(key) for key in given if key in others}
    options = EvalOptions(**values | {"sampler": values.get("sampler", {}) | sampler})

    from memdlm.evaluation.run import run_eval

    print(run_eval(options))


def generate(words: Sequence[str]) -> None:
    """Write responses to prompts, with a memory of the prompts or without."""
    from memdlm.key_values import read_command_line, suggest, typed
    from memdlm.sampler import SamplerConfig, sampler_config
    from memdlm.sampler.aliases import ALIASES
    from memdlm.sampler.command import GenerateOptions, run_generate

    if any(word in HELP for word in words):
        print("\n".join([*_help_of("generate", GenerateOptions), *_sampler_help()]))
        return
    own, sampling = get_type_hints(GenerateOptions), get_type_hints(SamplerConfig)
    sampling |= {name: sampling[ours] for name, ours in ALIASES.items()}
    sampling["alg"] = str
    given = read_command_line(words, own | sampling)
    for key in given:
        if key not in own | sampling:
            raise ValueError(f"unknown key {key!r}{suggest(key, own | sampling)}")
    if not given.get("model"):
        raise ValueError("model must be given")
    values = {key: typed(key, value, (own | sampling)[key]) for key, value in given.items()}
    options = GenerateOptions(**{key: value for key, value in values.items() if key in own})
    config = sampler_config({key: value for key, value in values.items() if key in sampling})
    run_generate(options, config)


def _sampler_help() -> list[str]:
    """The help of a sampler's options, with their other names."""
    from memdlm.key_values import describe
    from memdlm.sampler import SamplerConfig
    from memdlm.sampler.aliases import ALIASES

    hints, fields = get_type_hints(SamplerConfig), dataclasses.fields(SamplerConfig)
    defaults = {field.name: f"default {_yaml(_default(field))}" for field in fields}
    lines = ["", "Sampling"]
    for name, meaning in _meanings(SamplerConfig).items():
        lines += _entry(name, describe(hints[name]), defaults[name], meaning)
    lines += ["", "Other names of these"]
    return lines + [f"  --{name}: {ours}" for name, ours in ALIASES.items()]


def _read(command: str, kind: type[Any], words: Sequence[str]) -> Any:
    """The options of a command, a dataclass; None where help was asked for, which it prints."""
    from memdlm.key_values import read_command_line, suggest, typed

    hints = get_type_hints(kind)
    if any(word in HELP for word in words):
        print("\n".join(_help_of(command, kind)))
        return None
    required = [field.name for field in dataclasses.fields(kind) if _is_required(field)]
    given = read_command_line(words, hints)
    for key in given:
        if key not in hints:
            raise ValueError(f"unknown key {key!r}{suggest(key, hints)}")
    for key in required:
        if not given.get(key):
            raise ValueError(f"{key} must be given")
    return kind(**{key: typed(key, value, hints[key]) for key, value in given.items()})


def _help_of(command: str, kind: type[Any]) -> list[str]:
    """The help of a command whose options are a dataclass."""
    from memdlm.key_values import describe

    hints = get_type_hints(kind)
    lines = [f"usage: memdlm {command} [--key value ...]", ""]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, meaning in _meanings(kind).items():
        field = fields[name]
        default = "required" if _is_required(field) else f"default {_yaml(_default(field))}"
        lines += _entry(name, describe(hints[name]), default, meaning)
    return lines


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return _default(field) is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


# A command is a function of the words after its name, and a line here.
COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "ablate": ablate,
    "bias": bias,
    "convert": convert,
    "demo": demo,
    "env": env,
    "eval": evaluate,
    "generate": generate,
    "meta-bias": meta_bias,
    "plan": plan,
    "probe": probe,
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
    lines = [f"  {name:<9} {inspect.getdoc(command)}" for name, command in COMMANDS.items()]
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
