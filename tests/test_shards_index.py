"""Laws of the index: lazily read sequences are lists, every bit counts, version 1 is read and upgraded."""

import dataclasses
import itertools
import multiprocessing
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from shards.__main__ import main
from shards.dataset import Dataset, open_dataset
from shards.errors import DataError, IntegrityError
from shards.files import locked_folder, sha256
from shards.header import read_header
from shards.index import Index, Record, Split
from shards.index_copy import COPY
from shards.record_table import Assignment, Keys, Records
from shards.records import BATCH_ROWS
from shards.shard_writer import ShardWriter, records_per_shard
from shards.split import record_split
from shards.tables import NAMES
from shards.upgrade import upgrade
from shards.verify import verify
from shards.zarr_store import metadata
from tests.stored import ARRAYS, PARTS, SCHEMA, SHAPE, STORAGES, as_version_1, facts, stored

MANY = 2 * BATCH_ROWS + 5


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.shard_writer.SHARD_RECORDS", 3)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record], dict[str, str]]:
    """An index of several batches, its records, and the parts of a split."""
    folder = tmp_path_factory.mktemp("many")
    records = [
        Record(
            f"sub-{i}_ses-1",
            f"sub-{i}",
            f"sub-{i - i % 3}",
            {"weight": i / 7 if i % 5 else None, "hand": None},
            {},
            "",
            {},
        )
        for i in range(MANY)
    ]
    assignment = {r.key: PARTS[i % 3] for i, r in enumerate(records) if i % 4}
    splits = {"default": Split("column", 0, [], [], "", assignment)}
    Index("volumes", "zarr", SCHEMA, ARRAYS, {}, records, splits=splits, per_shard=7).save(folder)
    return folder, records, assignment


# --- sequences ----------------------------------------------------------------------------------------------------


def test_records_are_a_list_that_is_read_when_it_is_used(many: tuple[Path, list[Record], dict[str, str]]) -> None:
    folder, records, _ = many
    found = Index.load(folder).records
    assert isinstance(found, Records) and found == records and records == found and list(found) == records
    assert len(found) == MANY and found[-1] == records[-1] and found[BATCH_ROWS] == records[BATCH_ROWS]
    assert found[BATCH_ROWS - 2 : BATCH_ROWS + 2] == records[BATCH_ROWS - 2 : BATCH_ROWS + 2]
    assert found != records[:-1] and found != [*records[:-1], records[0]] and found[9::-2] == records[9::-2]
    with pytest.raises(IndexError):
        found[MANY]
    dataset = open_dataset(folder)
    for i in (0, 17, BATCH_ROWS - 1, BATCH_ROWS, MANY - 1):
        assert dataset.record(records[i].key) == records[i] and dataset.values(records[i].key) == records[i].values


def test_keys_are_a_list_that_is_read_when_it_is_used(many: tuple[Path, list[Record], dict[str, str]]) -> None:
    folder, records, assignment = many
    dataset, everyone = open_dataset(folder), [r.key for r in records]
    assert dataset.keys() == everyone and everyone == dataset.keys("all") and len(dataset) == MANY
    for part in PARTS:
        keys, known = dataset.keys(part), [key for key in everyone if assignment.get(key) == part]
        assert isinstance(keys, Keys) and keys == known and list(keys) == known and len(keys) == len(known)
        assert keys[5] == known[5] and keys[-1] == known[-1] and keys[3:9] == known[3:9] and keys[::-2] == known[::-2]
        assert known[7] in keys and "sub-x" not in keys and records[0].key not in keys and 7 not in keys
        assert keys + known == known + keys == [*known, *known] and set(keys) == set(known)
        assert sorted(keys) == sorted(known) and repr(keys[:2]) == repr(known[:2]) and "keys" in repr(keys)
    assert not dataset.keys()[:0] and keys != known[:-1]


def test_an_assignment_is_a_dictionary_that_is_read_when_it_is_used(
    many: tuple[Path, list[Record], dict[str, str]],
) -> None:
    folder, _, assignment = many
    found = Index.load(folder).split().assignment
    assert (
        isinstance(found, Assignment) and found == assignment and assignment == found and len(found) == len(assignment)
    )
    assert list(found) == list(assignment) and list(found.items()) == list(assignment.items())
    assert list(found.values()) == list(assignment.values()) and dict(found) == assignment
    assert found.get("sub-0_ses-1") is None and "sub-0_ses-1" not in found and "sub-1_ses-1" in found
    with pytest.raises(KeyError):
        found["sub-x"]


