"""Ways to store and to read volumes: the limits of the machine, this project's formats, and scans as they come.

A way writes volumes once and then reads all of them, epoch after epoch, in a random order. Each sample is a NumPy
array float16 (H, W, D).
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Volume = NDArray[Any]
Epoch = Callable[[int], Iterator[Volume]]  # seed -> all volumes in a random order


def shuffled(n: int, seed: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).permutation(n)]


class Way(ABC):
    """One way to store and read volumes.

    Attributes:
        name: in the table.
        checked: what finds damaged bytes on reading; empty for nothing.
        module, package: to import and to install; empty for the project's own.
    """

    name = ""
    checked = ""
    module = package = ""

    @abstractmethod
    def write(self, folder: Path, volumes: Volume, scans: Sequence[Path]) -> None:
        """Store volumes (n, H, W, D) in an empty folder; ``scans`` are their source files."""

    @abstractmethod
    def open(self, folder: Path) -> Epoch:
        """Open what :meth:`write` stored."""


class Memmap(Way):
    name = "limit: memory map"

    def write(self, folder: Path, volumes: Volume, scans: Sequence[Path]) -> None:
        np.save(folder / "volumes.npy", volumes)

    def open(self, folder: Path) -> Epoch:
        volumes = np.load(folder / "volumes.npy", mmap_mode="r")
        return lambda seed: (np.array(volumes[i]) for i in shuffled(len(volumes), seed))


class OneFile(Way):
    """The frames of all volumes, one after the other, decompressed into a new array, without a check."""

    name = "limit: one file, zstd 1"

    def codec(self) -> Any:
        from numcodecs.zstd import Zstd

        return Zstd(1)

    def write(self, folder: Path, volumes: Volume, scans: Sequence[Path]) -> None:
        frames = [self.codec().encode(np.ascontiguousarray(v)) for v in volumes]
        (folder / "frames").write_bytes(b"".join(frames))
        np.save(folder / "ends.npy", np.cumsum([0, *map(len, frames)]))
        np.save(folder / "shape.npy", volumes.shape[1:])

    def open(self, folder: Path) -> Epoch:
        ends, shape, codec = np.load(folder / "ends.npy").tolist(), np.load(folder / "shape.npy").tolist(), self.codec()
        descriptor = os.open(folder / "frames", os.O_RDONLY)

        def epoch(seed: int) -> Iterator[Volume]:
            for i in shuffled(len(ends) - 1, seed):
                volume = np.empty(shape, np.float16)
                codec.decode(os.pread(descriptor, ends[i + 1] - ends[i], ends[i]), out=volume)
                yield volume

        return epoch


class OneFile3(OneFile):
    name = "limit: one file, zstd 3"

    def codec(self) -> Any:
        from numcodecs.zstd import Zstd

        return Zstd(3)


class OneFileLz4(OneFile):
    name = "limit: one file, Blosc LZ4"

    def codec(self) -> Any:
        from numcodecs import blosc

        blosc.use_threads = False
        return blosc.Blosc("lz4", clevel=9, shuffle=blosc.SHUFFLE)


class Ours(Way):
    """This project's data sets."""

    checked = "crc32c"
    storage = ""

    def write(self, folder: Path, volumes: Volume, scans: Sequence[Path]) -> None:
        write_dataset(folder / "packed", self.storage, volumes)

    def open(self, folder: Path) -> Epoch:
        from shards.dataset import open_dataset

        dataset = open_dataset(folder / "packed")
        keys = list(dataset.keys())
        return lambda seed: (dataset.read(keys[i], "image") for i in shuffled(len(keys), seed))


class OursTar(Ours):
    name = "ours, tar"
    storage = "webdataset"


class OursZarr(Ours):
    name = "ours, zarr"
    storage = "zarr"


class OursTensors(Ours):
    """Samples of ``shards.torch.Volumes``, float32 tensors; of these the first axis is taken off."""

    name = "ours, tar, as float32 tensors"
    storage = "webdataset"

    def open(self, folder: Path) -> Epoch:
        from shards.torch import Volumes

        volumes = Volumes(folder / "packed", "all")
        return lambda seed: (volumes[i]["image"].numpy()[0] for i in shuffled(len(volumes), seed))


class Nibabel(Way):
    """Decompression of the scans alone."""

    name = "nibabel, each epoch: load"
    checked = "gzip"

    def write(self, folder: Path, volumes: Volume, scans: Sequence[Path]) -> None:
        for i, scan in enumerate(scans):
            shutil.copy(scan, folder / f"{i:05d}{''.join(scan.suffixes[-2:])}")
        np.save(folder / "shape.npy", volumes.shape[1:])

    def open(self, folder: Path) -> Epoch:
        shape = np.load(folder / "shape.npy").tolist()
        scans = sorted(path for path in folder.iterdir() if path.suffix != ".npy")
        return lambda seed: (self.load(scans[i], shape) for i in shuffled(len(scans), seed))

    def load(self, scan: Path, shape: Sequence[int]) -> Volume:
        import nibabel as nib

        return np.asarray(nib.load(scan).get_fdata(dtype=np.float32))


class NibabelPrepared(Nibabel):
    """What a network needs: RAS, intensities in [0, 1], a box of the common shape around the scan's middle."""

    name = "nibabel, each epoch: load, orient, scale, crop"

    def load(self, scan: Path, shape: Sequence[int]) -> Volume:
        import nibabel as nib

        voxels = nib.as_closest_canonical(nib.load(scan)).get_fdata(dtype=np.float32)
        scaled = np.clip(voxels / np.percentile(voxels[voxels > 0], 99.5), 0, 1)
        volume = np.zeros(shape, np.float16)
        ours = tuple(slice(max(0, (m - n) // 2), max(0, (m - n) // 2) + min(m, n)) for m, n in zip(shape, voxels.shape))
        theirs = tuple(
            slice(max(0, (n - m) // 2), max(0, (n - m) // 2) + min(m, n)) for m, n in zip(shape, voxels.shape)
        )
        volume[ours] = scaled[theirs]
        return volume


def write_dataset(folder: Path, storage: str, volumes: Volume) -> None:
    """A packed data set of this project, of volumes alone."""
    from shards.schema import Schema
    from shards.writer import DatasetWriter

    schema = Schema.from_dict({"image": {"kind": "volume", "suffix": "T1w"}})
    arrays = {"image": {"shape": volumes.shape[1:], "dtype": "float16"}}
    writer = DatasetWriter(folder, storage, "volumes", schema, arrays, {})
    for i, volume in enumerate(volumes):
        writer.add(f"sub-{i:05d}", f"sub-{i:05d}", {}, {"image": np.asarray(volume)})
    writer.finish()


LIMITS: list[type[Way]] = [Memmap, OneFile, OneFile3, OneFileLz4]
OURS: list[type[Way]] = [OursTar, OursZarr, OursTensors]
