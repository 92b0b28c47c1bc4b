"""Laws of the stored form: schema, index, writer, both formats, loader, order."""

import dataclasses
import hashlib
import itertools
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from shards.dataset import open_dataset
from shards.errors import DataError, IntegrityError
from shards.index import Index
from shards.order import Order, prefetch
from shards.schema import Schema, Variable
from shards.verify import verify
from shards.writer import DatasetWriter
from tests.stored import ARRAYS, SCHEMA, SHAPE, STORAGES

Volumes = dict[str, dict[str, np.ndarray]]


@pytest.fixture
def volumes() -> Volumes:
    """Seven records; the last three lack the second volume."""
    rng = np.random.default_rng(0)
    names = [("scan", "mask") if i < 4 else ("scan",) for i in range(7)]
    return {f"sub-{i}": {n: rng.random(SHAPE).astype(np.float16) for n in own} for i, own in enumerate(names)}


def write(folder: Path, storage: str, volumes: Volumes, stop: int | None = None) -> None:
    writer = DatasetWriter(folder, storage, "volumes", SCHEMA, ARRAYS, {"spacing": 2.0})
    for i, (key, arrays) in enumerate(volumes.items()):
        if i == stop:
            writer.close()
            return
        writer.add(key, key, {"weight": 50.0 + i, "hand": "L" if i % 2 else None}, arrays)
    writer.finish()


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_written_is_read(tmp_path: Path, storage: str, volumes: Volumes) -> None:
    write(tmp_path, storage, volumes)
    dataset = pickle.loads(pickle.dumps(open_dataset(tmp_path)))  # noqa: S301 - our own bytes
    assert dataset.keys() == list(volumes)
    for key, arrays in volumes.items():
        for name in ARRAYS:
            assert dataset.has(key, name) == (name in arrays)
            if name in arrays:
                np.testing.assert_array_equal(dataset.read(key, name), arrays[name], strict=True)
    assert dataset.values("sub-3") == {"weight": 53.0, "hand": "L"}
    assert dataset.values("sub-4") == {"weight": 54.0, "hand": None}
    with pytest.raises(LookupError, match="sub-6 has no mask"):
        dataset.read("sub-6", "mask")
    with pytest.raises(LookupError, match="no record 'sub-9'"):
        dataset.read("sub-9", "scan")


def test_formats_agree_and_have_one_digest(tmp_path: Path, volumes: Volumes) -> None:
    digests = set()
    for storage in STORAGES:
        write(tmp_path / storage, storage, volumes)
        digests.add(open_dataset(tmp_path / storage).index.digest)
    assert len(digests) == 1
    volumes["sub-0"]["scan"][0, 0, 0] += 1
    write(tmp_path / "other", "zarr", volumes)
    assert open_dataset(tmp_path / "other").index.digest not in digests


def test_webdataset_reads_the_shards_as_they_are(tmp_path: Path, volumes: Volumes) -> None:
    write(tmp_path, "webdataset", volumes)
    shards = sorted(map(str, (tmp_path / "shards").glob("*.tar")))
    samples = list(wds.WebDataset(shards, shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == list(volumes)
    for sample in samples:
        for name, array in volumes[sample["__key__"]].items():
            np.testing.assert_array_equal(sample[f"{name}.npy"], array)
    assert samples[1]["json"]["values"] == {"weight": 51.0, "hand": "L"}


def test_tar_bytes_are_a_function_of_the_content(tmp_path: Path, volumes: Volumes) -> None:
    """No time, user or machine is in a shard, and its bytes do not change between versions of the program."""
    write(tmp_path, "webdataset", volumes)
    shard = tmp_path / "shards/shard-00000.tar"
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:4]] == ["sub-0.json", "sub-0.scan.npy", "sub-0.mask.npy", "sub-1.json"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o444)}
    assert (
        hashlib.sha256(shard.read_bytes()).hexdigest()
        == "c30b54f33fce6074bd28585e5d6fc1c4d5bd87161e79c3bf037c36410dbadae6"
    )


