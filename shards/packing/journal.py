"""The folder of an unfinished packing, with journals of the shards that are complete.

Each process that packs a data set, the main one and those of parts, has a journal of its own, to which it appends a
line when a shard is complete on the disk. All of them read all journals.
"""

import json
import os
import shutil
from pathlib import Path

from shards.files import write_bytes
from shards.packing.make import Shard

PARTIAL = ".partial"
JOURNAL = "journal"


class Journal:
    """The journal of one process, and the shards of all journals.

    Args:
        folder: of the data set.
        name: of the process: empty for the main one, ``2-of-4`` for a part.
        identity: of the packing; journals with another one are ignored.
    """

    def __init__(self, folder: Path, name: str, identity: str) -> None:
        self.folder, self.partial = folder, self.folder_of(folder)
        self.partial.mkdir(parents=True, exist_ok=True)
        self._path = self.partial / f"{JOURNAL}{'-' * bool(name)}{name}.jsonl"
        self._identity = {"identity": identity}
        self.shards: dict[int, Shard] = {}
        for path in sorted(self.partial.glob(f"{JOURNAL}*.jsonl")):
            self.shards |= {shard.number: shard for shard in self._read(path)}
        lines = [self._identity, *(shard.to_dict() for shard in self._read(self._path))]  # without a torn last line
        write_bytes(self._path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    @staticmethod
    def folder_of(folder: Path) -> Path:
        """The folder of the unfinished packing of a data set."""
        return folder / PARTIAL

    def _read(self, path: Path) -> list[Shard]:
        lines = []
        if path.exists():
            for line in path.read_bytes().splitlines():
                try:
                    lines.append(json.loads(line))
                except ValueError:  # the process was killed while it wrote this line
                    break
        return [Shard.from_dict(line) for line in lines[1:]] if lines and lines[0] == self._identity else []

    def add(self, shard: Shard) -> None:
        """Record a shard that is complete on the disk."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(shard.to_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.shards[shard.number] = shard

    def find(self, name: str) -> Path | None:
        """A file of a complete shard: where it was made, or where an interrupted end has moved it."""
        return next((path for path in (self.partial / name, self.folder / name) if path.is_file()), None)

    def has_files(self, shard: Shard) -> bool:
        """Whether the files of a shard are there, of the right size."""
        found = {name: self.find(name) for name in shard.files}
        return all(path and path.stat().st_size == shard.files[name]["bytes"] for name, path in found.items())

    def remove(self) -> None:
        """Remove the folder with all journals."""
        shutil.rmtree(self.partial)
