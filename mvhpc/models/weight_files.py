"""Weight files of other projects: local, never downloaded, checked by their SHA-256, and never run as code."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from mvhpc.config import ConfigError


class WeightsError(ConfigError):
    """A weight file is missing, has another hash than expected, or holds another network."""


def read_weight_file(path: str, key: str, expected: str, remedy: str) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote.

    Args:
        path: of the file.
        key: of the configuration that names it, for messages.
        expected: its SHA-256.
        remedy: where to get it, or how to do without.

    Raises:
        WeightsError: no such file, or another hash.
    """
    if not path or not Path(path).is_file():
        raise WeightsError(f"{key}={path!r}: no such file.\n{remedy}")
    with Path(path).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        wanted = f"not {expected}" if expected else "and none is expected"
        raise WeightsError(f"{key}={path}: its SHA-256 is {found}, {wanted}.\n{remedy}")
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state