def test_keys_of_equal_hash_are_distinguished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("record_table", "tables"):
        monkeypatch.setattr(f"shards.{module}.key_hash", lambda key: np.uint64(len(key)))
    stored(tmp_path, "zarr")
    dataset = open_dataset(tmp_path)
    assert [dataset.record(f"sub-{i}").key for i in range(8)] == list(dataset.keys())
    with pytest.raises(LookupError, match="no record 'sub-9'"):
        dataset.record("sub-9")


def test_two_records_of_one_key_are_refused(tmp_path: Path) -> None:
    index = Index.load(stored(tmp_path / "a", "zarr"))
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="sub-3: two records"):
        dataclasses.replace(index, records=[*index.records, index.records[3]]).save(tmp_path / "b")


def test_a_figure_that_is_no_number_is_refused(tmp_path: Path) -> None:
    index = Index.load(stored(tmp_path / "a", "zarr"))
    (tmp_path / "b").mkdir()
    for place in (0, 4):
        records = list(index.records)
        records[place] = dataclasses.replace(records[place], figures={"scan.size": float("nan")})
        with pytest.raises(DataError, match=f"sub-{place}: the figure scan.size is nan"):
            dataclasses.replace(index, records=records).save(tmp_path / "b")


# --- every bit, every writer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGES)
def test_a_flipped_bit_is_never_read(tmp_path: Path, storage: str) -> None:
    """In the index it raises; in a shard it raises where the bit belongs to a volume, and nothing changes elsewhere."""
    known, rng = facts(stored(tmp_path, storage)), np.random.default_rng(2)
    for path in (p for p in sorted(tmp_path.rglob("*")) if p.is_file() and p.name != COPY):  # which nobody reads
        raw, of_index = path.read_bytes(), path.parent == tmp_path
        for byte in [0, len(raw) - 1, *rng.integers(0, len(raw), 40 if of_index else 15)]:
            broken = bytearray(raw)
            broken[byte] ^= 1 << rng.integers(8)
            path.write_bytes(broken)
            try:
                found = facts(tmp_path)
            except IntegrityError:
                continue
            assert not of_index and found == known, (path, byte)
        path.write_bytes(raw[:-1])
        if of_index:
            with pytest.raises(IntegrityError):
                facts(tmp_path)
        path.unlink()
        if of_index:
            with pytest.raises(DataError):
                facts(tmp_path)
        path.write_bytes(raw)
    assert facts(tmp_path) == known


