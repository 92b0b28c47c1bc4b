"""Model folders: ``model.json`` and the files of weights that it names.

``model.json`` names each safetensors file with its SHA-256. It is renamed into place after the files it names and
before older files are removed: whenever writing is interrupted, the folder holds the old model or the new one.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mvhpc.config import ConfigError
from shards.files import sha256, write_bytes

FORMATS = {"autoencoder": 3, "joint": 8, "baseline": 1, "scalars": 2}  # each counts what changed in its own files
MANIFEST = "model.json"
SUMS = "SHA256SUMS"  # of an exported model, beside its folder `model`; `sha256sum --check` reads it


class ModelError(ConfigError):
    """A model folder that cannot be used; the message names the file."""


def model_folder(path: str | Path) -> Path:
    """The folder that holds ``model.json``: ``path`` itself, or its ``model`` where ``path`` is a run folder.

    Raises:
        ModelError: where neither holds one.
    """
    for folder in (Path(path) / "model", Path(path)):
        if (folder / MANIFEST).is_file():
            return folder
    raise ModelError(f"{path}: no trained model there (no {MANIFEST}); give a run folder whose training has ended")


def read_any_manifest(folder: Path) -> dict[str, Any]:
    """The content of ``model.json``, of whatever kind and format.

    Raises:
        ModelError: a damaged one, also where it differs from that of the export, or weights outside of ``folder``.
    """
    path = folder / MANIFEST
    _check_sum(path)
    try:
        meta: dict[str, Any] = json.loads(path.read_text())
        _ = meta["format"], meta["kind"]
        files = [entry["file"] for entry in meta["networks"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: damaged: {error!r}; train the model again or copy the folder again") from error
    if outside := [file for file in files if Path(file).name != file]:
        raise ModelError(f"{path}: names the weights file {outside[0]!r}, which lies in another folder; not read")
    return meta


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file of an exported model."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    write_bytes(folder / SUMS, "".join(lines).encode())


def _check_sum(path: Path) -> None:
    """Compare ``model.json`` with the sum of the export, where there is one: its values have no hash of their own."""
    sums, name = path.parent.parent / SUMS, f"{path.parent.name}/{path.name}"
    lines = sums.read_text(errors="replace").splitlines() if sums.is_file() else []
    found = {file: digest for digest, _, file in (line.partition("  ") for line in lines)}
    if name in found and found[name] != sha256(path):
        raise ModelError(f"{path}: damaged or changed, its SHA-256 is not the one in {sums}; copy the folder again")


def read_manifest(folder: Path, kind: str) -> dict[str, Any]:
    """The content of ``model.json`` of a model of this kind, in the present format.

    Raises:
        ModelError: a damaged one, another kind or another format.
    """
    meta = read_any_manifest(folder)
    check_manifest(folder, meta, kind)
    return meta


def check_manifest(folder: Path, meta: dict[str, Any], kind: str) -> None:
    """Refuse a model of another kind or format.

    Raises:
        ModelError: naming both.
    """
    path = folder / MANIFEST
    if kind not in FORMATS:
        raise ModelError(f"{path}: a model of the unknown kind {kind}; take the version of mvhpc that wrote it")
    if meta["kind"] != kind:
        raise ModelError(f"{path}: this model is of the kind {meta['kind']}; one of the kind {kind} is needed here")
    if meta["format"] != FORMATS[kind]:
        raise ModelError(
            f"{path}: in format {meta['format']}, this version reads {FORMATS[kind]}; train the model again, or take "
            "the version that wrote it"
        )


def save_networks(folder: Path, meta: dict[str, Any], networks: Mapping[str, bytes]) -> None:
    """Write ``networks`` (safetensors bytes by name), then ``model.json``, then remove the files it does not name.

    Args:
        folder: the ``model`` folder.
        meta: for ``model.json``.
        networks: to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, data in sorted(networks.items()):
        digest = hashlib.sha256(data).hexdigest()
        files[name] = {"file": f"{name}-{digest[:12]}.safetensors", "sha256": digest}
        write_bytes(folder / files[name]["file"], data)
    manifest = json.dumps({"format": FORMATS[meta["kind"]], **meta, "networks": files}, indent=1)
    write_bytes(folder / MANIFEST, manifest.encode())
    named = {entry["file"] for entry in files.values()}
    for path in (*folder.glob("*.safetensors"), *folder.glob(".*.part")):  # (parts: of a process that was killed)
        if path.name not in named:
            path.unlink()


def read_weights(folder: Path, meta: dict[str, Any], name: str) -> bytes:
    """The bytes of a network's weights file, checked against ``model.json``.

    Raises:
        ModelError: a missing or damaged file.
    """
    entry = meta["networks"][name]
    path = folder / entry["file"]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: weights missing ({error.strerror}); copy the whole model folder again") from error
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ModelError(f"{path}: damaged, its SHA-256 is not the one in {MANIFEST}; copy it again")
    return data


def to_bytes(state: Mapping[str, Tensor]) -> bytes:
    """A state dict as the bytes of a safetensors file."""
    return save({name: value.detach().cpu().contiguous() for name, value in state.items()})
