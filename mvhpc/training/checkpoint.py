"""Checkpoints that exist whole or not at all.

Every worker writes its part into a hidden folder; once all have, rank 0 adds ``manifest.json`` (sizes and SHA-256 of
all files) and renames the folder to ``step-XXXXXXXX``. A folder without its manifest does not exist and is swept.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvhpc.training.ranks import Ranks
from shards.files import sha256, sync, write_text

MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be resumed from; the message names it, what is wrong and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint.

    Attributes:
        folder: where its files are.
        step: steps done when it was written.
        state: what the training loop wrote into it (JSON).
        files: relative path -> {"size": bytes, "sha256": hex digits}.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    files: dict[str, dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run. Every method is collective: all workers call it, in the same order.

    Args:
        folder: holds ``step-XXXXXXXX`` folders.
        keep: how many of the newest are kept.
        ranks: the workers.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks) -> None:
        self.folder, self.keep, self.ranks = folder, max(1, keep), ranks

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
        """Write a checkpoint and remove the oldest beyond ``keep``.

        Args:
            step: steps done.
            write: called by every worker with the (unfinished) folder; writes this worker's files into it.
            state: JSON-able; rank 0's is kept.

        Returns:
            the finished folder.
        """
        final, part = self.folder / f"step-{step:08d}", self.folder / f".step-{step:08d}.part"
        if self.ranks.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        self.ranks.barrier()
        write(part)
        self.ranks.barrier()
        mine = sorted(p for p in part.rglob("*") if p.is_file())[self.ranks.rank :: self.ranks.world]
        digests = {}
        for path in mine:
            sync(path)
            digests[str(path.relative_to(part))] = {"size": path.stat().st_size, "sha256": sha256(path)}
        files = {name: entry for part_of in self.ranks.gather(digests) for name, entry in part_of.items()}
        if self.ranks.rank == 0:
            manifest = {"step": step, "state": state, "files": files}
            write_text(part / MANIFEST, json.dumps(manifest, indent=1))
            sync(part)
            _discard(final)
            part.replace(final)
            sync(self.folder)
            for old in self._complete()[: -self.keep]:
                _discard(old)
        self.ranks.barrier()
        return final

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob(f"step-*/{MANIFEST}"))

    def sweep(self) -> None:
        """Remove what an interrupted run left unfinished."""
        if self.ranks.rank == 0 and self.folder.is_dir():
            complete = set(self._complete())
            for path in [*self.folder.glob("step-*"), *self.folder.glob(".step-*.part")]:
                if path not in complete:
                    shutil.rmtree(path)
        self.ranks.barrier()

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint; None where there is none.

        Raises:
            CheckpointError: naming the manifest that cannot be read.
        """
        complete = self._complete()
        # Rank 0's view is everybody's: shared file systems show a new folder to some nodes later than to others.
        name = self.ranks.gather(complete[-1].name if complete else None)[0]
        if name is None:
            return None
        path = self.folder / name / MANIFEST
        try:
            manifest = json.loads(path.read_text())
            return Checkpoint(path.parent, manifest["step"], manifest["state"], manifest["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: not a manifest ({error}); {self._advice()}") from error

    def verify(self, checkpoint: Checkpoint) -> None:
        """Check the size and SHA-256 of every file, the work shared among the workers.

        Raises:
            CheckpointError: at every worker, naming the first damaged or missing file and what to do.
        """
        damaged = []
        for name in sorted(checkpoint.files)[self.ranks.rank :: self.ranks.world]:
            path, entry = checkpoint.folder / name, checkpoint.files[name]
            if not path.is_file():
                damaged.append(f"{path}: missing")
            elif path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
                damaged.append(f"{path}: damaged (its SHA-256 is not the manifest's)")
        found = [line for lines in self.ranks.gather(damaged) for line in lines]
        if found:
            raise CheckpointError(f"{found[0]}; {self._advice()}")

    def _advice(self) -> str:
        complete = self._complete()
        before = f"to resume from {complete[-2].name}" if len(complete) > 1 else "to begin anew"
        return f"remove the folder {complete[-1]} {before}"


def _discard(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that a half-removed one does not exist."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
