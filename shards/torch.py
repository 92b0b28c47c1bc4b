"""Packed data sets for PyTorch: a map-style data set, batches in the order of training, and streams of tar shards."""

import functools
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from shards.dataset import Dataset, open_dataset
from shards.errors import DataError, named, nearest
from shards.order import Order
from shards.schema import Schema, Value
from shards.streams import StreamedRecords, shard_name

Sample = dict[str, Any]
MAP_SCALE = 1 / 255  # of tissue maps, which have no scale in the index


class Position(NamedTuple):
    """Where an iteration is: its next step and, where that is of one worker alone, (worker, number of workers)."""

    step: int
    worker: tuple[int, int] | None = None


class Volumes(MapDataset[Sample]):
    """The records of one part that have all of the wanted volumes.

    A sample is a dictionary: ``key``; of each volume variable a float32 tensor (1, H, W, D), volumes and tissue maps
    in [0, 1], or (C, h, w, d) of latents; ``values``, of each scalar variable a float32 number, NaN where missing, or
    the int64 number of its class, -1 where missing. ``default_collate`` takes it.

    Args:
        folder: a packed data set of either format.
        part: ``train``, ``validation``, ``test`` or ``all``.
        variables: volumes to read, also tissue maps such as ``image_GM``; None for the volumes of the schema.
        split: name of a recorded split.

    Raises:
        DataError: no packed data set, an unknown part, split or variable, or no such record.
        IntegrityError: on reading, stored bytes that differ from those written.
    """

    def __init__(
        self, folder: str | Path, part: str = "train", *, variables: Sequence[str] | None = None, split: str = "default"
    ) -> None:
        self.dataset = open_dataset(folder)
        self.variables = chosen(self.dataset, variables)
        self.keys = self.dataset.keys(part, split).having(self.variables)
        if not self.keys:
            raise DataError(f"{folder}: no record of part {part!r} has {', '.join(self.variables)}")
        self._arguments = (self.dataset.folder, part, self.variables, split)

    def __reduce__(self) -> tuple[Any, ...]:  # another process maps the index again
        folder, part, variables, split = self._arguments
        return functools.partial(Volumes, variables=variables, split=split), (folder, part)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> Sample:
        key = self.keys[i]
        return to_sample(self.dataset, (key, {name: self.dataset.read_stored(key, name) for name in self.variables}))


