"""Several checkpoints on the command line: their folders, and their names in tables."""

from pathlib import Path


def folders_of(models: str) -> list[str]:
    """Folders that stand with a comma in between, one by one."""
    return [folder.strip() for folder in models.split(",")]


def labels_of(names: str | None, folders: list[str]) -> list[str]:
    """The models' names.

    Args:
        names: with a comma in between; None for the folders' own.
        folders: of the models.

    Returns:
        A name for each folder.

    Raises:
        ValueError: more or fewer names than folders, or two that are the same.
    """
    labels = [Path(folder).name for folder in folders] if names is None else folders_of(names)
    if len(labels) != len(folders):
        raise ValueError(f"names must be as many as models, {len(folders)}, got {len(labels)}")
    if len(set(labels)) < len(labels):
        raise ValueError(f"names must all be different, got {', '.join(labels)}")
    return labels
