"""Laws of packing in units: the same bytes in any number of parts and after any interruption; only changes are made."""

import errno
import fcntl
import gc
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from mvhpc.config import load_config
from mvhpc.data_stages import PackConfig
from mvhpc.execute import execute, plan
from mvhpc.runs.journal import read
from mvhpc.stages import STAGES
from shards.__main__ import main
from shards.dataset import open_dataset
from shards.errors import DataError, TooManyRejects
from shards.files import locked_folder
from shards.index import Index
from shards.pack import merge, pack_part
from shards.packing.places import Place
from shards.packing.plan import make_plan
from shards.participant_rows import Row
from shards.schema import Schema
from shards.split import record_split
from shards.stored_files import HashedFile
from shards.volumes import canonical
from shards.writer import DatasetWriter
from tests.packing import PEOPLE, SIZE, bids, content, head, packed, save, volumes

OPTIONS: dict[str, Any] = {"spacing": 2.0, "shape": SIZE, "max_rejects": "100%", "keep_suspect": True}


@pytest.fixture(autouse=True)
def two_per_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.shard_writer.SHARD_RECORDS", 2)


@pytest.fixture(params=["zarr", "webdataset"])
def storage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The subjects whose files were converted, in order."""
    names: list[str] = []

    def counted(path: Path, *args: Any) -> Any:
        names.append(path.name.split("_")[0])
        return canonical(path, *args)

    monkeypatch.setattr("shards.convert.canonical", counted)
    yield names


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and content of the shards: an untouched file keeps both."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and (p.suffix == ".tar" or p.match("c/*/0/0/0")))
    return {p.relative_to(folder).as_posix(): (p.stat().st_ino, p.read_bytes()) for p in found}


# --- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [SIZE, "auto"])
def test_parts_in_any_order_give_the_bytes_of_one_process(
    tmp_path: Path, storage: str, parts: int, shape: Any, converted: list[str]
) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    (source / "sub-02/anat/sub-02_T1w.nii.gz").write_bytes(b"x")
    options = {**OPTIONS, "storage": storage, "shape": shape}
    packed(source, tmp_path / "one", **options)
    converted.clear()
    numbers = list(range(1, parts + 1))
    random.Random(parts).shuffle(numbers)
    for number in numbers:
        pack_part(source, tmp_path / "parts", f"{number}/{parts}", **options)
        again = pack_part(source, tmp_path / "parts", f"{number}/{parts}", **options)
        assert again["made"] == 0
    assert sorted(converted) == [name for name, *_ in PEOPLE]
    shutil.copytree(tmp_path / "parts", tmp_path / "merged")
    summary = packed(source, tmp_path / "parts", **options)
    assert summary == merge(tmp_path / "merged")
    assert len(converted) == len(PEOPLE) and summary["packed"] == 6
    assert content(tmp_path / "one") == content(tmp_path / "parts") == content(tmp_path / "merged")


def test_the_end_makes_the_shards_that_parts_have_not_made(tmp_path: Path, storage: str) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    packed(source, tmp_path / "one", storage=storage)
    pack_part(source, tmp_path / "out", "2/3", storage=storage, **OPTIONS)
    packed(source, tmp_path / "out", storage=storage)
    assert content(tmp_path / "one") == content(tmp_path / "out")


def test_only_complete_parts_of_equal_arguments_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = bids(tmp_path / "bids", PEOPLE), tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no parts to merge"):
        merge(out)
    pack_part("bids", out, "1/2", seed=3, **OPTIONS)
    with pytest.raises(DataError, match="parts 2/2 have not run"):
        merge(out)
    pack_part(source, out, "2/2", seed=4, **OPTIONS)
    with pytest.raises(DataError, match="parts 1/2 and 2/2 differ in seed"):
        merge(out)
    pack_part(source, out, "2/2", seed=3, workers=2, **{**OPTIONS, "schema": Schema.load()})
    change(source / "sub-00/anat/sub-00_T1w.nii.gz")
    with pytest.raises(DataError, match="1 shards of 1/2 are missing, or their sources have changed"):
        merge(out)
    pack_part(source, out, "1/2", seed=3, **OPTIONS)
    monkeypatch.chdir("/")
    assert merge(out)["packed"] == len(PEOPLE)
    packed(source, tmp_path / "one", seed=3)
    assert content(out) == content(tmp_path / "one")


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_parts_that_are_none_are_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(DataError, match="expected I/N"):
        pack_part(tmp_path, tmp_path / "out", part, **OPTIONS)


def test_a_folder_is_held_by_one_process_or_by_different_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = bids(tmp_path / "bids", PEOPLE[:3]), tmp_path / "out"

    def while_part_1_runs(*_: Any) -> Any:
        monkeypatch.undo()
        monkeypatch.setattr("shards.shard_writer.SHARD_RECORDS", 2)
        with pytest.raises(DataError, match="being written by another process"):
            packed(source, out)
        with pytest.raises(DataError, match="part 1-of-2"):
            pack_part(source, out, "1/2", **OPTIONS)
        assert pack_part(source, out, "2/2", **OPTIONS)["made"] == 1
        return canonical(source / "sub-00/anat/sub-00_T1w.nii.gz", 2.0, SIZE)

    monkeypatch.setattr("shards.convert.canonical", while_part_1_runs)
    assert pack_part(source, out, "1/2", **OPTIONS)["made"] == 1
    assert packed(source, out)["packed"] == 3


def test_a_part_that_ends_leaves_the_folder_to_the_others(tmp_path: Path) -> None:
    """It neither frees the folder for a process that wants it alone, nor leaves a file of the lock behind."""
    with locked_folder(tmp_path, "1-of-2"):
        with locked_folder(tmp_path, "2-of-2"):
            pass
        with pytest.raises(DataError, match="being written by another process"), locked_folder(tmp_path):
            pass
    with locked_folder(tmp_path), pytest.raises(DataError, match="or part 1-of-2"), locked_folder(tmp_path, "1-of-2"):
        pass
    assert not any(tmp_path.iterdir())


def test_folders_are_locked_by_files_that_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS needs: it shows locks of folders to no other machine, and locks no file that is open for reading alone."""
    flock, kinds = fcntl.flock, []

    def seen(descriptor: int, operation: int) -> None:
        kinds.append(stat.S_ISREG(os.fstat(descriptor).st_mode))
        kinds.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR == os.O_RDWR)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", seen)
    source, out = bids(tmp_path / "bids", PEOPLE[:3]), tmp_path / "out"
    pack_part(source, out, "1/2", **OPTIONS)
    packed(source, out)
    record_split(out, None, 3, 0, None, None)
    DatasetWriter(tmp_path / "other", "zarr", "volumes", Schema.load(), {}, {}).close()
    assert kinds and all(kinds)
    assert not list(tmp_path.rglob("*lock*"))


