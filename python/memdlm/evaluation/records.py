"""The folder of an evaluation: one JSON line for each answer, and what they were made with."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_EXAMPLES_FILE = "examples.jsonl"
_SETTINGS_FILE = "settings.json"
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class Arm:
    """A model, with its memory or without.

    Attributes:
        name: in tables and rows.
        folder: of the model, or its hub name.
        memory: whether a memory is written from each prompt.
    """

    name: str
    folder: str
    memory: bool = False


class Records:
    """The answers in a folder, those that are there and those that come.

    Args:
        out: the folder; made if it is not there.
        settings: what the answers depend on, besides the models.
        arms: whose answers are to come.

    Raises:
        ValueError: the folder cannot be written, or holds answers of other settings, or of another
            model under the name of an arm.
    """

    def __init__(self, out: str, settings: dict[str, Any], arms: Sequence[Arm]) -> None:
        self.folder = Path(out)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out {out} cannot be written: {error.strerror}") from error
        path = self.folder / _SETTINGS_FILE
        theirs: dict[str, Any] = {"settings": settings}
        if path.exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
        for key, value in settings.items():
            before = theirs["settings"].get(key)
            if before != value:
                raise ValueError(
                    f"out {out} holds answers with {key} {before}, got {value}: choose another "
                    "folder, or delete it"
                )
        models = theirs.setdefault("models", {})
        for arm in arms:
            ours = {"folder": arm.folder, "weights": _weights_hash(Path(arm.folder))}
            if models.setdefault(arm.name, ours) != ours:
                raise ValueError(
                    f"out {out} holds answers of another model as {arm.name!r}, from "
                    f"{models[arm.name]['folder']}, got {arm.folder}: choose another folder"
                )
        self._settings = theirs
        self._write_settings()
        self._path = self.folder / _EXAMPLES_FILE
        self.rows = self._read()

    def _read(self) -> list[dict[str, Any]]:
        """The rows that are there; the last may have been cut off, and is dropped then."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").split("\n")
        if lines.pop():
            whole = "".join(line + "\n" for line in lines)
            self._path.write_text(whole, encoding="utf-8")
        return [json.loads(line) for line in lines]

    def _write_settings(self) -> None:
        text = json.dumps(self._settings, indent=2)
        (self.folder / _SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers depend on."""
        settings: dict[str, Any] = self._settings["settings"]
        return settings

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """`arm`, `length` and `reason` of what was not measured."""
        skipped: list[dict[str, Any]] = self._settings.get("skipped", [])
        return skipped

    def skip(self, arm: Arm, length: int, reason: str) -> None:
        """Note that an arm cannot be measured at a length."""
        entry = {"arm": arm.name, "length": length, "reason": reason}
        if entry not in self.skipped:
            self._settings["skipped"] = [*self.skipped, entry]
            self._write_settings()

    def missing(self, arm: Arm, task: str, length: int, count: int) -> list[int]:
        """The indices below `count` that have no answer yet."""
        cell = (arm.name, task, length)
        done = {
            row["index"] for row in self.rows if (row["arm"], row["task"], row["length"]) == cell
        }
        return [index for index in range(count) if index not in done]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write answers, at once."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)
        self.rows += rows


def settings_hash(settings: dict[str, Any]) -> str:
    """A short name for a set of options: the same for the same ones."""
    return _hash(json.dumps(settings, sort_keys=True).encode())


def _weights_hash(folder: Path) -> str | None:
    """Tells whether a folder still holds the same model; None for one of the hub.

    Sizes, beginnings and ends of the files of weights: every tensor's shape is in there, and values
    that training changes.
    """
    if not folder.is_dir():
        return None
    parts = []
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        size = path.stat().st_size
        with path.open("rb") as file:
            beginning = file.read(_SAMPLE_BYTES)
            file.seek(max(size - _SAMPLE_BYTES, 0))
            parts.append(f"{path.name} {size} {_hash(beginning)} {_hash(file.read())}")
    return _hash("\n".join(parts).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