def test_a_flipped_bit_of_any_batch_of_records_is_found(
    many: tuple[Path, list[Record], dict[str, str]], tmp_path: Path
) -> None:
    shutil.copytree(many[0], tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.glob("records-*")
    raw = path.read_bytes()
    for byte in range(0, len(raw), len(raw) // 12):
        broken = bytearray(raw)
        broken[byte] ^= 16
        path.write_bytes(broken)
        with pytest.raises(IntegrityError, match=r"records-.*damaged"):
            list(Index.load(tmp_path).records)


@pytest.mark.parametrize("storage", STORAGES)
def test_any_process_writes_any_shard_with_the_same_bytes(tmp_path: Path, storage: str) -> None:
    dataset = open_dataset(stored(tmp_path / "once", storage))
    per_shard, files = records_per_shard(ARRAYS), {}
    for number in (2, 0, 1):
        writer = ShardWriter(tmp_path / "again", storage, number, ARRAYS, per_shard)
        for r in dataset.index.records[number * per_shard : (number + 1) * per_shard]:
            arrays = {v: dataset.read(r.key, v) for v in r.checksums}
            found = writer.add(r.key, r.subject, r.values, arrays, r.affines)
            assert {name: getattr(r, name) for name in vars(found)} == vars(found)
        files |= writer.close()
    assert files == {path: dataset.index.files[path] for path in files}
    assert all(sha256(tmp_path / "again" / path) == entry["sha256"] for path, entry in files.items())


@pytest.mark.parametrize("storage", STORAGES)
def test_a_shard_takes_no_more_than_it_has_places_and_can_be_discarded(tmp_path: Path, storage: str) -> None:
    writer = ShardWriter(tmp_path, storage, 0, ARRAYS, 2)
    writer.skip()
    assert writer.add("sub-0", "sub-0", {}, {"scan": np.zeros(SHAPE, np.float16)}, {}).slot == 1
    with pytest.raises(DataError, match="shard 0 is full"):
        writer.add("sub-1", "sub-1", {}, {}, {})
    assert [p for p in tmp_path.rglob("*") if p.is_file()]
    writer.discard()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_zarr_python_reads_the_store_and_finds_damage(tmp_path: Path) -> None:
    """Also a store with empty places, of which the last record's is the last row."""
    dataset = open_dataset(stored(tmp_path / "a", "zarr"))
    group = zarr.open_group(tmp_path / "a" / "data.zarr", mode="r")
    for i, key in enumerate(dataset.keys()):
        for name in ARRAYS:
            expected = dataset.read(key, name) if dataset.has(key, name) else np.zeros(SHAPE, np.float16)
            np.testing.assert_array_equal(np.asarray(group[name][i]), expected, strict=True)
    file, record = tmp_path / "a/data.zarr/scan/c/0/0/0/0", dataset.record("sub-1")
    raw = bytearray(file.read_bytes())
    raw[record.offsets["scan"] + 100] ^= 1
    file.write_bytes(raw)
    with pytest.raises(Exception, match="checksum"):
        group["scan"][1]
    np.testing.assert_array_equal(np.asarray(group["scan"][0]), dataset.read("sub-0", "scan"))

    scan = np.ones(SHAPE, np.float16)
    writer = ShardWriter(tmp_path / "b", "zarr", 1, ARRAYS, 4)
    writer.skip()
    stored_as = writer.add("sub-0", "sub-0", {}, {"scan": scan}, {})
    files = writer.close()
    for path, content in metadata(ARRAYS, stored_as.slot + 1, 4).items():
        (tmp_path / "b" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / path).write_bytes(content)
    record = Record("sub-0", "sub-0", "sub-0", {"weight": None, "hand": None}, **vars(stored_as))
    Index("volumes", "zarr", SCHEMA, ARRAYS, {}, [record], files=files, per_shard=4).save(tmp_path / "b")
    group = zarr.open_group(tmp_path / "b" / "data.zarr", mode="r")
    assert group["scan"].shape == (6, *SHAPE) and group["mask"].shape == (6, *SHAPE)
    assert not np.any(group["mask"][:]) and not np.any(group["scan"][:5]) and np.all(group["scan"][5] == 1)
    np.testing.assert_array_equal(open_dataset(tmp_path / "b").read("sub-0", "scan"), scan)
    assert open_dataset(tmp_path / "b").record("sub-0") == record


@pytest.mark.parametrize("storage", STORAGES)
def test_threads_and_forked_processes_read_the_same(
    tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more shards than files that stay open."""
    monkeypatch.setattr("shards.stored_files.OPEN_FILES", 1)
    old = open_dataset(as_version_1(stored(tmp_path / "old", storage)))
    dataset = open_dataset(stored(tmp_path / "new", storage))
    jobs = [(r.key, v) for r in dataset.index.records for v in r.checksums] * 50
    known = [dataset.read(*job).tobytes() for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        for opened in (old, dataset):
            assert list(pool.map(lambda job, opened=opened: opened.read(*job).tobytes(), jobs)) == known
    queue = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(target=_read, args=(dataset, jobs, queue.put))
    child.start()
    found = queue.get()
    child.join()
    assert found == known


def _read(dataset: Dataset, jobs: list[tuple[str, str]], put: Callable[[list[bytes]], None]) -> None:
    put([dataset.read(*job).tobytes() for job in jobs])


# --- replacing an index, version 1 --------------------------------------------------------------------------------


def test_another_split_rewrites_neither_records_nor_volumes(tmp_path: Path) -> None:
    before = facts(stored(tmp_path, "zarr"))
    opened, (records,) = open_dataset(tmp_path), tmp_path.glob("records-*")
    inode = records.stat().st_ino
    record_split(tmp_path, None, 2, 0, None, None)
    after = facts(tmp_path)
    assert (
        records.stat().st_ino == inode and len(list(filter(NAMES.fullmatch, (p.name for p in tmp_path.iterdir())))) == 3
    )
    assert list(after["splits"]) == ["default", "fold-1-of-2", "fold-2-of-2"]
    assert after | {"splits": before["splits"]} == before and list(verify(tmp_path)) == []
    assert list(opened.index.splits) == ["default"] and opened.keys("train") == ["sub-0", "sub-3", "sub-6"]
    np.testing.assert_array_equal(opened.read("sub-5", "scan"), open_dataset(tmp_path).read("sub-5", "scan"))


@pytest.mark.parametrize("storage", STORAGES)
def test_version_1_is_read_and_upgraded(
    tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = facts(stored(tmp_path, storage))
    old = facts(as_version_1(tmp_path))
    parts = ("records", "arrays", "index", "splits", "parts")
    assert {part: old[part] for part in parts} == {part: new[part] for part in parts}
    assert list(verify(tmp_path)) == []
    for step in ("write_records", "write_keys", "write_files", "write_header"):  # interrupted before each file

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(f"shards.index.{step}", interrupt)
            upgrade(tmp_path)
        assert facts(tmp_path) == old
    volumes = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.parent != tmp_path}
    assert main(["upgrade", str(tmp_path)]) == 0 and "8 records upgraded" in capsys.readouterr().out
    assert facts(tmp_path) == old and list(verify(tmp_path)) == []
    assert {p: p.stat().st_mtime_ns for p in volumes} == volumes
    sizes = [[v for v in r.checksums if v not in r.sizes] for r in Index.load(tmp_path).records]
    assert sizes == [["mask"] if i == 2 and storage == "zarr" else [] for i in range(8)]  # zarr-python left zeros out
    assert main(["upgrade", str(tmp_path)]) == 0 and "has the present version" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from pathlib import Path
from shards.split import record_split
from shards.upgrade import upgrade
folder, left, replace = Path(sys.argv[1]), int(sys.argv[2]), Path.replace
def count(self, target):
    global left
    left -= 1
    return replace(self, target) if left >= 0 else os.kill(os.getpid(), signal.SIGKILL)
Path.replace = count
upgrade(folder)
record_split(folder, None, 2, 0, None, None)
"""


def test_a_killed_process_leaves_the_old_index_or_the_new_one(tmp_path: Path) -> None:
    """Killed before each step of an upgrade and of another split in turn; then both are done."""
    old, states = facts(as_version_1(stored(tmp_path / "old", "zarr"))), []
    for steps in itertools.count():
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / str(steps)))
        command = [sys.executable, "-c", KILLED, str(folder), str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        found = facts(folder)
        states.append((read_header(folder)["version"], len(found["splits"])))
        assert found | {"splits": old["splits"]} == old and {damage.file for damage in verify(folder)} <= {COPY}
        upgrade(folder)
        record_split(folder, None, 2, 0, None, None)
        assert list(verify(folder)) == []
        files = sorted(p.name for p in folder.iterdir())
        if done.returncode == 0:
            break
    assert states == sorted(states) and sorted(set(states)) == [(1, 1), (2, 1), (2, 3)] and len(files) == 6
    assert all(sorted(p.name for p in (tmp_path / str(n)).iterdir()) == files for n in range(steps))


@pytest.mark.parametrize("storage", STORAGES)
def test_damage_of_version_1_is_neither_read_nor_upgraded(tmp_path: Path, storage: str) -> None:
    as_version_1(stored(tmp_path, storage))
    record, header = open_dataset(tmp_path).record("sub-4"), (tmp_path / "index.json").read_bytes()
    path = tmp_path / (record.shard or "data.zarr/scan/c/1/0/0/0")
    raw = bytearray(path.read_bytes())
    raw[record.offsets["scan"] + 9 if record.shard else len(raw) // 2] ^= 2
    path.write_bytes(raw)
    for use in (facts, upgrade):
        with pytest.raises(IntegrityError, match=r"sub-\d scan"):
            use(tmp_path)
    assert (tmp_path / "index.json").read_bytes() == header
    for byte in (0, 30, len(header) // 2, len(header) - 2):
        broken = bytearray(header)
        broken[byte] ^= 1
        (tmp_path / "index.json").write_bytes(broken)
        with pytest.raises(IntegrityError, match=r"index.json: damaged"):
            open_dataset(tmp_path)


def test_a_folder_in_use_is_not_rewritten(tmp_path: Path) -> None:
    as_version_1(stored(tmp_path, "zarr"))
    with locked_folder(tmp_path):
        for rewrite in (upgrade, lambda folder: record_split(folder, None, 2, 0, None, None)):
            with pytest.raises(DataError, match="being written by another process"):
                rewrite(tmp_path)


def test_a_shard_outside_of_the_folder_is_not_read(tmp_path: Path) -> None:
    index = Index.load(stored(tmp_path / "a", "webdataset"))
    stored(tmp_path / "b", "webdataset")
    for shard in ("../b/shards/shard-00000.tar", str(tmp_path / "b/shards/shard-00000.tar")):
        record = dataclasses.replace(index.records[0], shard=shard)
        dataclasses.replace(index, records=[record]).save(tmp_path / "a")
        with pytest.raises(IntegrityError, match="is no file of this data set"):
            open_dataset(tmp_path / "a").read("sub-0", "scan")


def test_a_later_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.header.VERSION", 3)
    stored(tmp_path, "zarr")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"version 3, this program reads 1 and 2; update"):
        Index.load(tmp_path)