# --- again --------------------------------------------------------------------------------------------------------


def test_a_finished_data_set_is_left_as_it_is(tmp_path: Path, storage: str, converted: list[str]) -> None:
    source, out = bids(tmp_path / "bids", PEOPLE), tmp_path / "out"
    first = packed(source, out, storage=storage)
    before, inode = content(out), (out / "index.json").stat().st_ino
    again = packed(source, out, storage=storage)
    assert again == {**first, "converted": 0} and len(converted) == len(PEOPLE)
    assert content(out) == before and (out / "index.json").stat().st_ino == inode
    for file in source.rglob("*.nii.gz"):
        os.utime(file, (1, 1))  # other times of the same bytes
    packed(source, out, storage=storage)
    assert len(converted) == len(PEOPLE)
    assert {k: v for k, v in content(out).items() if k.endswith(".tar") or "/c/" in k}.items() <= before.items()


def test_only_changes_are_converted(tmp_path: Path, storage: str, converted: list[str]) -> None:
    """One row changed, one removed, two new; shards without any of these stay, and all is as if packed at once."""
    source, out = bids(tmp_path / "bids", PEOPLE), tmp_path / "out"
    packed(source, out, storage=storage)
    record_split(out, [0.5, 0.25, 0.25], None, 3, None, "wide")
    old = files(out)
    save(source / "sub-01/anat/sub-01_T1w.nii.gz", head(40))
    for name in ("sub-90", "sub-91"):
        save(source / name / "anat" / f"{name}_T1w.nii.gz", head(int(name[-2:])))
    table = source / "participants.tsv"
    lines = [line for line in table.read_text().splitlines() if "sub-04" not in line]
    table.write_text("\n".join([*lines, "sub-90\t31\tF", "sub-91\t32\tM"]) + "\n")
    converted.clear()
    summary = packed(source, out, storage=storage)
    assert converted == ["sub-01", "sub-90", "sub-91"] and summary["converted"] == 3
    packed(source, tmp_path / "new", storage=storage)
    assert volumes(out) == volumes(tmp_path / "new")
    ours, theirs = Index.load(out), Index.load(tmp_path / "new")
    assert ours.digest == theirs.digest
    assert dict(ours.split().assignment) == dict(theirs.split().assignment)
    assert set(ours.split("wide").assignment) == set(ours.split().assignment)
    kept = files(out).items() & old.items()
    assert len(kept) == 2  # of four shards: those of sub-02 and sub-03, and of sub-06
    assert not (out / ".partial").exists()


