"""Real English without a download: texts that every Python installation carries."""

import ast
import functools
import pathlib
import sysconfig
import zlib
from collections import deque
from collections.abc import Iterator
from pydoc_data import topics

MIN_PASSAGE_CHARACTERS = 200
VALIDATION_PERCENT = 10
SPLITS = ("train", "validation")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# The fields of a statement that hold statements.
BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
# Not documentation, or absent from some distributions of Python.
SKIPPED_FOLDERS = frozenset(
    ["site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"]
    + ["distutils", "ensurepip", "pydoc_data", "__pycache__"]
)


def _definitions(tree: ast.Module) -> Iterator[Documented]:
    """Yield the module and its classes and functions, breadth first as `ast.walk`.

    Expressions hold none, and leaving them out takes half of the time.
    """
    nodes = deque[ast.AST]([tree])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, Documented):
            yield node
        for block in BLOCKS:
            nodes.extend(getattr(node, block, ()))


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield (file and name, docstring) of the standard library, without importing it."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # Some installations ship templates and old encodings among their modules.
        for node in _definitions(tree):
            text = ast.get_docstring(node)
            if text:
                yield f"{relative.as_posix()}:{getattr(node, 'name', '')}", text


@functools.cache
def _all_passages() -> dict[str, list[str]]:
    """Return {split: passages}; a paragraph that occurs twice is kept once, so no split leaks."""
    passages: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    sources = [*sorted(topics.topics.items()), *_docstrings()]
    for name, text in sources:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            fingerprint = " ".join(paragraph.split())
            if fingerprint and fingerprint not in seen:
                seen.add(fingerprint)
                paragraphs.append(paragraph.rstrip())
        passage = "\n\n".join(paragraphs).strip()
        if len(passage) < MIN_PASSAGE_CHARACTERS:
            continue
        held_out = zlib.crc32(name.encode()) % 100 < VALIDATION_PERCENT
        passages["validation" if held_out else "train"].append(passage)
    return passages


def passages(split: str) -> list[str]:
    """Real English passages: Python's help topics and the standard library's docstrings.

    Args:
        split: "train" or "validation"; a passage is in one of them, by a hash of its name.

    Returns:
        list of str, each at least 200 characters, the same on every run of one Python version.

    Raises:
        ValueError: `split` is neither.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return _all_passages()[split]
