"""Small sources to pack: a blob in an empty box as a BIDS tree."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from shards.dataset import open_dataset
from shards.index import Split
from shards.pack import pack
from shards.verify import verify

SIZE = (20, 24, 18)


def head(seed: int = 0) -> np.ndarray:
    """An asymmetric blob in an empty box, int16 (20, 24, 18), RAS, with values from 100 to 1100."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij")
    inside = ((x - 10) / 6) ** 2 + ((y - 12) / 8) ** 2 + ((z - 8) / 5) ** 2 < 1
    values = np.where(inside, 100 + rng.integers(0, 1001, SIZE), 0)
    values[14:16, 15:18, 8:10] = 1100  # brighter on the right, in front
    values[10, 12, 8] = 100
    return values.astype(np.int16)


def save(path: Path, voxels: np.ndarray, spacing: float = 2.0, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([spacing] * 3 + [1]) if affine is None else affine), path)
    return path


def bids(folder: Path, people: list[tuple[str, str, str]], extra: dict[str, str] | None = None) -> Path:
    """A BIDS tree of (id, age, sex); ``extra`` adds a column."""
    lines = ["participant_id\tage\tsex" + ("\tfamily" if extra else "")]
    for i, (name, age, sex) in enumerate(people):
        save(folder / name / "anat" / f"{name}_T1w.nii.gz", head(i))
        lines.append("\t".join([name, age, sex, *([extra.get(name, "n/a")] if extra else [])]))
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")
    return folder


def packed(source: Path, out: Path, **options: Any) -> Any:
    """Pack; blobs are no brains, so what quality control finds is kept."""
    return pack(source, out, **{"spacing": 2.0, "shape": SIZE, "max_rejects": "100%", "keep_suspect": True, **options})


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def volumes(folder: Path) -> dict[str, bytes]:
    dataset = open_dataset(folder)
    assert not list(verify(folder))
    return {key: dataset.read(key, "image").tobytes() for key in dataset.keys()}  # noqa: SIM118 - not a dictionary


PEOPLE = [(f"sub-{i:02d}", str(20 + 5 * i), "FM"[i % 2]) for i in range(7)]


def split_of(assignment: dict[str, str]) -> Split:
    """A split that a table gave."""
    return Split("column", 0, [], [], "", assignment)