def test_each_packing_of_one_process_copies_from_the_data_set_before_it(tmp_path: Path, storage: str) -> None:
    """Not from one that was opened for an earlier packing, whose files are removed."""
    source, out = bids(tmp_path / "bids", PEOPLE[:2]), tmp_path / "out"
    packed(source, out, storage=storage)
    for number, name in enumerate(("sub-00", "sub-01", "sub-00")):
        save(source / name / "anat" / f"{name}_T1w.nii.gz", head(50 + number))
        packed(source, out, storage=storage)
        gc.collect()
        assert not [r for r in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if str(out) in r]
        packed(source, tmp_path / name / str(number), storage=storage)
        assert volumes(out) == volumes(tmp_path / name / str(number))


def test_other_values_convert_nothing(tmp_path: Path, storage: str, converted: list[str]) -> None:
    """A Zarr store keeps its shards; of tar files, which hold values, one is written again with its volumes copied."""
    source, out = bids(tmp_path / "bids", PEOPLE), tmp_path / "out"
    packed(source, out, storage=storage)
    old = files(out)
    table = source / "participants.tsv"
    table.write_text(table.read_text().replace("sub-03\t35", "sub-03\t36"))
    assert packed(source, out, storage=storage)["converted"] == 0
    assert open_dataset(out).values("sub-03")["age"] == 36
    kept = files(out)
    assert len(kept.items() & old.items()) == len(old) - (storage == "webdataset")
    packed(source, out, storage=storage, folds=3)
    assert len(Index.load(out).splits) == 4 and files(out) == kept and len(converted) == len(PEOPLE)
    assert not any(b'"age": 35' in raw for _, raw in kept.values())
    packed(source, tmp_path / "new", storage=storage)
    assert volumes(out) == volumes(tmp_path / "new") and Index.load(out).digest == Index.load(tmp_path / "new").digest


def test_values_that_change_while_a_packing_is_interrupted_are_those_of_its_shards(
    tmp_path: Path, storage: str
) -> None:
    source = bids(tmp_path / "bids", PEOPLE)
    pack_part(source, tmp_path / "out", "1/2", storage=storage, **OPTIONS)
    table = source / "participants.tsv"
    table.write_text(table.read_text().replace("sub-00\t20", "sub-00\t21"))
    packed(source, tmp_path / "out", storage=storage)
    packed(source, tmp_path / "one", storage=storage)
    assert content(tmp_path / "out") == content(tmp_path / "one")


def test_files_that_are_exchanged_are_seen_whatever_their_size_and_time(
    tmp_path: Path, storage: str, converted: list[str]
) -> None:
    """In the table, and on the disk."""
    for i in range(4):
        os.utime(save(tmp_path / f"scan{i}.nii", head(i)), (1, 1))
    source, out = tmp_path / "scans.csv", tmp_path / "out"

    def write(order: str) -> None:
        rows = [f"{person},scan{scan}.nii,50,F" for person, scan in zip("abcd", order)]
        source.write_text("\n".join(["participant_id,path,age,sex", *rows]))

    write("0123")
    packed(source, out, storage=storage)
    write("1023")
    assert packed(source, out, storage=storage)["converted"] == 2
    packed(source, tmp_path / "table", storage=storage)
    assert volumes(out) == volumes(tmp_path / "table")
    for old, new in ((2, 9), (3, 2), (9, 3)):
        (tmp_path / f"scan{old}.nii").rename(tmp_path / f"scan{new}.nii")
    assert packed(source, out, storage=storage)["converted"] == 2
    packed(source, tmp_path / "disk", storage=storage)
    assert volumes(out) == volumes(tmp_path / "disk")
    (tmp_path / "scan0.nii").write_bytes(save(tmp_path / "scan8.nii", head(8)).read_bytes())  # as cp -p and rsync do
    os.utime(tmp_path / "scan0.nii", (1, 1))
    assert packed(source, out, storage=storage)["converted"] == 1
    packed(source, tmp_path / "same", storage=storage)
    assert volumes(out) == volumes(tmp_path / "same")


