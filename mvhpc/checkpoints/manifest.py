"""The manifest of a complete checkpoint, read without loading a network."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
Digests = dict[str, dict[str, Any]]


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or resumed from; the message names it, what is wrong and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint.

    Attributes:
        folder: of its files.
        step: number of steps done before it.
        state: of the training loop (JSON).
        files: relative path -> {"size": bytes, "sha256": hex digits}.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    files: Digests


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, the newest last."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``, by its manifest.

    Raises:
        CheckpointError: naming a manifest that cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        return Checkpoint(folder, manifest["step"], manifest["state"], manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a manifest ({error})") from error


def resumption(run: Path) -> str:
    """What is left of a run that ends now, for the user: where the same command continues."""
    found = complete(run / "checkpoints")
    if not found:
        return "no checkpoint was written, so the same command begins anew"
    return f"the same command continues after step {int(found[-1].name.removeprefix('step-'))}"
