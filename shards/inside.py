"""Paths out of a table or an index, which must stay in their folder."""

import os
from pathlib import Path


def inside(folder: Path, name: str) -> Path:
    """The path that ``name`` has in a folder.

    Args:
        folder: need not exist.
        name: a path relative to the folder, or an absolute one in it. Links in the folder are followed wherever they
            lead: whoever may write there made them (DataLad and git-annex do).

    Returns:
        An absolute path without ``..``, so that what is opened is what was checked.

    Raises:
        ValueError: it leads out of the folder.
    """
    root = Path(os.path.normpath(folder.absolute()))
    path = Path(os.path.normpath(root / name))
    if "\0" in name or not path.is_relative_to(root):
        raise ValueError(f"leads out of {folder}")
    return path