def test_rejected_rows_are_tried_again_when_their_files_change(
    tmp_path: Path, storage: str, converted: list[str]
) -> None:
    source, out = bids(tmp_path / "bids", PEOPLE), tmp_path / "out"
    file = source / "sub-03/anat/sub-03_T1w.nii.gz"
    good = file.read_bytes()
    file.write_bytes(b"x")
    packed(source, out, storage=storage)
    old = files(out)
    packed(source, out, storage=storage)
    assert len(converted) == len(PEOPLE)
    file.write_bytes(good)
    assert packed(source, out, storage=storage)["rejected"] == 0
    assert converted[len(PEOPLE) :] == ["sub-03"] and old.items() <= files(out).items()
    packed(source, tmp_path / "new", storage=storage)
    assert volumes(out) == volumes(tmp_path / "new") and Index.load(out).digest == Index.load(tmp_path / "new").digest


@pytest.mark.parametrize("other", [{"spacing": 4.0}, {"storage": "webdataset"}, {"shape": (16, 16, 16)}])
def test_a_data_set_of_another_kind_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    source, out = bids(tmp_path / "bids", PEOPLE[:2]), tmp_path / "out"
    packed(source, out, storage="zarr")
    before = content(out)
    with pytest.raises(DataError, match="already holds a packed data set with another"):
        packed(source, out, **other)
    assert content(out) == before and not (out / ".partial").exists()


def test_too_many_rejects_leave_the_old_data_set(tmp_path: Path, storage: str) -> None:
    source, out = bids(tmp_path / "bids", PEOPLE), tmp_path / "out"
    packed(source, out, storage=storage)
    old = volumes(out)
    (source / "sub-03/anat/sub-03_T1w.nii.gz").write_bytes(b"x")
    with pytest.raises(TooManyRejects, match=r"1 of 7 .*\.partial/rejected\.tsv"):
        packed(source, out, storage=storage, max_rejects="0")
    assert volumes(out) == old


