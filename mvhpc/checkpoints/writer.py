"""Checkpoints that exist whole or not at all, written while training goes on.

Every worker hands over copies of its tensors, which a thread writes into a hidden folder; once all workers have
written, rank 0 adds ``manifest.json`` (sizes and SHA-256 of all files) and renames the folder to ``step-XXXXXXXX``.
A folder without its manifest does not exist and is swept.
"""

import contextlib
import json
import mmap
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mvhpc.checkpoints.direct_io import BLOCK, Direct
from mvhpc.checkpoints.manifest import MANIFEST, Checkpoint, CheckpointError, Digests, complete, read_checkpoint
from mvhpc.runtime.collectives import Collectives
from shards.files import sha256, sync, write_text


@dataclass(frozen=True)
class _Pending:
    """A checkpoint on its way to the disc."""

    step: int
    state: dict[str, Any]
    best: int
    part: Path


class Checkpoints:
    """The checkpoints of one run.

    Methods are collective, but for :meth:`report` and :meth:`close`: all workers call them, in the same order.

    Args:
        folder: holds ``step-XXXXXXXX`` folders.
        keep: how many of the newest are kept.
        collectives: the workers.
    """

    def __init__(self, folder: Path, keep: int, collectives: Collectives) -> None:
        self.folder, self.keep, self.collectives = folder, max(1, keep), collectives
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._buffer = mmap.mmap(-1, 1024 * BLOCK)
        torch.serialization.set_crc32_options(False)  # the manifest has SHA-256
        # Where the pending one stands, the same at all workers: everybody writes, then rank 0 completes it.
        self._pending: _Pending | None = None
        self._begun = 0
        self._completing = False
        self._work: Future[Any] | None = None  # this worker's part in that

    # --- writing ---

    def begin(self, step: int, files: dict[str, Any], state: dict[str, Any], best: int = 0) -> str | None:
        """Begin a checkpoint, once the one before it is finished; :meth:`settle` or :meth:`finish` completes it.

        Args:
            step: steps done.
            files: relative path -> what ``torch.save`` writes there, of this worker; nobody changes it from now on.
            state: JSON-able; rank 0's is kept.
            best: step of a checkpoint that is kept beside the newest ones; 0 for none.

        Returns:
            what went wrong with the one before; None where nothing did.
        """
        warning = self.finish()
        self._begun += 1  # each part has a name of its own: what is left of a failed one is removed meanwhile
        part = self.folder / f".step-{step:08d}.{self._begun}.part"
        self._pending, self._completing = _Pending(step, state, best, part), False
        self._work = self._writer.submit(self._write, part, files)
        return warning

    def report(self, wait: bool = False) -> Any:
        """How far this worker has come with its part, for :meth:`settle`: None while it is busy.

        Args:
            wait: until it is done.
        """
        if self._work is None or not (wait or self._work.done()):
            return None
        try:
            return self._work.result()
        except OSError as error:
            return f"{error.strerror or error}: {error.filename or self.folder} (worker {self.collectives.rank})"

    def settle(self, reports: Sequence[Any]) -> str | None:
        """Go on with the pending checkpoint as far as all workers' :meth:`report` allow; waits for nothing.

        Returns:
            what went wrong, in which case the pending checkpoint is dropped; None where nothing did.
        """
        pending = self._pending
        if pending is None or (reports[0] is None if self._completing else None in reports):
            return None
        words = [report for report in reports if isinstance(report, str)]
        if words or self._completing:
            self._pending = self._work = None
        if words:
            if self.collectives.rank == 0:
                self._writer.submit(shutil.rmtree, pending.part, ignore_errors=True)
            return f"the checkpoint of step {pending.step} could not be written: {words[0]}"
        if not self._completing:
            self._completing, self._work = True, None
            if self.collectives.rank == 0:
                self._work = self._writer.submit(self._complete, pending, list(reports))
        return None

    def finish(self) -> str | None:
        """Wait for the pending checkpoint.

        Returns:
            as :meth:`settle`.
        """
        warning = None
        while self._pending is not None:
            warning = self.settle(self.collectives.gather(self.report(wait=True)))
        return warning

    def close(self) -> None:
        """Let the writer end: with one worker the pending checkpoint is completed, with more it is left to be swept."""
        if self.collectives.world == 1:
            self.finish()
        self._writer.shutdown(wait=True)

    def _write(self, part: Path, files: dict[str, Any]) -> Digests:
        digests = {}
        for name, content in files.items():
            path = part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            digests[name] = _save(content, path, self._buffer)
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
        """Remove what an interrupted run left unfinished."""
        if self.collectives.rank == 0 and self.folder.is_dir():
            whole = set(complete(self.folder))
            for path in [*self.folder.glob("step-*"), *self.folder.glob(".step-*.part")]:
                if path not in whole:
                    shutil.rmtree(path)
        self.collectives.barrier()

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint; None where there is none.

        Raises:
            CheckpointError: naming the manifest that cannot be read.
        """
        whole = complete(self.folder)
        # Rank 0's view is everybody's: shared file systems show a new folder to some nodes later than to others.
        name = self.collectives.gather(whole[-1].name if whole else None)[0]
        if name is None:
            return None
        try:
            return read_checkpoint(self.folder / name)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._advice()}") from error

    def verify(self, checkpoint: Checkpoint) -> None:
        """Check the size and SHA-256 of every file, the work shared among the workers.

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
        whole = complete(self.folder)
        before = f"to resume from {whole[-2].name}" if len(whole) > 1 else "to begin anew"
        return f"remove the folder {whole[-1]} {before}"


def _save(content: Any, path: Path, buffer: mmap.mmap) -> dict[str, Any]:
    """``torch.save`` to the disc, flushed.

    Raises:
        OSError: it cannot be written.
    """
    file = Direct(path, buffer)
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
    """Remove a checkpoint, its manifest first, so that a half-removed one does not exist."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
