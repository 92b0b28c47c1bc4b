"""Laws of verifying and repairing."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shards.__main__ import main
from shards.dataset import open_dataset
from shards.errors import DataError, IntegrityError
from shards.index import Index
from shards.repair import repair
from shards.verify import Damage, foreign_files, verify
from tests.packing import PEOPLE, bids, content, head, packed, save

STORAGES = ("zarr", "webdataset")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bids(tmp_path_factory.mktemp("source"), PEOPLE)


@pytest.fixture(params=STORAGES)
def out(request: pytest.FixtureRequest, tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven records in three shards."""
    monkeypatch.setattr("shards.shard_writer.SHARD_RECORDS", 3)
    packed(source, tmp_path / "out", storage=request.param)
    return tmp_path / "out"


def shards(out: Path) -> list[Path]:
    return sorted([*out.glob("shards/*.tar"), *out.glob("data.zarr/image/c/*/0/0/0")])


def flip(path: Path, offset: int, bit: int = 0) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)


def test_damage_is_named_by_file_record_variable_and_offset(out: Path) -> None:
    record = open_dataset(out).record("sub-04")
    path = shards(out)[1]
    flip(path, record.offsets["image"] + record.sizes["image"] // 2)
    (found,) = verify(out)
    assert (found.file, found.key, found.variable) == (path.relative_to(out).as_posix(), "sub-04", "image")
    assert found.offset == record.offsets["image"]
    assert str(found).startswith(f"{found.file}: sub-04") and str(found).endswith(f"{found.offset:,}: damaged")
    with pytest.raises(IntegrityError, match="sub-04 image"):
        open_dataset(out).read("sub-04", "image")


def test_the_number_of_threads_does_not_matter(out: Path) -> None:
    for i, path in enumerate(shards(out)):
        flip(path, path.stat().st_size // (i + 2))
    found = [list(verify(out, workers)) for workers in (1, 2, 8)]
    assert found[0] == found[1] == found[2] and len(found[0]) >= 3


def test_small_blocks_find_the_same(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Volumes that begin and end anywhere in the blocks that are read."""
    for block in (64, 1000, 4096):
        monkeypatch.setattr("shards.verify.BLOCK", block)
        assert list(verify(out)) == []
    for path in shards(out):
        flip(path, 1234)
    assert len({damage.file for damage in verify(out)}) == 3


def test_an_index_that_disagrees_with_intact_files_is_found(out: Path) -> None:
    """A file has the right SHA-256, and a volume is not where the index says."""
    index = Index.load(out)
    records = list(index.records)
    first, second = records[0], records[1]
    vars(first)["crcs"], vars(second)["crcs"] = second.crcs, first.crcs
    save_records(index, records, out)
    assert {damage.key for damage in verify(out)} == {"sub-00", "sub-01"}


def test_a_shard_that_the_list_of_files_lacks_is_found(out: Path) -> None:
    index = Index.load(out)
    name = shards(out)[1].relative_to(out).as_posix()
    vars(index)["files"] = {file: entry for file, entry in index.files.items() if file != name}
    save_records(index, list(index.records), out)
    assert list(verify(out)) == [Damage(name, "holds volumes and is not in the list of files")]


def save_records(index: Index, records: list[Any], out: Path) -> None:
    names = (
        "kind",
        "storage",
        "schema",
        "arrays",
        "grid",
        "group",
        "files",
        "splits",
        "provenance",
        "extra",
        "per_shard",
    )
    Index(**{name: getattr(index, name) for name in names}, records=records).save(out)


def test_foreign_and_missing_files_are_found(out: Path) -> None:
    assert foreign_files(out) == []
    (out / "notes.txt").write_text("x")
    (out / "shards").mkdir(exist_ok=True)
    (out / "shards/shard-00099.tar").write_text("x")
    assert foreign_files(out) == ["notes.txt", "shards/shard-00099.tar"]
    missing = shards(out)[0]
    missing.unlink()
    assert list(verify(out)) == [Damage(missing.relative_to(out).as_posix(), "missing")]


# --- repair -------------------------------------------------------------------------------------------------------


def damage_anything(out: Path, seed: int) -> None:
    """Flip bits in, cut, lengthen or remove some of the files that a repair can make again."""
    rng = random.Random(seed)
    paths = [p for p in sorted(out.rglob("*")) if p.is_file() and p.parent != out]
    for path in rng.sample(paths, rng.randint(1, len(paths))):
        size = path.stat().st_size
        match rng.choice(["flip", "flip", "cut", "lengthen", "remove", "zeros"]):
            case "flip":
                for _ in range(rng.randint(1, 3)):
                    flip(path, rng.randrange(size), rng.randrange(8))
            case "cut":
                path.write_bytes(path.read_bytes()[: rng.randrange(size)])
            case "lengthen":
                path.write_bytes(path.read_bytes() + b"x")
            case "zeros":
                path.write_bytes(bytes(size))
            case "remove":
                path.unlink()


def test_any_damage_is_repaired_to_the_same_bytes(out: Path, source: Path) -> None:
    before = content(out)
    for seed in range(8):
        damage_anything(out, seed)
        damages = list(verify(out))
        assert damages
        assert list(repair(out, source, workers=1)) == [(damage, "") for damage in damages]
        assert content(out) == before
    assert list(repair(out, source, workers=1)) == []


def test_only_what_is_damaged_is_converted(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = open_dataset(out).record("sub-04")
    flip(shards(out)[1], record.offsets["image"])
    (out / "foreign").write_text("mine")
    converted = []
    from shards.convert import convert

    def counted(row: Any, *options: Any) -> Any:
        converted.append(row.key)
        return convert(row, *options)

    monkeypatch.setattr("shards.repair.convert", counted)
    untouched = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path != shards(out)[1]}
    assert [reason for _, reason in repair(out, source, workers=1)] == [""]
    assert converted == ["sub-04"]
    assert untouched == {path: path.stat().st_mtime_ns for path in untouched}


KILLED = """
import os, signal, sys
import shards.repair
write = shards.repair._write_shard
def killed(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
shards.repair._write_shard = killed
list(shards.repair.repair(*sys.argv[1:], workers=1))
"""


def test_a_repair_after_one_that_was_killed_leaves_nothing_else(out: Path, source: Path) -> None:
    before = content(out)
    flip(shards(out)[1], 900)
    command = [sys.executable, "-c", KILLED, str(out), str(source)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    (shards(out)[0].parent / ".zarr.json.7.part").write_bytes(b"half")
    assert len(foreign_files(out)) > 1
    assert [reason for _, reason in repair(out, source, workers=1)] == [""]
    assert content(out) == before and not list(out.glob(".repair-*"))


def killed(task: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_an_error_with_a_remedy(
    out: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in shards(out):
        flip(path, 900)
    monkeypatch.setattr("shards.repair._restore", killed)
    with pytest.raises(DataError, match="a worker process was killed, most likely for lack of memory"):
        list(repair(out, source, workers=2))


def test_a_changed_source_repairs_nothing(out: Path, source: Path, tmp_path: Path) -> None:
    """The damaged file stays as it is, and the reason is given; other files are repaired."""
    other = tmp_path / "other"
    shutil.copytree(source, other)
    save(other / "sub-04/anat/sub-04_T1w.nii.gz", head(99))
    for path, key in zip(shards(out), ("sub-01", "sub-04", "sub-06")):
        flip(path, open_dataset(out).record(key).offsets["image"] + 5)
    damaged = shards(out)[1].read_bytes()
    reasons = {damage.key: reason for damage, reason in repair(out, other, workers=1)}
    assert reasons["sub-01"] == reasons["sub-06"] == ""
    assert "sub-04 image: the source gives other voxels than were packed" in reasons["sub-04"]
    assert shards(out)[1].read_bytes() == damaged
    shutil.rmtree(other / "sub-04")
    ((_, reason),) = repair(out, other, workers=1)
    assert "sub-04: " in reason and "no such row" in reason
    assert [damage.key for damage in verify(out)] == ["sub-04"]


def test_a_data_set_with_pseudonyms_needs_its_key(out: Path, source: Path, tmp_path: Path) -> None:
    key, other = tmp_path / "key", tmp_path / "other-key"
    for path in (key, other):
        path.write_bytes(path.name.encode() * 6)
        path.chmod(0o600)
    hidden = tmp_path / "hidden"
    packed(source, hidden, storage=Index.load(out).storage, pseudonymise=key)
    before = content(hidden)
    flip(shards(hidden)[0], 900)
    for given in (None, other):
        with pytest.raises(DataError, match="give the key that the data set was packed with"):
            list(repair(hidden, source, pseudonymise=given))
    assert [reason for _, reason in repair(hidden, source, pseudonymise=key, workers=1)] == [""]
    assert content(hidden) == before


def files_of_the_index(out: Path) -> list[Path]:
    names = ("index.json", "records", "keys", "files", "packing")
    found = sorted(path for path in out.iterdir() if path.name.startswith(names))
    assert len(found) == len(names)
    return found


def test_a_damaged_index_is_restored_from_its_copy(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a volume is converted")

    monkeypatch.setattr("shards.repair.convert", fail)
    before = content(out)
    for path in files_of_the_index(out):
        for damage in (lambda path: flip(path, path.stat().st_size // 2), Path.unlink):
            damage(path)
            assert [found.file for found in verify(out)] == [path.name]
            assert [(found.file, reason) for found, reason in repair(out, source, workers=1)] == [(path.name, "")]
            assert content(out) == before and list(verify(out)) == []
    for path in files_of_the_index(out):
        path.unlink()
    assert [reason for _, reason in repair(out, source, workers=1)] == [""] * 5
    assert content(out) == before


def test_index_and_volumes_are_repaired_together(out: Path, source: Path) -> None:
    before = content(out)
    flip(out / "index.json", 900)
    flip(shards(out)[1], 900)
    assert [reason for _, reason in repair(out, source, workers=1)] == ["", ""]
    assert content(out) == before


def test_any_bit_of_the_copy_is_found_and_the_copy_is_written_again(out: Path, source: Path) -> None:
    before, copy = content(out), out / "index.copy"
    draw = random.Random(0)
    for _ in range(20):
        flip(copy, draw.randrange(copy.stat().st_size), draw.randrange(8))
        assert [found.file for found in verify(out)] == [copy.name]
        assert [reason for _, reason in repair(out, source, workers=1)] == [""]
        assert content(out) == before


def test_the_copy_of_another_index_restores_nothing(out: Path, source: Path, tmp_path: Path) -> None:
    old = (out / "index.copy").read_bytes()
    assert main(["split", str(out), "--folds", "3"]) == 0
    (out / "index.copy").write_bytes(old)  # as where the process was killed before it wrote the copy
    flip(files_of_the_index(out)[2], 100)
    with pytest.raises(IntegrityError, match="its copy cannot replace it"):
        list(repair(out, source))


def test_without_its_copy_a_damaged_index_is_not_repaired(out: Path, source: Path) -> None:
    flip(out / "index.copy", 600)
    flip(out / "index.json", 900)
    with pytest.raises(IntegrityError, match="its copy cannot replace it"):
        list(repair(out, source))
    assert [found.file for found in verify(out)] == ["index.json"]


def test_a_copy_that_is_missing_is_written_by_the_same_packing(out: Path, source: Path) -> None:
    """Of a packing that was killed at its end, and of data sets of earlier versions."""
    before = content(out)
    (out / "index.copy").unlink()
    assert list(verify(out)) == []
    packed(source, out, storage=Index.load(out).storage)
    assert content(out) == before


def test_the_table_of_rejected_rows_is_repaired_from_the_source(out: Path, source: Path, tmp_path: Path) -> None:
    image = source / "sub-01/anat/sub-01_T1w.nii.gz"
    image.write_bytes(b"x")  # rejected when it was packed
    with (source / "participants.tsv").open("a") as table:
        table.write("sub-99\t40\tF\n")  # rejected with its row: no file
    packed(source, tmp_path / "new", storage=Index.load(out).storage, max_rejects="100%")
    path = tmp_path / "new" / "rejected.tsv"
    before = path.read_bytes()
    assert b"sub-01" in before and b"sub-99" in before
    flip(path, 0)
    assert list(repair(tmp_path / "new", source)) == [(Damage("rejected.tsv"), "")] and path.read_bytes() == before
    flip(path, 0)
    with (source / "participants.tsv").open("a") as table:
        table.write("sub-98\t40\tF\n")
    ((_, reason),) = repair(tmp_path / "new", source)
    assert "does not follow from the records and the source" in reason


def test_the_command(out: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(out)]) == 0
    flip(shards(out)[0], 800)
    assert main(["verify", str(out)]) == 1
    shown = capsys.readouterr()
    assert "1 damaged; restore or --repair them" in shown.err and shards(out)[0].name in shown.err
    assert main(["verify", str(out), "--repair"]) == 2
    assert main(["verify", str(out), "--repair", "--source", str(source), "--workers", "1"]) == 0
    assert "repaired" in capsys.readouterr().err
    (out / "foreign.txt").write_text("x")
    assert main(["verify", str(out)]) == 0
    shown = capsys.readouterr()
    assert "note: foreign.txt does not belong to the data set" in shown.err and "intact" in shown.out
