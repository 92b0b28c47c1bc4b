"""Other libraries' ways to store and read volumes; see :mod:`benchmarks.loader.ways`."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.loader.ways import Epoch, Volume, Way, shuffled, write_dataset


class Mds(Way):
    name = "MosaicML Streaming (MDS)"
    module, package = "streaming", "mosaicml-streaming"
    compression: str | None = None

    def write(self, folder: Path, volumes: Volume, scans: Sequence[Path]) -> None:
        shape = ",".join(map(str, volumes.shape[1:]))
        columns = {"image": f"ndarray:float16:{shape}"}
        options = {"compression": self.compression, "size_limit": 2**26}
        with streaming().MDSWriter(out=str(folder / "mds"), columns=columns, **options) as writer:
            for volume in volumes:
                writer.write({"image": np.asarray(volume)})

    def open(self, folder: Path) -> Epoch:
        where = {"local": str(folder / "mds")}
        if self.compression:
            where = {"remote": str(folder / "mds"), "local": str(folder / "cache")}
        samples = streaming().StreamingDataset(**where, shuffle=True, batch_size=1)

        def epoch(seed: int) -> Iterator[Volume]:
            yield from (sample["image"] for sample in samples)

        return epoch


class MdsZstd(Mds):
    name = "MDS, zstd, from its unpacked cache"
    compression = "zstd"


class LitData(Way):
    name = "LitData"
    module, package = "litdata", "litdata"
    compression: str | None = None

    def write(self, folder: Path, volumes: Volume, scans: Sequence[Path]) -> None:
        from litdata.streaming import Cache

        (folder / "lit").mkdir()
        cache = Cache(str(folder / "lit"), chunk_bytes=2**26, compression=self.compression)
        for i, volume in enumerate(volumes):
            cache[i] = {"image": np.asarray(volume)}
        cache.done()
        cache.merge()

    def open(self, folder: Path) -> Epoch:
        from litdata import StreamingDataset

        def epoch(seed: int) -> Iterator[Volume]:
            samples = StreamingDataset(str(folder / "lit"), shuffle=True, seed=seed, max_cache_size="100GB")
            yield from (sample["image"] for sample in samples)

        return epoch


class LitDataZstd(LitData):
    name = "LitData, zstd"
    compression = "zstd"


class Tensorstore(Way):
    name = "tensorstore on our zarr"
    checked = "crc32c"
    module, package = "tensorstore", "tensorstore"

    def write(self, folder: Path, volumes: Volume, scans: Sequence[Path]) -> None:
        write_dataset(folder / "packed", "zarr", volumes)

    def open(self, folder: Path) -> Epoch:
        import tensorstore

        store = {"driver": "file", "path": str(folder / "packed/data.zarr/image")}
        limits = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
        array = tensorstore.open({"driver": "zarr3", "kvstore": store, "context": limits}, read=True).result()
        return lambda seed: (array[i].read().result() for i in shuffled(array.shape[0], seed))


class ZarrPython(Tensorstore):
    name = "zarr-python on our zarr"
    module = package = ""

    def open(self, folder: Path) -> Epoch:
        import zarr

        array: Any = zarr.open_array(folder / "packed/data.zarr/image", mode="r")
        return lambda seed: (array[i] for i in shuffled(array.shape[0], seed))


class PlainZarr(Way):
    """A chunk, hence a file, per volume; zarr-python's own compression."""

    name = "zarr-python, plain Zarr v3"

    def write(self, folder: Path, volumes: Volume, scans: Sequence[Path]) -> None:
        import zarr

        chunks = (1, *volumes.shape[1:])
        array = zarr.create_array(folder / "plain.zarr", shape=volumes.shape, dtype="float16", chunks=chunks)
        for i, volume in enumerate(volumes):
            array[i] = volume

    def open(self, folder: Path) -> Epoch:
        import zarr

        array: Any = zarr.open_array(folder / "plain.zarr", mode="r")
        return lambda seed: (array[i] for i in shuffled(array.shape[0], seed))


class WebDataset(Way):
    """Shards in a random order; volumes within a shard come in the order of the file."""

    name = "webdataset on our tar"

    def write(self, folder: Path, volumes: Volume, scans: Sequence[Path]) -> None:
        write_dataset(folder / "packed", "webdataset", volumes)

    def open(self, folder: Path) -> Epoch:
        import webdataset

        shards = sorted(map(str, (folder / "packed/shards").glob("*.tar")))

        def epoch(seed: int) -> Iterator[Volume]:
            samples = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=seed).decode()
            yield from (sample["image.npy"] for sample in samples)

        return epoch


class OurStream(WebDataset):
    name = "ours, shards.torch.stream"
    checked = "crc32c"

    def open(self, folder: Path) -> Epoch:
        from shards.torch import stream

        def epoch(seed: int) -> Iterator[Volume]:
            samples = stream(folder / "packed", "all", shardshuffle=1000, seed=seed)
            yield from (sample["image"].numpy()[0] for sample in samples)

        return epoch


class Persistent(Way):
    name = "MONAI PersistentDataset"

    def write(self, folder: Path, volumes: Volume, scans: Sequence[Path]) -> None:
        np.save(folder / "volumes.npy", volumes)  # where the transforms that are cached take them from
        (folder / "cache").mkdir()
        epoch = self.open(folder)
        for _ in epoch(0):
            pass

    def open(self, folder: Path) -> Epoch:
        import torch
        from monai.data import PersistentDataset
        from monai.transforms import Lambda

        volumes = np.load(folder / "volumes.npy", mmap_mode="r")
        take = Lambda(lambda i: torch.from_numpy(np.array(volumes[i])))
        samples = PersistentDataset(list(range(len(volumes))), take, cache_dir=folder / "cache")
        return lambda seed: (samples[i].numpy() for i in shuffled(len(samples), seed))


def streaming() -> ModuleType:
    """The module of MosaicML Streaming; it imports torchvision, which it needs for images alone."""
    try:
        import streaming
    except (ImportError, RuntimeError):  # torchvision is not installed, or is made for another build of torch
        for name in [n for n in sys.modules if n.split(".")[0] in ("torchvision", "streaming")]:
            del sys.modules[name]
        names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
        for name in names:
            sys.modules[name] = ModuleType(name)
        sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
        sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
        import streaming
    return streaming


PEERS: list[type[Way]] = [
    Mds,
    MdsZstd,
    LitData,
    LitDataZstd,
    Tensorstore,
    ZarrPython,
    PlainZarr,
    WebDataset,
    OurStream,
    Persistent,
]
