"""Atomic checkpoints, written in the background of training.

Each worker passes copies of its tensors to a thread, which writes them into a hidden folder. When all workers have
written, rank 0 adds ``manifest.json`` (sizes and SHA-256 of all files) and renames the folder to ``step-NNNNNNNN``.
A folder without a manifest is incomplete and is removed at the next start.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mvhpc.checkpoints.manifest import MANIFEST, Checkpoint, CheckpointError, Digests, complete, read_checkpoint
from mvhpc.runtime.collectives import Collectives
from shards.files import sha256, sync, write_text


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written."""

    step: int
    state: dict[str, Any]
    best: int
    part: Path


class Checkpoints:
    """The checkpoints of one run.

    All methods but :meth:`report` and :meth:`close` are collective: all workers call them in the same order.

    Args:
        folder: holds ``step-NNNNNNNN`` folders.
        keep: number of the newest ones that are kept.
        collectives: the workers.
    """

    def __init__(self, folder: Path, keep: int, collectives: Collectives) -> None:
        self.folder, self.keep, self.collectives = folder, max(1, keep), collectives
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        torch.serialization.set_crc32_options(False)  # the manifest has SHA-256
        # State of the pending checkpoint, the same at all workers: all write, then rank 0 completes it.
        self._pending: _Pending | None = None
        self._count = 0
        self._completing = False
        self._task: Future[Any] | None = None  # this worker's part in that

    # --- writing ---

    def begin(self, step: int, files: dict[str, Any], state: dict[str, Any], best: int = 0) -> str | None:
        """Begin a checkpoint after finishing the one before; :meth:`settle` or :meth:`finish` completes it.

        Args:
            step: number of steps done.
            files: relative path -> content for ``torch.save``, of this worker; must not change afterwards.
            state: JSON; that of rank 0 is kept.
            best: step of a checkpoint that is kept in addition to the newest ones; 0 for none.

        Returns:
            a warning about the checkpoint before, or None.
        """
        warning = self.finish()
        self._count += 1  # a name of its own: a failed part may still be being removed
        part = self.folder / f".step-{step:08d}.{self._count}.part"
        self._pending, self._completing = _Pending(step, state, best, part), False
        self._task = self._writer.submit(self._write, part, files)
        return warning

    def report(self, wait: bool = False) -> Any:
        """The state of this worker's part, for :meth:`settle`; None while it is being written.

        Args:
            wait: wait until it is written.
        """
        if self._task is None or not (wait or self._task.done()):
            return None
        try:
            return self._task.result()
        except OSError as error:
            return f"{error.strerror or error}: {error.filename or self.folder} (worker {self.collectives.rank})"

    def settle(self, reports: Sequence[Any]) -> str | None:
        """Advance the pending checkpoint as far as the :meth:`report` of all workers allow, without waiting.

        Returns:
            a warning, in which case the pending checkpoint is dropped, or None.
        """
        pending = self._pending
        if pending is None or (reports[0] is None if self._completing else None in reports):
            return None
        errors = [report for report in reports if isinstance(report, str)]
        if errors or self._completing:
            self._pending = self._task = None
        if errors:
            if self.collectives.rank == 0:
                self._writer.submit(shutil.rmtree, pending.part, ignore_errors=True)
            return f"the checkpoint of step {pending.step} could not be written: {errors[0]}"
        if not self._completing:
            self._completing, self._task = True, None
            if self.collectives.rank == 0:
                self._task = self._writer.submit(self._complete, pending, list(reports))
        return None

    def finish(self) -> str | None:
        """Wait for the pending checkpoint.

        Returns:
            as :meth:`settle` does.
        """
        warning = None
        while self._pending is not None:
            warning = self.settle(self.collectives.gather(self.report(wait=True)))
        return warning

    def close(self) -> None:
        """End the thread. One worker completes its pending checkpoint; with several it is removed at the next start."""
        if self.collectives.world == 1:
            self.finish()
        self._writer.shutdown(wait=True)

    def _write(self, part: Path, files: dict[str, Any]) -> Digests:
        digests = {}
        for name, content in files.items():
            path = part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            digests[name] = _save(content, path)
        return digests

    def _complete(self, pending: _Pending, reports: list[Digests]) -> bool:
        part, final = pending.part, self.folder / f"step-{pending.step:08d}"
        files = {name: entry for digests in reports for name, entry in digests.items()}
        manifest = {"step": pending.step, "state": pending.state, "files": files}
        write_text(part / MANIFEST, json.dumps(manifest, indent=1))
        sync(part)
        _discard(final)
        part.replace(final)
        sync(self.folder)
        for old in complete(self.folder)[: -self.keep]:
            if old.name != f"step-{pending.best:08d}":
                _discard(old)
        return True

    # --- reading ---

    def sweep(self) -> None:
        """Remove incomplete checkpoints of an interrupted run."""
        if self.collectives.rank == 0 and self.folder.is_dir():
            finished = set(complete(self.folder))
            for path in [*self.folder.glob("step-*"), *self.folder.glob(".step-*.part")]:
                if path not in finished:
                    shutil.rmtree(path)
        self.collectives.barrier()

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint; None where there is none.

        Raises:
            CheckpointError: naming the manifest that cannot be read.
        """
        finished = complete(self.folder)
        # Rank 0 decides: shared file systems show a new folder to some nodes later than to others.
        name = self.collectives.gather(finished[-1].name if finished else None)[0]
        if name is None:
            return None
        try:
            return read_checkpoint(self.folder / name)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._advice()}") from error

    def verify(self, checkpoint: Checkpoint) -> None:
        """Check the size and SHA-256 of every file; the workers share the files.

        Raises:
            CheckpointError: at every worker, naming the first damaged or missing file and what to do.
        """
        damaged = []
        for name in sorted(checkpoint.files)[self.collectives.rank :: self.collectives.world]:
            path, entry = checkpoint.folder / name, checkpoint.files[name]
            if not path.is_file():
                damaged.append(f"{path}: missing")
            elif path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
                damaged.append(f"{path}: damaged (its SHA-256 is not the manifest's)")
        found = [line for lines in self.collectives.gather(damaged) for line in lines]
        if found:
            raise CheckpointError(f"{found[0]}; {self._advice()}")

    def _advice(self) -> str:
        finished = complete(self.folder)
        before = f"to resume from {finished[-2].name}" if len(finished) > 1 else "to begin anew"
        return f"remove the folder {finished[-1]} {before}"


class _HashingFile:
    """A new file, and the size and SHA-256 of its content.

    Attributes:
        size: bytes written.
        sha: their SHA-256.
        error: of a failed write; ``torch.save`` replaces it with an error of its own.
    """

    def __init__(self, path: Path) -> None:
        self.size, self.sha = 0, hashlib.sha256()
        self.error: OSError | None = None
        self._file = path.open("wb", buffering=2**20)

    def write(self, content: Any) -> int:
        """Append a buffer of bytes. Returns their number."""
        try:
            self._file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.sha.update(content)
        size = memoryview(content).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Flush to the disc."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _save(content: Any, path: Path) -> dict[str, Any]:
    """``torch.save``, flushed to the disc.

    Raises:
        OSError: it cannot be written.
    """
    file = _HashingFile(path)
    try:
        with contextlib.closing(file):
            torch.save(content, file)  # type: ignore[arg-type]
    except Exception as error:
        cause = file.error or error
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    return {"size": file.size, "sha256": file.sha.hexdigest()}


def _discard(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that a partly removed one is incomplete."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
