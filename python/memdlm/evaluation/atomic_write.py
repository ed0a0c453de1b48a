"""Files that are whole or not there, whenever the process is killed."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace a file's text at once: who reads it finds the old text or the new one.

    Args:
        path: the file; its folder is there.
        text: what it is to hold.
    """
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
