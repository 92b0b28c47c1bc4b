"""Laws of number formats, of frames and crops, and of the cache on local disks."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from shards.cache import SUBFOLDERS, Cache
from shards.dataset import Dataset, open_dataset
from shards.errors import DataError, IntegrityError
from shards.frames import FRAME_BYTES, planes_per_frame
from shards.quantization import LARGEST, dequantize, quantize, stored_as
from shards.schema import Schema
from shards.shard_writer import STORAGES
from shards.verify import verify
from shards.writer import DatasetWriter
from tests.packing import PEOPLE, bids, packed

SCHEMA = Schema.from_dict({"scan": {"kind": "volume", "suffix": "T1w"}})
SHAPE = (8, 256, 260)  # several frames
INTEGERS = [dtype for dtype, largest in LARGEST.items() if largest]
Volumes = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def volumes() -> Volumes:
    """Noise and background."""
    rng = np.random.default_rng(0)
    found = {f"sub-{i}": rng.random(SHAPE, np.float32) for i in range(3)}
    for volume in found.values():
        volume[:, :100] = 0
    return found


def write(folder: Path, storage: str, volumes: Volumes, dtype: str = "float16") -> Dataset:
    arrays = {"scan": {"shape": SHAPE, **stored_as(dtype)}}
    writer = DatasetWriter(folder, storage, "volumes", SCHEMA, arrays, {"spacing": 1.0})
    for key, volume in volumes.items():
        writer.add(key, key, {}, {"scan": quantize(volume, dtype)})
    writer.finish()
    return open_dataset(folder)


# --- number formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
def test_whole_numbers_stand_for_their_multiples_of_the_scale(dtype: str) -> None:
    """Each stored number, in arrays of even and odd size, is decoded to the float16 nearest to its value."""
    scale = stored_as(dtype)["scale"]
    numbers = np.arange(LARGEST[dtype] + 1).astype(dtype)
    for stored in (numbers, numbers[1:], np.tile(numbers, 3).reshape(3, -1), numbers[:0]):
        np.testing.assert_array_equal(dequantize(stored, scale), (stored * scale).astype(np.float16), strict=True)
    assert dequantize(numbers, scale)[[0, -1]].tolist() == [0, 1]
    np.testing.assert_array_equal(quantize((numbers * scale).astype(np.float32), dtype), numbers, strict=True)


@pytest.mark.parametrize("dtype", LARGEST)
def test_rounding_is_to_the_nearest_and_leaves_background_and_maximum_as_they_are(dtype: str) -> None:
    volume = np.linspace(0, 1, 100_001, dtype=np.float32)
    stored = quantize(volume, dtype)
    values = stored.astype(np.float64) * stored_as(dtype).get("scale", 1)
    assert np.abs(values - volume).max() <= (
        0.5 / LARGEST[dtype] + 2**-24 if LARGEST[dtype] else 2**-12
    )  # float32's step
    assert values[[0, -1]].tolist() == [0, 1] and (np.diff(values) >= 0).all()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_both_storages_hold_the_same_numbers_and_other_programs_learn_the_scale(
    tmp_path: Path, volumes: Volumes, dtype: str
) -> None:
    sets = [write(tmp_path / storage, storage, volumes, dtype) for storage in STORAGES]
    assert len({dataset.index.digest for dataset in sets}) == 1
    stored = zarr.open_group(tmp_path / "zarr" / "data.zarr", mode="r")["scan"]
    assert isinstance(stored, zarr.Array)
    for i, (key, volume) in enumerate(volumes.items()):
        expected = quantize(volume, dtype)
        for dataset in sets:
            np.testing.assert_array_equal(dataset.read_stored(key, "scan"), expected, strict=True)
            np.testing.assert_array_equal(
                dataset.read(key, "scan"), dequantize(expected, stored_as(dtype)["scale"]), strict=True
            )
            assert not dataset.read(key, "scan").flags.writeable
        np.testing.assert_array_equal(np.asarray(stored[i]), expected, strict=True)
    assert stored.attrs["scale_factor"] == stored_as(dtype)["scale"]


def test_packing_in_whole_numbers_changes_voxels_by_half_a_step_and_nothing_else(tmp_path: Path) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    packed(source, tmp_path / "float16")
    exact = open_dataset(tmp_path / "float16")
    name = exact.index.schema.volumes[0].name
    for dtype in INTEGERS:
        packed(source, tmp_path / dtype, dtype=dtype)
        dataset = open_dataset(tmp_path / dtype)
        assert not list(verify(tmp_path / dtype))
        assert dataset.index.arrays[name]["scale"] == 1 / LARGEST[dtype]
        assert dataset.keys() == exact.keys()
        for key in exact.keys("all"):
            before, after = (d.read(key, name).astype(np.float32) for d in (exact, dataset))
            assert np.abs(after - before).max() <= 0.5 / LARGEST[dtype] + 2**-11
            assert not after[before == 0].any()
    with pytest.raises(DataError, match="uint16"):
        packed(source, tmp_path / "other", dtype="int16")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_volumes_are_read_into_a_batch(tmp_path: Path, volumes: Volumes, storage: str, dtype: str) -> None:
    dataset = write(tmp_path, storage, volumes, dtype)
    batch = np.full((len(volumes), *SHAPE), np.nan, np.float16)
    for part, key in zip(batch, volumes):
        assert dataset.read(key, "scan", out=part) is part
        np.testing.assert_array_equal(part, dataset.read(key, "scan"))
    for wrong in (batch[0][1:], batch[0].astype(np.float32), np.empty(SHAPE[::-1], np.float16).T):
        with pytest.raises(ValueError, match="out: "):
            dataset.read("sub-0", "scan", out=wrong)


# --- frames and crops ---------------------------------------------------------------------------------------------


def test_frames_divide_the_planes() -> None:
    for shape, planes in {SHAPE: 2, (160, 192, 160): 8, (7, 400, 400): 1, (7, 2, 2): 7, (3, 2000, 2000): 1}.items():
        assert planes_per_frame(shape, np.dtype("f2")) == planes
        assert planes == 1 or planes * np.prod(shape[1:]) * 2 <= FRAME_BYTES


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_crop_is_a_part_of_the_volume(tmp_path: Path, volumes: Volumes, storage: str, dtype: str) -> None:
    dataset, rng = write(tmp_path, storage, volumes, dtype), np.random.default_rng(0)
    for key in volumes:
        whole = dataset.read(key, "scan")
        for _ in range(20):
            shape = [int(rng.integers(1, n + 1)) for n in SHAPE]
            start = [int(rng.integers(0, n - m + 1)) for n, m in zip(SHAPE, shape)]
            part = dataset.read_box(key, "scan", start, shape)
            box = tuple(slice(a, a + n) for a, n in zip(start, shape))
            np.testing.assert_array_equal(part, whole[box], strict=True)
            assert part.flags.c_contiguous and not part.flags.writeable
    for first, size in [((0, 0, -1), (1, 1, 1)), ((0, 0, 0), (9, 1, 1)), ((0, 0, 0), (0, 1, 1)), ((0, 0), (1, 1))]:
        with pytest.raises(ValueError, match="no box"):
            dataset.read_box("sub-0", "scan", first, size)
    with pytest.raises(LookupError, match="has no mask"):
        dataset.read_box("sub-0", "mask", (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("storage", STORAGES)
def test_volumes_of_equal_size_are_distinguished(tmp_path: Path, storage: str) -> None:
    """Bytes of one volume in the place of another are refused, though each frame has its own CRC-32C."""
    noise = {f"sub-{i}": np.random.default_rng(i).integers(0, 256, (2, 128, 128), np.uint8) for i in range(2)}
    arrays = {"scan": {"shape": (2, 128, 128), "dtype": "uint8"}}
    writer = DatasetWriter(tmp_path, storage, "volumes", SCHEMA, arrays, {"spacing": 1.0})
    for key, volume in noise.items():
        writer.add(key, key, {}, {"scan": volume})
    writer.finish()
    first, second = open_dataset(tmp_path).index.records
    [shard] = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 2 * 10**4]
    raw = bytearray(shard.read_bytes())
    assert first.sizes == second.sizes and first.crcs != second.crcs
    places = [slice(r.offsets["scan"], r.offsets["scan"] + r.sizes["scan"]) for r in (first, second)]
    raw[places[1]] = raw[places[0]]
    shard.write_bytes(raw)
    open_dataset(tmp_path).read("sub-0", "scan")
    with pytest.raises(IntegrityError, match="sub-1"):
        open_dataset(tmp_path).read("sub-1", "scan")


@pytest.mark.parametrize("storage", STORAGES)
def test_a_crop_of_damaged_bytes_is_refused(tmp_path: Path, volumes: Volumes, storage: str) -> None:
    """Whatever byte of a shard is changed, a crop is right or refused, and some of each."""
    dataset, rng = write(tmp_path, storage, volumes), np.random.default_rng(0)
    right = {key: dataset.read(key, "scan") for key in volumes}
    [shard] = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 10**6]
    intact, outcomes = shard.read_bytes(), []
    for place in [*rng.integers(0, len(intact), 40), len(intact) - 10]:
        shard.write_bytes(intact[:place] + bytes([intact[place] ^ 1 << int(rng.integers(8))]) + intact[place + 1 :])
        for key in volumes:
            start = (int(rng.integers(0, 7)), 90, 200)
            try:
                part = open_dataset(tmp_path).read_box(key, "scan", start, (2, 60, 50))
            except IntegrityError as error:
                assert key in str(error)
                outcomes.append(False)
            else:
                np.testing.assert_array_equal(part, right[key][start[0] : start[0] + 2, 90:150, 200:250])
                outcomes.append(True)
    assert any(outcomes) and not all(outcomes)


# --- the cache ----------------------------------------------------------------------------------------------------


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("storage", STORAGES)
def test_what_the_cache_holds_is_not_read_again(tmp_path: Path, volumes: Volumes, storage: str) -> None:
    cache = Cache(tmp_path / "cache", 10**9)
    expected = write(tmp_path / "data", storage, volumes)
    values = {key: expected.read(key, "scan") for key in volumes}
    cached = open_dataset(tmp_path / "data", cache)
    for key in list(volumes)[:2]:
        np.testing.assert_array_equal(cached.read(key, "scan"), values[key], strict=True)
    for shard in (p for p in (tmp_path / "data").rglob("*") if p.is_file() and p.stat().st_size > 10**6):
        shard.unlink()
    again = open_dataset(tmp_path / "data", cache)
    for key in list(volumes)[:2]:
        np.testing.assert_array_equal(again.read(key, "scan"), values[key], strict=True)
        np.testing.assert_array_equal(again.read_box(key, "scan", (1, 2, 3), (4, 5, 6)), values[key][1:5, 2:7, 3:9])
    with pytest.raises(IntegrityError, match="sub-2"):
        again.read("sub-2", "scan")
    assert len(list(verify(tmp_path / "data"))) > 0  # sees the data set, not the cache
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "cache").iterdir()} == {0o700}


def test_a_damaged_file_of_the_cache_is_read_again(tmp_path: Path, volumes: Volumes) -> None:
    cache = Cache(tmp_path / "cache", 10**9)
    expected = write(tmp_path / "data", "zarr", volumes).read("sub-0", "scan")
    cached = open_dataset(tmp_path / "data", cache)
    for damage in (lambda raw: raw[:-1], lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), lambda raw: b""):
        cached.read("sub-0", "scan")
        [file] = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name != ".lock"]
        intact = file.read_bytes()
        file.write_bytes(damage(intact))
        np.testing.assert_array_equal(cached.read("sub-0", "scan"), expected, strict=True)
        assert file.read_bytes() == intact


def test_the_limit_holds_and_the_last_used_stay(tmp_path: Path) -> None:
    """Names of one subfolder: three files of 100 bytes fit into its share; a file that was read outlives older ones."""
    cache = Cache(tmp_path, 350 * SUBFOLDERS)
    names = [f"{SUBFOLDERS * i:04x}" for i in range(5)]
    content = np.arange(100, dtype=np.uint8)
    target = np.empty_like(content)
    for i, name in enumerate(names[:3]):
        cache.store(name, content)
        os.utime(tmp_path / "00" / name, ns=(i, i))
    assert cache.load(names[0], target) and np.array_equal(target, content)
    cache.store(names[3], content)
    assert [cache.load(name, target) for name in names[:4]] == [True, False, True, True]
    (tmp_path / "00" / f"{names[4]}.part").write_bytes(bytes(200))  # of a process that was killed
    cache.store(names[4], content)
    assert size(tmp_path) <= 350 and cache.load(names[4], target)
    with pytest.warns(UserWarning, match="too small"):
        cache.store("0001", np.zeros(351, np.uint8))


def test_processes_share_a_cache_within_its_limit(tmp_path: Path) -> None:
    """Three processes add and read files of one subfolder, which has room for four of the seven; one is killed."""
    limit = 450_000
    code = f"""
