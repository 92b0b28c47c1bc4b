"""Packed data sets in PyTorch's loaders, torchdata's and webdataset's: order, resumption, division, damage."""

import itertools
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from torch.utils.data import DataLoader

from shards.dataset import open_dataset
from shards.errors import DataError, IntegrityError
from shards.schema import Schema
from shards.torch import Batches, Volumes, stream
from shards.writer import DatasetWriter
from tests.packing import split_of

SHAPE = (4, 5, 6)
SCHEMA = Schema.from_dict(
    {
        "scan": {"kind": "volume", "suffix": "T1w"},
        "age": {"kind": "continuous", "range": [0, 120]},
        "hand": {"kind": "categorical", "classes": ["L", "R"]},
    }
)
ARRAYS = {"scan": {"shape": SHAPE, "dtype": "float16"}, "scan_GM": {"shape": SHAPE, "dtype": "uint8"}}
KEYS = [f"sub-{i}" for i in range(10)]


def volume(i: int) -> np.ndarray:
    return np.random.default_rng(i).random(SHAPE).astype(np.float16)


@pytest.fixture(params=["zarr", "webdataset"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten records, the last three for testing; sub-3 has no scan, sub-4 no map, sub-5 no age and no hand."""
    return write(tmp_path / "packed", request.param, monkeypatch)


@pytest.fixture
def tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same records as tar shards of two."""
    return write(tmp_path / "packed", "webdataset", monkeypatch)


def write(out: Path, storage: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("shards.shard_writer.SHARD_RECORDS", 2)
    writer = DatasetWriter(out, storage, "volumes", SCHEMA, ARRAYS, {})
    for i, key in enumerate(KEYS):
        arrays: dict[str, Any] = {"scan": volume(i), "scan_GM": np.full(SHAPE, 51 * (i % 6), np.uint8)}
        if i in (3, 4):
            del arrays["scan" if i == 3 else "scan_GM"]
        values = {} if i == 5 else {"age": 20.0 + i, "hand": "LR"[i % 2]}
        writer.add(key, key, values, arrays)
    writer.finish({"default": split_of({key: "train" if i < 7 else "test" for i, key in enumerate(KEYS)})})
    return out


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_volumes_are_float32_tensors_and_scalars_have_a_number_also_where_missing(folder: Path) -> None:
    data = Volumes(folder, "train", variables=["scan", "scan_GM"])
    assert data.keys == ["sub-0", "sub-1", "sub-2", "sub-5", "sub-6"]  # those that have both
    sample = data[1]
    assert sample["key"] == "sub-1"
    assert sample["scan"].dtype == torch.float32
    np.testing.assert_array_equal(sample["scan"], volume(1).astype(np.float32)[None])
    np.testing.assert_allclose(sample["scan_GM"], 0.2)
    batch = next(iter(DataLoader(data, batch_size=5)))
    torch.testing.assert_close(batch["values"]["age"], torch.tensor([20, 21, 22, torch.nan, 26]), equal_nan=True)
    assert batch["values"]["hand"].tolist() == [0, 1, 0, -1, 0]
    assert batch["scan"].shape == (5, 1, *SHAPE)


def test_volumes_are_those_of_the_schema_and_parts_those_of_the_split(folder: Path) -> None:
    assert Volumes(folder).variables == ["scan"]
    assert Volumes(folder, "test").keys == ["sub-7", "sub-8", "sub-9"]
    with pytest.raises(DataError, match="Did you mean 'scan'"):
        Volumes(folder, variables=["scam"])
    with pytest.raises(DataError, match="no record of part 'validation' has scan"):
        Volumes(folder, "validation")


def take(data: Batches, n: int, workers: int = 0) -> list[list[str]]:
    """The keys of the first ``n`` batches."""
    loader = DataLoader(data, batch_size=None, num_workers=workers)
    return [batch["key"] for batch in itertools.islice(loader, n)]


def test_batches_are_in_the_order_of_training_for_any_number_of_workers_and_ranks(folder: Path) -> None:
    data = Batches(folder, batch=4, seed=3, steps=9)
    expected = [[data.volumes.keys[i] for i in data.order.indices(step)] for step in range(9)]
    assert take(data, 99) == expected
    assert take(data, 99) == expected  # each iteration begins where the state is
    assert take(data, 99, workers=2) == expected
    parts = [take(Batches(folder, batch=4, seed=3, steps=9, rank=rank, world=3), 99) for rank in range(3)]
    assert [list(itertools.chain(*ranks)) for ranks in zip(*parts)] == expected
    with pytest.raises(DataError, match="each rank needs a sample"):
        Batches(folder, batch=2, rank=0, world=3)


def test_batches_go_on_at_any_step_with_another_number_of_workers(folder: Path) -> None:
    data = Batches(folder, batch=4, seed=3)
    expected = take(data, 12)
    batch = next(itertools.islice(DataLoader(data, batch_size=None, num_workers=2), 4, None))
    assert batch["step"] == 4
    for workers in (0, 1, 3):
        again = Batches(folder, batch=4, seed=3)
        again.load_state_dict({"step": batch["step"] + 1})
        assert take(again, 7, workers) == expected[5:]


def test_the_state_of_an_iteration_is_restored_by_name(folder: Path) -> None:
    data = Batches(folder, batch=4, seed=3)
    batches = iter(data)
    assert [next(batches)["step"] for _ in range(3)] == [0, 1, 2]
    state = pickle.loads(pickle.dumps(data)).state_dict()  # noqa: S301 - our own bytes
    again = Batches(folder, batch=4, seed=3)
    again.load_state_dict(state)
    assert next(iter(again))["step"] == 3
    for name, other in (("batch", Batches(folder, batch=5, seed=3)), ("seed", Batches(folder, batch=4))):
        with pytest.raises(DataError, match=f"the state has {name}"):
            other.load_state_dict(state)
    with pytest.raises(DataError, match="the state has records"):
        Batches(folder, "all", batch=4, seed=3).load_state_dict({**state, "samples": 9})
    again.load_state_dict({**state, "worker": [1, 2]})
    with pytest.raises(DataError, match="keep num_workers"):
        next(iter(again))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_goes_on_after_a_batch(tars: Path, workers: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def loader() -> Any:
        return stateful(Batches(tars, batch=4, seed=3, steps=11), batch_size=None, num_workers=workers)

    expected = [batch["key"] for batch in loader()]
    first, second = loader(), loader()
    begun = [batch["key"] for batch in itertools.islice(first, 5)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [batch["key"] for batch in second] == expected


def test_damage_is_an_error_also_in_a_worker(tars: Path) -> None:
    flip(tars / "shards/shard-00000.tar", open_dataset(tars).record("sub-0").offsets["scan"])
    with pytest.raises(IntegrityError, match="sub-0 scan"):
        list(DataLoader(Volumes(tars, "all"), num_workers=1))


def test_a_stream_has_the_samples_of_the_part(tars: Path) -> None:
    expected = Volumes(tars, "train", variables=["scan", "scan_GM"])
    urls = f"{tars}/shards/shard-{{00000..00004}}.tar"
    for pipeline in (
        stream(tars, variables=expected.variables),
        stream(urls, index=tars, variables=expected.variables, shardshuffle=10, seed=1),
        pickle.loads(pickle.dumps(stream(tars, variables=expected.variables))),  # noqa: S301 - our own bytes
    ):
        found = sorted(pipeline, key=lambda sample: sample["key"])
        for sample, known in zip(found, expected, strict=True):
            assert sample["key"] == known["key"] and sample["values"].keys() == known["values"].keys()
            torch.testing.assert_close(sample["scan_GM"], known["scan_GM"])
            torch.testing.assert_close(sample["scan"], known["scan"])


def test_workers_share_the_shards_of_a_stream(tars: Path) -> None:
    loader = DataLoader(stream(tars, "all"), batch_size=2, num_workers=2)
    found = [key for batch in loader for key in batch["key"]]
    assert sorted(found) == [key for key in KEYS if key != "sub-3"]


def test_a_stream_needs_an_index_and_tar_shards(tmp_path: Path, tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="`index` names a folder"):
        stream(f"{tars}/shards/shard-{{00000..00004}}.tar")
    with pytest.raises(DataError, match="only webdataset is streamed"):
        stream(write(tmp_path / "zarr", "zarr", monkeypatch))


def test_no_damage_of_a_shard_is_read_in_silence(tars: Path) -> None:
    """Each byte of an array, and every place at which a file may be cut off."""
    shard = tars / "shards/shard-00000.tar"
    intact = shard.read_bytes()
    offset = open_dataset(tars).record("sub-0").offsets["scan"]
    flip(shard, offset + 7)
    with pytest.raises(IntegrityError, match="sub-0 scan is damaged"):
        list(stream(tars))
    for end in range(0, len(intact) - 10240, 512):
        shard.write_bytes(intact[:end])
        with pytest.raises(Exception, match=r"cut off|unexpected end|empty file|shard-00000"):
            list(stream(tars))
    shard.write_bytes(bytes(len(intact)))  # as some file systems leave it after a crash
    with pytest.raises(IntegrityError, match=r"shard-00000\.tar: 0 of 2 records"):
        list(stream(tars))
    shard.write_bytes(intact)
    assert len(list(stream(tars))) == 6


def test_a_shard_is_counted_each_time_that_it_is_drawn(tars: Path) -> None:
    """Sampling with replacement draws the same shard twice in a row, and one shard alone without an end."""
    for seed in range(3):
        assert len(list(itertools.islice(stream(tars, resampled=True, seed=seed), 40))) == 40
    shard = tars / "shards/shard-00000.tar"
    with pytest.warns(UserWarning, match="4 of 6 records"):
        assert len(list(itertools.islice(stream([str(shard)], index=tars, resampled=True), 9))) == 9
    with tarfile.open(shard) as members:
        end = next(member.offset for member in members if member.name.startswith("sub-1."))
    shard.write_bytes(shard.read_bytes()[:end])
    with pytest.warns(UserWarning), pytest.raises(IntegrityError, match="1 of 2 records"):
        list(itertools.islice(stream([str(shard)], index=tars, resampled=True), 9))


def test_a_shard_is_known_in_whatever_a_url_has_behind_it(tars: Path) -> None:
    urls = [f"pipe:cat {shard} | cat -" for shard in sorted((tars / "shards").iterdir())]
    assert len(list(stream(urls, index=tars))) == 6


def test_shards_that_the_urls_leave_out_are_named(tars: Path) -> None:
    urls = f"{tars}/shards/shard-{{00000..00002}}.tar"
    with pytest.warns(UserWarning, match="1 of 6 records of part 'train' are in shards .*: shard-00003.tar$"):
        assert len(list(stream(urls, index=tars))) == 5


def test_plain_webdataset_reads_urls_with_braces(tars: Path) -> None:
    samples = list(wds.WebDataset(f"{tars}/shards/shard-{{00000..00004}}.tar", shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == KEYS
    np.testing.assert_array_equal(samples[6]["scan.npy"], volume(6))
