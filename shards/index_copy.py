"""A copy of the files of an index in one file beside them, from which they are restored where they are damaged."""

import hashlib
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.files import atomic_file, sha256

COPY = "index.copy"


def write_copy(folder: Path, names: Sequence[str]) -> None:
    """Write the copy of some files of a folder; its bytes depend on theirs alone."""
    with atomic_file(folder / COPY) as part, part.open("wb") as file:
        _write(file, folder, names)


def copy_is_current(folder: Path, names: Sequence[str]) -> bool:
    """Whether the copy is there and has every byte of these files; False where one of them is missing."""
    found = _Hash()
    try:
        _write(found, folder, names)
        return sha256(folder / COPY) == found.hash.hexdigest()
    except FileNotFoundError:
        return False


def unpack_copy(folder: Path, place: Path) -> list[str]:
    """Write the files of the copy into another folder; their names, none where there is no copy that can be read."""
    names = []
    try:
        with tarfile.open(folder / COPY, "r:") as tar:
            for member in tar:
                source = tar.extractfile(member) if Path(member.name).name == member.name else None
                if source is None:  # no plain file, or one of another folder
                    return []
                with (place / member.name).open("wb") as target:
                    shutil.copyfileobj(source, target)
                names.append(member.name)
    except (FileNotFoundError, tarfile.TarError):
        return []
    return names


class _Hash:
    """A file of which the SHA-256 alone is kept."""

    def __init__(self) -> None:
        self.hash, self._size = hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.hash.update(content)
        self._size += len(content)
        return len(content)

    def tell(self) -> int:
        return self._size


def _write(target: Any, folder: Path, names: Sequence[str]) -> None:
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            with (folder / name).open("rb") as file:
                member = tarfile.TarInfo(name)  # neither time nor owner
                member.size = (folder / name).stat().st_size
                tar.addfile(member, file)