def test_plans_keep_what_is_unchanged_and_number_shards_anew() -> None:
    def row(name: str) -> Row:
        return Row(0, name, name, "", "", {}, {"image": Path(name)})

    before = [Place(n // 2, n % 2, k, "s", "c") for n, k in enumerate("abcdef")]
    plan = make_plan([row(k) for k in "fabdxyz"], 2, before, set("abcf"))  # c, e removed; d changed; x, y, z new
    assert [p.key for p in plan.kept] == ["a", "b"]
    made = [(t.number, [(i.place, i.row.key, i.before is not None) for i in t.items]) for t in plan.tasks]
    assert made == [
        (3, [(1, "d", False)]),
        (4, [(1, "f", True)]),
        (5, [(0, "x", False), (1, "y", False)]),
        (6, [(0, "z", False)]),
    ]


# --- interrupted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_the_packing_and_loses_nothing(
    tmp_path: Path, storage: str, fault: int, monkeypatch: pytest.MonkeyPatch, converted: list[str]
) -> None:
    source, out = bids(tmp_path / "bids", PEOPLE), tmp_path / "out"
    packed(source, tmp_path / "one", storage=storage)
    converted.clear()
    write, calls = HashedFile.write, []

    def full(self: HashedFile, content: Any) -> int:
        calls.append(self.path)
        if len(calls) > {"zarr": 4, "webdataset": 16}[storage]:  # within the second shard
            raise OSError(fault, os.strerror(fault))
        return write(self, content)

    monkeypatch.setattr(HashedFile, "write", full)
    with pytest.raises(DataError, match=f"{os.strerror(fault)}; free some space"):
        packed(source, out, storage=storage)
    done = len(converted)
    monkeypatch.setattr(HashedFile, "write", write)
    packed(source, out, storage=storage)
    assert done == 4 and len(converted) == done + len(PEOPLE) - 2  # one shard of two rows was complete
    assert content(out) == content(tmp_path / "one")


def change(path: Path) -> None:
    save(path, head(77))


@pytest.mark.parametrize(("act", "reason"), [(Path.unlink, "No such file"), (change, "changed while it was read")])
def test_a_source_that_vanishes_or_changes_is_rejected_and_tried_again(
    tmp_path: Path, storage: str, act: Callable[[Path], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = bids(tmp_path / "bids", PEOPLE), tmp_path / "out"

    def faulty(path: Path, *args: Any) -> Any:
        if path.name.startswith("sub-03"):
            if act is Path.unlink:
                path.unlink()
            found = canonical(path, *args)
            act(path)
            return found
        return canonical(path, *args)

    monkeypatch.setattr("shards.convert.canonical", faulty)
    assert packed(source, out, storage=storage)["rejected"] == 1
    assert reason in (out / "rejected.tsv").read_text()
    monkeypatch.setattr("shards.convert.canonical", canonical)
    change(source / "sub-03/anat/sub-03_T1w.nii.gz")
    assert packed(source, out, storage=storage)["rejected"] == 0
    packed(source, tmp_path / "new", storage=storage)
    assert Index.load(out).digest == Index.load(tmp_path / "new").digest


# --- command line and stage ---------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = bids(tmp_path / "bids", PEOPLE), tmp_path / "out"
    command = ["pack", str(source), str(out), "--spacing", "2", "--shape", "20", "24", "18", "--workers", "1"]
    command.append("--keep-suspect")
    assert main([*command, "--part", "2/2"]) == 0
    assert "2 of its 2 shards made now, 3 rows converted, 0 rows rejected" in capsys.readouterr().out
    assert main([*command, "--part", "3/2"]) == 2 and "expected I/N" in capsys.readouterr().err
    assert main(["merge", str(out)]) == 2 and "parts 1/2 have not run" in capsys.readouterr().err
    assert main([*command, "--part", "1/2"]) == 0 and f"shards merge {out}" in capsys.readouterr().out
    assert main(["merge", str(out)]) == 0 and "packed 7 of 7 rows" in capsys.readouterr().out
    assert not main(["pack", str(source), str(tmp_path / "other"), *command[3:]])
    assert content(out) == content(tmp_path / "other")
    assert main(command) == 0 and "packed 7 of 7 rows" in capsys.readouterr().out
    assert main(command) == 0 and "nothing was converted" in capsys.readouterr().out


def test_nothing_of_the_files_names_or_times_is_in_the_data_set(tmp_path: Path) -> None:
    rows = ["participant_id,path,age,sex"]
    for i in range(3):
        image = nib.Nifti1Image(head(i), np.diag([2.0, 2, 2, 1]))
        nib.save(image, tmp_path / f"Jane-Doe-{i}.nii.gz")
        os.utime(tmp_path / f"Jane-Doe-{i}.nii.gz", (981_173_106, 981_173_106))
        rows.append(f"p{i},Jane-Doe-{i}.nii.gz,4{i},F")
    (tmp_path / "scans.csv").write_text("\n".join(rows))
    packed(tmp_path / "scans.csv", tmp_path / "out")
    everything = b"".join(content(tmp_path / "out").values())
    assert b"Jane" not in everything and b"981173106" not in everything


def test_ray_gives_the_same_bytes(tmp_path: Path) -> None:
    """The stage with several workers, whose shards Ray distributes."""
    source = bids(tmp_path / "bids", PEOPLE)
    packed(source, tmp_path / "one")
    values = {"source": str(source), "out": str(tmp_path / "out"), "spacing": 2.0, "shape": list(SIZE)}
    values |= {"max_rejects": "100%", "keep_suspect": True}
    config = load_config(PackConfig, "pack", "default", ["compute.workers=2"], values)
    assert execute(plan("pack", config))["packed"] == len(PEOPLE)
    assert content(tmp_path / "one") == content(tmp_path / "out")
    events = read(STAGES["pack"].run_folder(tmp_path / "out"))
    assert [event["step"] in (1, 2) for event in events if event["event"] == "metrics"] == [True]
