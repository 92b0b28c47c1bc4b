"""Finding a visit's volumes in a BIDS folder, by suffix and entities."""

import functools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from shards.errors import DataError

EXTENSIONS = r"\.(nii(\.gz)?|hdr|mgz)"
ENTITY = re.compile(r"([A-Za-z]+)-([A-Za-z0-9.+]+)")


def check_entities(entities: Mapping[str, str]) -> None:
    """Check entities of BIDS names, as ``space=MNI152NLin2009cAsym``.

    Raises:
        DataError: a name or a value that a BIDS name cannot hold.
    """
    for key, value in entities.items():
        if not ENTITY.fullmatch(f"{key}-{value}") or key in {"sub", "ses"}:
            raise DataError(f"entities: {key}={value} is no entity; give key=value as space=MNI152NLin2009cAsym")


def find_files(
    anat: Path, stem: str, suffix: str, entities: Mapping[str, str], free: Collection[str] = ()
) -> list[Path]:
    """The files of one suffix in an ``anat`` folder that have the given entities.

    Where some have no further entities, these are the ones.

    Args:
        anat: the folder.
        stem: ``sub-X`` or ``sub-X_ses-Y``.
        suffix: as ``T1w``.
        entities: that a name must have.
        free: keys of entities that a name may have beside them.
    """
    found: dict[Path, dict[str, str]] = {}
    for name in folder_names(anat):
        match = _ending(suffix).fullmatch(name, len(stem)) if name.startswith(f"{stem}_") else None
        path = anat / name
        if match and (path.is_file() or path.is_symlink()):
            parts = [part.partition("-") for part in match[1].split("_")[1:]]
            found[path] = {key: value for key, _, value in parts}
    matching = {path: own for path, own in found.items() if entities.items() <= own.items()}
    plain = [path for path, own in matching.items() if own.keys() - set(free) == entities.keys()]
    return plain or list(matching)


def folder_names(folder: Path) -> list[str]:
    """What is in a folder, sorted; nothing where there is no folder.

    Raises:
        OSError: the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


@functools.cache
def _ending(suffix: str) -> re.Pattern[str]:
    """A name after its ``sub-X`` or ``sub-X_ses-Y``."""
    return re.compile(rf"((?:_[^_]+)*)_{re.escape(suffix)}{EXTENSIONS}")


def several(files: Sequence[Path], stem: str, suffix: str) -> str:
    """Why several files of one suffix cannot be used, and how to choose."""
    if len({path.name.partition(f"_{suffix}.")[0] for path in files}) == 1:
        return f"{' and '.join(path.name for path in files)} are one scan in several formats; remove all but one"
    kinds = [path.name.removeprefix(f"{stem}_").partition(f"_{suffix}.")[0] for path in files]
    example = ",".join(f"{key}={value}" for key, value in ENTITY.findall(kinds[-1])) or "desc=preproc"
    return (
        f"{len(files)} files *_{suffix}.* in one anat folder ({', '.join(kinds)}); choose by --entities, as in "
        f"--entities {example}, keep one there, or name it in a CSV"
    )
