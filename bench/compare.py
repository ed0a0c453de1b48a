"""This tree's training step beside another revision's: `python -m bench.compare HEAD~3 --k 2`.

The other revision is built in a temporary folder (some two minutes). Then two processes run this
tree's benchmark, each on its own `memdlm` and `memdlm_kernels`, and take turns with every round,
so that a slow spell of the machine meets both.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from tqdm import tqdm

from bench.cases import StepCase
from bench.step import add_case_options, case_of
from bench.timing import percentiles

_ROOT = Path(__file__).resolve().parent.parent
_WORKER = Path(__file__).with_name("compare_worker.py")
_THIS = [_ROOT, _ROOT / "python"]


@dataclass(frozen=True)
class Comparison:
    """What both trees took for one variant.

    Attributes:
        this_ms, other_ms: times of one step, one for each round.
        this_loss, other_loss: of the first step; they differ where the numbers changed.
    """

    this_ms: list[float]
    other_ms: list[float]
    this_loss: float
    other_loss: float

    @property
    def ratios(self) -> list[float]:
        """This over other, round by round."""
        return [ours / theirs for ours, theirs in zip(self.this_ms, self.other_ms, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    """Build the other revision, compare, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", metavar="REV", help="what git knows: a commit, tag or branch")
    add_case_options(parser)
    parser.add_argument("--k", type=int, nargs="+", default=[2], help="inner steps")
    parser.add_argument("--prompt_kv", action="store_true", help="also memdlm_prompt_kv")
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds")
    parser.add_argument("--batches", type=int, default=1, help="batches in one round")
    options = parser.parse_args(arguments)
    case = case_of(options)
    try:
        found = compare(
            options.revision,
            case,
            inner_steps=options.k,
            repeats=options.repeats,
            batches=options.batches,
            device=options.device,
            dtype=options.dtype,
            prompt_kv=options.prompt_kv,
        )
    except ValueError as error:
        parser.error(str(error))
    print_table(case, options.revision, found)


def compare(
    revision: str,
    case: StepCase,
    *,
    inner_steps: Sequence[int],
    repeats: int,
    batches: int,
    device: str,
    dtype: str,
    prompt_kv: bool = False,
    build: Callable[[str], AbstractContextManager[list[Path]]] | None = None,
) -> dict[str, Comparison]:
    """Time this tree's steps and another revision's in alternation.

    Args:
        revision: the other one, as git names it.
        case: the shape.
        inner_steps: the K of `memdlm`.
        repeats: timed rounds.
        batches: in one round.
        device, dtype: of the model, by name.
        prompt_kv: whether `memdlm_prompt_kv`, which early revisions lack, is compared too.
        build: makes the folders that hold the revision's packages; None for `built`.

    Returns:
        Variant to its times; `mdlm_all_rows`, which is not of the packages, shows the noise.

    Raises:
        ValueError: an unknown revision, one that does not build, or one that lacks what this
            tree's benchmark calls.
    """
    commit = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    print(f"this:  {_git('rev-parse', 'HEAD')}{' with changes' * bool(_git('status', '-s'))}")
    print(f"other: {commit}")
    setting = {
        "case": asdict(case),
        "inner_steps": list(inner_steps),
        "batches": batches,
        "device": device,
        "dtype": dtype,
        "prompt_kv": prompt_kv,
    }
    with contextlib.ExitStack() as stack:
        folders = stack.enter_context((build or built)(commit))
        this = stack.enter_context(_worker("this tree", _THIS, setting))
        other = stack.enter_context(_worker(f"revision {revision}", folders, setting))
        theirs = other.receive()["variants"]
        variants = this.receive()["variants"]
        if variants != theirs:
            raise ValueError(f"both trees must have the variants {variants}, got {theirs}")
        first = {name: (this.step(name), other.step(name)) for name in variants}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        for number in tqdm(range(repeats), desc="rounds", leave=False):
            for name in variants:
                # Who comes first changes from round to round.
                if number % 2:
                    theirs_ms = other.step(name)["time_ms"]
                    times[name].append((this.step(name)["time_ms"], theirs_ms))
                else:
                    ours_ms = this.step(name)["time_ms"]
                    times[name].append((ours_ms, other.step(name)["time_ms"]))
    return {
        name: Comparison(
            [ours for ours, _ in own],
            [theirs for _, theirs in own],
            first[name][0]["loss"],
            first[name][1]["loss"],
        )
        for name, own in times.items()
    }


@contextlib.contextmanager
def built(commit: str) -> Iterator[list[Path]]:
    """Check a commit out beside this tree, build it, and remove both folders afterwards.

    Args:
        commit: its hash.

    Yields:
        The folders to import its packages from.

    Raises:
        ValueError: it does not build.
    """
    with tempfile.TemporaryDirectory(prefix="memdlm-compare-") as folder:
        worktree, packages = Path(folder, "tree"), Path(folder, "packages")
        _git("worktree", "add", "--detach", str(worktree), commit)
        try:
            print("building it ...", flush=True)
            offline = ("--no-build-isolation", "--no-deps", "--no-index")
            pip = (sys.executable, "-m", "pip", "install", "--quiet", *offline)
            command = (*pip, "--target", str(packages), str(worktree))
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"revision {commit} must build, got:\n{done.stderr[-2_000:]}")
            yield [packages]
        finally:
            _git("worktree", "remove", "--force", str(worktree))


@dataclass
class _Worker:
    """A process that runs steps on demand; it speaks JSON, one line at a time."""

    name: str
    process: "subprocess.Popen[str]"

    def step(self, variant: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(variant + "\n")
        self.process.stdin.flush()
        return self.receive()

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"it ended, status {self.process.wait()}"}
        if "error" in answer:
            raise ValueError(f"{self.name} cannot run this tree's benchmark: {answer['error']}")
        return answer


@contextlib.contextmanager
def _worker(name: str, folders: list[Path], setting: dict[str, Any]) -> Iterator[_Worker]:
    spec = {"root": str(_ROOT), "folders": [str(folder) for folder in folders], **setting}
    # -P: not the worker's own folder but the ones it is told.
    command = (sys.executable, "-P", str(_WORKER), json.dumps(spec))
    # A thread that waits for its turn must not keep a core busy.
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield _Worker(name, process)
    finally:
        process.kill()
        process.communicate()


def _git(*words: str) -> str:
    done = subprocess.run(("git", "-C", _ROOT, *words), capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or "no such revision"
        raise ValueError(f"git {' '.join(words)} must succeed, got: {reason}")
    return done.stdout.strip()


def print_table(case: StepCase, revision: str, found: dict[str, Comparison]) -> None:
    """Print both medians, the rounds' mean ratio and its spread, and losses that differ."""
    print(f"\n{case.name}")
    print(f"{'variant':<22}{'this ms':>10}{revision + ' ms':>16}{'ratio':>8}{'p20':>7}{'p80':>7}")
    for name, own in found.items():
        this, other = percentiles(own.this_ms)["p50_ms"], percentiles(own.other_ms)["p50_ms"]
        spread = percentiles(own.ratios)
        print(
            f"{name:<22}{this:>10.1f}{other:>16.1f}{geometric_mean(own.ratios):>8.3f}"
            f"{spread['p20_ms']:>7.3f}{spread['p80_ms']:>7.3f}"
        )
    for name, own in found.items():
        if abs(own.this_loss - own.other_loss) > 0.01 * abs(own.other_loss):
            print(f"{name}: the losses differ, {own.this_loss:.5g} and {own.other_loss:.5g}")


if __name__ == "__main__":
    main()