def test_a_key_that_a_tar_file_cannot_hold_is_refused(tmp_path: Path, volumes: Volumes) -> None:
    schema = Schema.from_dict({"v" * 32: {"kind": "volume", "suffix": "T1w"}})
    arrays = {"v" * 32: {"shape": SHAPE, "dtype": "float16"}}
    writer = DatasetWriter(tmp_path, "webdataset", "volumes", schema, arrays, {})
    with pytest.raises(DataError, match="longer than a name in a tar file"):
        writer.add("s" * 81, "sub-0", {}, {"v" * 32: volumes["sub-0"]["scan"]})


def test_tar_data_are_aligned(tmp_path: Path, volumes: Volumes) -> None:
    write(tmp_path, "webdataset", volumes)
    for record in open_dataset(tmp_path).index.records:
        assert all((offset - 128) % 512 == 0 for offset in record.offsets.values())  # 128: the .npy header


@pytest.mark.parametrize("storage", STORAGES)
def test_after_an_interruption_the_same_bytes_are_written(
    tmp_path: Path, storage: str, volumes: Volumes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.shard_writer.SHARD_RECORDS", 2)
    write(tmp_path / "once", storage, volumes)
    for stop in (1, 4, 5):
        write(tmp_path / "twice", storage, volumes, stop)
        with pytest.raises(DataError, match="no packed data set"):
            open_dataset(tmp_path / "twice")
    write(tmp_path / "twice", storage, volumes)
    assert content(tmp_path / "once") == content(tmp_path / "twice")


@pytest.mark.parametrize("storage", STORAGES)
def test_every_single_bit_counts(tmp_path: Path, storage: str, volumes: Volumes) -> None:
    """Flip one bit in turn all over each file: verify names the file, and the member where the bit lies in one."""
    write(tmp_path, storage, volumes)
    assert list(verify(tmp_path)) == []
    rng = np.random.default_rng(1)
    for path in (p for p in sorted(tmp_path.rglob("*")) if p.is_file()):
        whole = path.read_bytes()
        name = path.relative_to(tmp_path).as_posix()
        for byte in [0, len(whole) - 1, *rng.integers(0, len(whole), 12)]:
            broken = bytearray(whole)
            broken[byte] ^= 1 << rng.integers(8)
            path.write_bytes(broken)
            damages = list(verify(tmp_path))
            assert damages and all(str(damage).startswith(name) for damage in damages), (name, byte)
        path.write_bytes(whole[:-1])
        assert any(damage.file == name for damage in verify(tmp_path))
        path.write_bytes(whole)
    assert list(verify(tmp_path)) == []


def test_damage_is_named_by_member(tmp_path: Path, volumes: Volumes) -> None:
    for storage in STORAGES:
        write(tmp_path / storage, storage, volumes)
    shard = tmp_path / "webdataset/shards/shard-00000.tar"
    raw = shard.read_bytes()
    places = {
        b"sub-3.scan.npy": (0, 0),
        b"sub-2.json": (512 + 3, 0),
        b"sub-1.mask.npy": (512 + 128 + 5, 512 + 128),
        b"sub-0.scan.npy": (512 + 128 + 2 * 6 * 7 * 8 + 1, 512 + 128 + 2 * 6 * 7 * 8),  # padding
    }
    for needle, (offset, piece) in places.items():
        broken = bytearray(raw)
        broken[raw.index(needle) + offset] ^= 4
        member = f"{needle.decode()} at byte {raw.index(needle) + piece:,}"
        shard.write_bytes(broken)
        assert list(map(str, verify(tmp_path / "webdataset"))) == [f"shards/shard-00000.tar: {member}: damaged"]
    dataset = open_dataset(tmp_path / "webdataset")
    shard.write_bytes(raw.replace(volumes["sub-5"]["scan"].tobytes(), bytes(2 * 6 * 7 * 8)))
    with pytest.raises(IntegrityError, match="sub-5 scan"):
        dataset.read("sub-5", "scan")
    np.testing.assert_array_equal(dataset.read("sub-4", "scan"), volumes["sub-4"]["scan"])

    chunk = tmp_path / "zarr/data.zarr/mask/c/0/0/0/0"
    broken = bytearray(chunk.read_bytes())
    broken[20] ^= 1  # within the first volume
    chunk.write_bytes(broken)
    assert list(map(str, verify(tmp_path / "zarr"))) == ["data.zarr/mask/c/0/0/0/0: sub-0 mask at byte 0: damaged"]
    with pytest.raises(IntegrityError, match="sub-0"):
        open_dataset(tmp_path / "zarr").read("sub-0", "mask")
    chunk.unlink()
    assert list(map(str, verify(tmp_path / "zarr"))) == ["data.zarr/mask/c/0/0/0/0: missing"]


def test_index_survives_a_round_trip(tmp_path: Path, volumes: Volumes) -> None:
    write(tmp_path, "zarr", volumes)
    index = Index.load(tmp_path)
    dataclasses.replace(index, extra={"scale": {"scan": 0.5}}).save(tmp_path)
    again = Index.load(tmp_path)
    assert again.extra == {"scale": {"scan": 0.5}}
    assert dataclasses.replace(again, extra={}) == index


def test_writer_refuses_what_does_not_fit(tmp_path: Path, volumes: Volumes) -> None:
    write(tmp_path, "zarr", volumes)
    with pytest.raises(DataError, match="already holds a packed data set"):
        DatasetWriter(tmp_path, "zarr", "volumes", SCHEMA, ARRAYS, {})
    writer = DatasetWriter(tmp_path / "new", "webdataset", "volumes", SCHEMA, ARRAYS, {})
    with pytest.raises(DataError, match="another process"):
        DatasetWriter(tmp_path / "new", "webdataset", "volumes", SCHEMA, ARRAYS, {})
    scan = volumes["sub-0"]["scan"]
    writer.add("sub-0", "sub-0", {}, {"scan": scan})
    with pytest.raises(DataError, match="added twice"):
        writer.add("sub-0", "sub-0", {}, {"scan": scan})
    with pytest.raises(DataError, match="Did you mean 'scan'"):
        writer.add("sub-1", "sub-1", {}, {"scans": scan})
    with pytest.raises(DataError, match="declared as"):
        writer.add("sub-1", "sub-1", {}, {"scan": scan.astype(np.float32)})
    with pytest.raises(DataError, match="Did you mean 'zarr'"):
        DatasetWriter(tmp_path / "x", "zar", "volumes", SCHEMA, ARRAYS, {})


# --- order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (5, 8), (12, 3), (1, 2)])
def test_each_epoch_is_a_permutation(n: int, batch: int) -> None:
    order = Order(n, batch, seed=3)
    stream = [i for step in range(4 * n) for i in order.indices(step)]
    epochs = [stream[k : k + n] for k in range(0, len(stream) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    seen = {i for step in range(order.steps_per_epoch) for i in order.indices(step)}
    assert seen == set(range(n))
    if n > 6:
        assert epochs[0] != epochs[1]
        assert stream[:n] != [i for step in range(n) for i in Order(n, batch, seed=4).indices(step)][:n]


def test_order_is_elastic_and_resumable() -> None:
    order = Order(50, 12, seed=0)
    for step in (0, 3, 4, 999):
        whole = order.indices(step)
        assert Order(50, 12, seed=0).indices(step) == whole  # without having gone through the steps before
        for world in (1, 2, 3, 5, 12):
            assert [i for rank in range(world) for i in order.part(step, rank, world)] == whole
    assert pickle.loads(pickle.dumps(order)).indices(7) == order.indices(7)  # noqa: S301 - our own bytes


def test_prefetch_keeps_order_and_raises_in_turn() -> None:
    def load(step: int) -> int:
        if step == 7:
            raise ValueError("seven")
        return step * step

    squares = prefetch(load, itertools.count(), threads=3, depth=5)
    assert [next(squares) for _ in range(7)] == [s * s for s in range(7)]
    with pytest.raises(ValueError, match="seven"):
        next(squares)
    assert list(prefetch(load, range(3))) == [0, 1, 4]


# --- schema -------------------------------------------------------------------------------------------------------


def test_schema_round_trip_and_default() -> None:
    assert Schema.from_dict(SCHEMA.to_dict()) == SCHEMA
    default = Schema.load()
    assert Schema.from_dict(default.to_dict()) == default
    assert [v.kind for v in default] == ["volume", "continuous", "categorical"]


def test_cells() -> None:
    weight, hand = SCHEMA["weight"], SCHEMA["hand"]
    assert weight.parse(" 70.5 ") == 70.5
    assert [weight.parse(t) for t in ("", "n/a", "NaN", "NA")] == [None] * 4
    assert [hand.parse(t) for t in ("L", "left", "LEFT", "r", "n/a")] == ["L", "L", "L", "R", None]
    for variable, cell, reason in [
        (weight, "301", "301 is outside the range 0 to 300"),
        (weight, "-1", "outside the range"),
        (weight, "inf", "outside the range"),
        (weight, "70,5", "not a number"),
        (weight, "7_0", "not a number"),
        (hand, "both", "unknown category 'both'"),
    ]:
        with pytest.raises(ValueError, match=reason):
            variable.parse(cell)
    stage = Variable.from_dict("stage", {"kind": "ordinal", "range": [0, 3], "values": {"mild": 1, "severe": 3}})
    assert [stage.parse(t) for t in ("mild", "2", "n/a")] == [1, 2, None]
    with pytest.raises(ValueError, match="not a whole number"):
        stage.parse("1.5")
    coded = Variable.from_dict("hand", {"kind": "continuous", "range": [0, 1], "values": {"L": 0, "R": 1}})
    assert [coded.parse(t) for t in ("L", "R", "0.5", "n/a")] == [0, 1, 0.5, None]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"a": {"kind": "volum", "suffix": "T1w"}}, "Did you mean 'volume'"),
        ({"a": {"kind": "volume"}}, "needs the suffix"),
        ({"a": {"kind": "continuous", "rnge": [0, 1]}}, "Did you mean 'range'"),
        ({"a": {"kind": "continuous"}}, "needs a finite range"),
        ({"a": {"kind": "continuous", "range": [1, 0]}}, "smallest, largest"),
        ({"a": {"kind": "ordinal"}}, "needs a finite range"),
        ({"a": {"kind": "ordinal", "range": [0, 2.5]}}, "whole numbers"),
        ({"a": {"kind": "categorical", "classes": ["x"]}}, "two or more"),
        ({"a": {"kind": "categorical", "classes": [True, False]}}, "in quotes"),
        ({"a": {"kind": "categorical", "classes": ["x", "y"], "aliases": {"z": "w"}}}, "alias z"),
        ({"a b": {"kind": "volume", "suffix": "T1w"}}, "not a variable name"),
        ({"a": "volume"}, "needs keys"),
        ({}, "expected variables"),
    ],
)
def test_bad_schemas_are_refused(spec: dict, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        Schema.from_dict(spec)


def test_unknown_names_get_the_nearest(tmp_path: Path, volumes: Volumes) -> None:
    with pytest.raises(DataError, match="Did you mean 'weight'"):
        SCHEMA["wieght"]
    with pytest.raises(DataError, match="Did you mean 'default'"):
        Schema.load("defalt")
    (tmp_path / "bad.yaml").write_text("a: !!python/object/apply:os.getcwd []")
    with pytest.raises(DataError, match="not readable as YAML"):
        Schema.load(tmp_path / "bad.yaml")
    write(tmp_path, "zarr", volumes)
    with pytest.raises(DataError, match="Did you mean 'test'"):
        open_dataset(tmp_path).keys("tst")
    with pytest.raises(DataError, match="unknown split"):
        open_dataset(tmp_path).keys("test", split="fold-1")