class Batches(IterableDataset[Sample]):
    """Batches of :class:`Volumes`, collated, in the order of :class:`shards.order.Order`, without an end.

    Give it to a ``DataLoader`` with ``batch_size=None``. The batches do not depend on the number of its workers, and
    all ranks together have the same ones whatever their number. A batch also holds its ``step``: after
    ``load_state_dict({"step": step + 1})``, with any number of ranks and workers, the following one comes first.
    torchdata's ``StatefulDataLoader`` stores and restores the state by itself.

    Args:
        folder, part, variables, split: see :class:`Volumes`.
        batch: samples per step, over all ranks.
        seed: of the permutations.
        steps: the step before which to end; None for no end. An epoch has ``order.steps_per_epoch`` steps.
        rank, world: of this process; None for those of ``torch.distributed``, without it 0 and 1.

    Raises:
        DataError: as :class:`Volumes`, and fewer samples in a batch than ranks.
    """

    def __init__(
        self,
        folder: str | Path,
        part: str = "train",
        *,
        batch: int,
        seed: int = 0,
        steps: int | None = None,
        variables: Sequence[str] | None = None,
        split: str = "default",
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if distributed else 0
        self.world = world if world is not None else torch.distributed.get_world_size() if distributed else 1
        if not 0 <= self.rank < self.world <= batch:
            raise DataError(f"rank {self.rank} of {self.world} with batches of {batch}: each rank needs a sample")
        self.volumes = Volumes(folder, part, variables=variables, split=split)
        self.order = Order(len(self.volumes), batch, seed)
        self.steps = steps
        self._start = self._next = Position(0)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker = (info.id, info.num_workers) if info else None
        if self._start.worker not in (None, worker):
            raise DataError(
                f"the state is of worker {self._start.worker}, this one is {worker} (number, of how many): keep "
                'num_workers, or load {"step": ...} alone'
            )
        first, stride = worker or (0, 1)  # a DataLoader takes one batch of each worker in turn
        step = self._start.step + (0 if self._start.worker else first)
        while self.steps is None or step < self.steps:
            samples = default_collate([self.volumes[i] for i in self.order.part(step, self.rank, self.world)])
            self._next = Position(step + stride, worker)
            yield {"step": step, **samples}
            step += stride

    def _identity(self) -> dict[str, Any]:
        """What the order depends on."""
        index = self.volumes.dataset.index
        rows = hashlib.sha256(np.asarray(self.volumes.keys.rows, "<i8").tobytes()).hexdigest()[:16]
        order = {"samples": self.order.n, "batch": self.order.batch, "seed": self.order.seed}
        return {"data": index.digest, "records": rows, **order}

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the order depends on."""
        return {**self._next._asdict(), **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin each ``iter()`` at ``state["step"]``.

        Raises:
            DataError: a state of other data, another part or split, another batch or another seed.
        """
        for name, here in self._identity().items():
            if state.get(name, here) != here:
                raise DataError(
                    f"the state has {name} {state[name]}, here it is {here}: the order would be another one"
                )
        worker = state.get("worker")
        self._start = self._next = Position(int(state["step"]), (int(worker[0]), int(worker[1])) if worker else None)


def stream(
    source: str | Path | Sequence[str],
    part: str = "train",
    *,
    index: str | Path | None = None,
    variables: Sequence[str] | None = None,
    split: str = "default",
    **options: Any,
) -> Any:
    """A pipeline of the library `webdataset` that reads tar shards from the first byte to the last, also over HTTP.

    Only the index has to be on this machine. Nodes and workers of a ``DataLoader`` share the shards; the order is that
    of `webdataset`. A pass ends with an error where a shard lacks a record.

    Args:
        source: a packed data set of format ``webdataset``, or URLs of its shards: a list, or one with braces as in
            ``https://host/packed/shards/shard-{00000..00099}.tar``.
        part, variables, split: see :class:`Volumes`, whose samples the pipeline yields.
        index: with URLs, a folder that holds the index: all files of the data set's folder but its shards.
        options: of ``webdataset.WebDataset``, such as ``shardshuffle``, ``seed``, ``cache_dir`` and ``resampled``.

    Returns:
        ``webdataset.WebDataset``, an iterable data set with methods such as ``shuffle`` and ``batched``.

    Raises:
        DataError: as :class:`Volumes`, a data set of another format, or URLs without an index.
        IntegrityError: on reading, stored bytes that differ from those written, or records that are missing.
    """
    import webdataset

    if index is None and (not isinstance(source, (str, Path)) or "{" in str(source) or not Path(source).is_dir()):
        raise DataError(f"{source}: no folder; with URLs of shards, `index` names a folder with their index.json")
    volumes = Volumes(source if index is None else index, part, variables=variables, split=split)  # type: ignore[arg-type]
    dataset = volumes.dataset
    if dataset.index.storage != "webdataset":
        raise DataError(f"{dataset.folder}: a data set of format {dataset.index.storage}; only webdataset is streamed")
    if index is None:
        source = [str(dataset.folder / name) for name in dataset.index.files if name.endswith(".tar")]
    records = StreamedRecords(dataset, volumes.keys, volumes.variables)
    options = {"shardshuffle": False, "nodesplitter": webdataset.split_by_node, **options}
    _warn_of_others(source, records, part)
    pipeline = webdataset.WebDataset(source, select_files=records.wants, **options)
    openers = (webdataset.cache.StreamingOpen, webdataset.cache.FileCache)
    opening = next(i for i, stage in enumerate(pipeline.pipeline) if isinstance(stage, openers))
    pipeline.pipeline.insert(opening + 1, records.count)
    return pipeline.compose(records).map(functools.partial(to_sample, dataset))


def _warn_of_others(source: Any, records: StreamedRecords, part: str) -> None:
    """Warn of shards that hold wanted records and are not among the URLs, as those of a data set that has grown."""
    from webdataset.shardlists import expand_urls

    urls = expand_urls(source) if isinstance(source, str) else source if isinstance(source, (list, tuple)) else []
    others = sorted(set(records.counts) - {shard_name(str(url)) for url in urls})
    if urls and others:
        left = sum(records.counts[name] for name in others)
        warnings.warn(
            f"{left:,} of {records.counts.total():,} records of part {part!r} are in shards that the URLs leave out: "
            f"{named(others)}",
            stacklevel=3,
        )


def to_sample(dataset: Dataset, record: tuple[str, Mapping[str, NDArray[Any]]]) -> Sample:
    """(key, arrays) as a sample of :class:`Volumes`."""
    key, arrays = record
    specs = dataset.index.arrays
    volumes = {name: to_tensor(array, specs[name].get("scale", MAP_SCALE)) for name, array in arrays.items()}
    return {"key": key, **volumes, "values": numbers(dataset.index.schema, dataset.values(key))}


def chosen(dataset: Dataset, variables: Sequence[str] | None) -> list[str]:
    """The volume variables to read.

    Raises:
        DataError: an unknown one.
    """
    names = [v.name for v in dataset.index.schema.volumes] if variables is None else list(variables)
    for name in names:
        if name not in dataset.index.arrays:
            raise DataError(f"{dataset.folder}: {nearest(name, dataset.index.arrays, 'volume')}")
    return names


def to_tensor(array: NDArray[Any], scale: float) -> Tensor:
    """float32, (1, H, W, D) of a volume, in memory of its own; whole numbers are multiplied by ``scale``."""
    stored = torch.from_dlpack(array.reshape((1,) * (4 - array.ndim) + array.shape))  # also of read-only arrays
    values = stored.to(torch.float32, copy=True)
    return values if stored.is_floating_point() else values.div_(1 / scale)


def numbers(schema: Schema, values: Mapping[str, Value]) -> dict[str, Tensor]:
    """Scalar variables as tensors; see :class:`Volumes`."""
    found = {}
    for variable in schema.scalars:
        value = values[variable.name]
        if variable.kind == "categorical":
            found[variable.name] = torch.tensor(-1 if value is None else variable.classes.index(str(value)))
        else:
            found[variable.name] = torch.tensor(float("nan") if value is None else float(value), dtype=torch.float32)
    return found
