"""Find the torch that a Python has, without importing it (which takes seconds and may fail).

Run as a script it prints the package's folder and version, a line each, or nothing.
"""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

MINIMUM = (2, 11)


class Torch(NamedTuple):
    directory: Path
    version: str

    @property
    def fits(self) -> bool:
        release = re.match(r"(\d+)\.(\d+)", self.version)
        return release is not None and (int(release[1]), int(release[2])) >= MINIMUM


def find_torch() -> Torch | None:
    """The torch on this interpreter's path, or None."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    directory = Path(spec.origin).parent
    version = re.search(
        r"^__version__ = '(.+)'", (directory / "version.py").read_text(encoding="utf-8"), re.M
    )
    return Torch(directory, version[1]) if version else None


if __name__ == "__main__":
    torch = find_torch()
    if torch is not None:
        print(torch.directory, torch.version, sep="\n")