import random, sys
from pathlib import Path
import numpy as np
from shards.cache import SUBFOLDERS, Cache
from shards.files import lock_file
folder = Path({str(tmp_path / "00")!r})
cache, target, found = Cache(Path({str(tmp_path)!r}), {limit} * SUBFOLDERS), np.empty(100_000, np.uint8), 0
random.seed(int(sys.argv[1]))
print("begins", flush=True)
for _ in range(400):
    number = random.randrange(7)
    if cache.load(f"{{SUBFOLDERS * number:04x}}", target):
        assert (target == number).all()
        found += 1
    else:
        cache.store(f"{{SUBFOLDERS * number:04x}}", np.full(100_000, number, np.uint8))
    with lock_file(folder / ".lock"):
        assert sum(p.stat().st_size for p in folder.iterdir()) <= {limit}
print(found)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, str(i)], stdout=subprocess.PIPE) for i in range(3)]
    assert processes[0].stdout is not None
    processes[0].stdout.readline()
    processes[0].kill()
    outputs = [process.communicate()[0].decode().split() for process in processes]
    assert [process.returncode for process in processes[1:]] == [0, 0]
    assert all(0 < int(output[-1]) < 400 for output in outputs[1:])


def test_the_environment_names_the_cache(tmp_path: Path, volumes: Volumes, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data", "zarr", volumes)
    monkeypatch.setenv("SHARDS_CACHE", str(tmp_path / "cache"))
    for wrong in ("", "many", "0", "-1", "nan"):
        monkeypatch.setenv("SHARDS_CACHE_GB", wrong)
        with pytest.raises(DataError, match="SHARDS_CACHE_GB"):
            open_dataset(tmp_path / "data")
    monkeypatch.setenv("SHARDS_CACHE_GB", "1.5")
    assert Cache.from_environment() == Cache(tmp_path / "cache", 1_500_000_000)
    open_dataset(tmp_path / "data").read("sub-0", "scan")
    assert size(tmp_path / "cache") > 0


def test_a_disk_that_cannot_be_written_to_is_reported(tmp_path: Path, volumes: Volumes) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    expected = write(tmp_path / "data", "zarr", volumes).read("sub-0", "scan")
    with pytest.warns(UserWarning, match="is not used"):
        found = open_dataset(tmp_path / "data", Cache(tmp_path / "cache", 10**9)).read("sub-0", "scan")
    np.testing.assert_array_equal(found, expected, strict=True)
