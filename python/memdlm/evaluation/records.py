"""The folder of an evaluation: one JSON line for each answer, and what they were made with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm.evaluation.arm import Arm
from memdlm.evaluation.atomic_write import write_whole
from memdlm.evaluation.files_hash import files_hash, short_hash

_EXAMPLES_FILE = "examples.jsonl"
_SETTINGS_FILE = "settings.json"


class Records:
    """The answers in a folder, those that are there and those that come.

    Args:
        out: the folder; made if it is not there.
        settings: what the answers depend on, besides the models.
        arms: whose answers are to come.

    Raises:
        ValueError: the folder cannot be written, holds a file that cannot be read, or answers of
            other settings, or of another model under the name of an arm.
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
            theirs = _parse(path.read_text(encoding="utf-8"), str(path))
        for key, value in settings.items():
            before = theirs["settings"].get(key)
            if before != value:
                raise ValueError(
                    f"out {out} holds answers with {key} {before}, got {value}: choose another "
                    "folder, or delete it"
                )
        models = theirs.setdefault("models", {})
        for arm in arms:
            ours = {"folder": arm.folder, "weights": files_hash(Path(arm.folder))}
            before = models.setdefault(arm.name, ours)
            # A folder is what it holds, under any path; a hub name is all there is of its model.
            key = "folder" if ours["weights"] is None else "weights"
            if before[key] != ours[key]:
                raise ValueError(
                    f"out {out} holds answers of another model as {arm.name!r}, from "
                    f"{before['folder']}, got {arm.folder}: choose another folder"
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
            write_whole(self._path, whole)
        return [
            _parse(line, f"line {number} of {self._path}") for number, line in enumerate(lines, 1)
        ]

    def _write_settings(self) -> None:
        text = json.dumps(self._settings, indent=2)
        write_whole(self.folder / _SETTINGS_FILE, text + "\n")

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
    return short_hash(json.dumps(settings, sort_keys=True).encode())


def _parse(text: str, place: str) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}): delete it, or choose another out") from (
            error
        )
    return parsed
