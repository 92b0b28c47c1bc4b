"""A run folder: one process at a time works in it, and its record describes the result that is there."""

import dataclasses
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from mvhpc.config import ConfigError, load_config
from mvhpc.data_stages import PackConfig, PhantomConfig
from mvhpc.execute import execute, plan
from mvhpc.inference.predictor import PredictConfig
from mvhpc.pipeline.run import do
from mvhpc.runs.folder import Run, exclusive, identity, read_record
from mvhpc.stages import STAGES
from mvhpc.training.vae import VAEConfig
from shards.errors import TooManyRejects
from shards.files import lock_file, write_once
from shards.index import Index
from shards.pack import pack
from shards.split import record_split

HOLD = """
import sys
from pathlib import Path
from mvhpc.runs.folder import exclusive
with exclusive(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_held_until_its_process_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "people.run"
    folder.mkdir()
    config = load_config(PhantomConfig, "phantom", "demo", ["subjects=2"], {"out": str(tmp_path / "people")})
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConfigError, match=f"{folder}: process {other.pid} of host .* is at work there"):
            execute(plan("phantom", config))
        assert not (folder / "stage.json").exists() and not (tmp_path / "people").exists()
        other.kill()
    assert execute(plan("phantom", config)) == {"subjects": 2}
    with exclusive(folder), pytest.raises(ConfigError, match="at work there"), exclusive(folder):
        pass


RECORD = ("stage.json", "config.yaml", "tracking.json")


def record(folder: Path) -> list[bytes]:
    """What a run folder says of the result beside it."""
    return [(folder / name).read_bytes() for name in RECORD]


def test_data_that_are_refused_leave_the_record_of_what_is_there(tiny_bids: Path, tmp_path: Path) -> None:
    values = {"source": str(tiny_bids), "out": str(tmp_path / "packed.v1"), "spacing": 8.0, "shape": [16, 16, 16]}
    values |= {"workers": 1, "split": [0.4, 0.1, 0.5], "keep_suspect": True}
    execute(plan("pack", load_config(PackConfig, "pack", values=values)))
    before = record(tmp_path / "packed.v1.run")
    changed = plan("pack", load_config(PackConfig, "pack", values={**values, "seed": 1}))
    assert changed.state() == "changed"
    with pytest.raises(FileExistsError, match=r"packed\.v1 exists already"):
        execute(changed)
    assert record(tmp_path / "packed.v1.run") == before
    unchanged = plan("pack", load_config(PackConfig, "pack", values=values))
    assert unchanged.state() == "finished"
    record_split(tmp_path / "packed.v1", None, 2, 0, None, None)
    assert unchanged.state() == "finished"
    options = {name: values[name] for name in ("spacing", "shape", "workers", "keep_suspect")}
    pack(tiny_bids, tmp_path / "packed.v1", **options, fractions=(0.2, 0.4, 0.4))  # by another command
    assert unchanged.state() == "changed"


def test_a_packing_with_a_higher_limit_goes_on(
    tiny_bids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shards that are complete are reused, as the message of the refusal says."""
    source = shutil.copytree(tiny_bids, tmp_path / "source")
    next(source.rglob("sub-01*.nii.gz")).write_bytes(b"no scan")
    (source / "sub-new").mkdir()
    values = {"source": str(source), "out": str(tmp_path / "packed"), "spacing": 8.0, "shape": [16, 16, 16]}
    values |= {"workers": 1, "split": [0.4, 0.1, 0.5], "keep_suspect": True, "max_rejects": "0"}
    with pytest.raises(TooManyRejects, match=r"pack\.max_rejects=1"):
        do(plan("pack", load_config(PackConfig, "pack", values=values)))
    higher = load_config(PackConfig, "pack", values={**values, "max_rejects": 1})
    assert (do(plan("pack", higher)) or {})["converted"] == 0
    assert not list(tmp_path.glob("*.old-*"))
    printed = capsys.readouterr().err
    assert f"\nrejected 1: see {tmp_path / 'packed' / 'rejected.tsv'}\n" in printed
    assert (
        "\nnote: skipped 1 subject folder that has no row in participants.tsv, until one is added: sub-new\n" in printed
    )


def test_a_stage_that_fails_or_is_interrupted_leaves_the_record_of_what_is_there(
    tiny_early: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    values = {"model": str(tiny_early), "data": str(tiny_dataset), "out": str(tmp_path / "age.tsv")}
    values |= {"given": ["image"], "want": ["age"], "compute.device": "cpu", "compute.threads": 1}
    values |= {"sampling.steps": 2}
    finished = plan("predict", load_config(PredictConfig, "predict", values=values))
    execute(finished)
    before = record(finished.folder)
    if not torch.cuda.is_available():
        absent = load_config(PredictConfig, "predict", values={**values, "compute.device": "cuda"})
        with pytest.raises(ConfigError, match="torch sees no CUDA device"):
            execute(plan("predict", absent))
        assert record(finished.folder) == before

    def interrupt() -> None:
        while read_record(finished.folder)["status"] != "running":
            time.sleep(0.01)
        time.sleep(0.5)  # until it draws, which takes several seconds
        os.kill(os.getpid(), signal.SIGINT)

    other = load_config(
        PredictConfig,
        "predict",
        values={**values, "seed": 1, "sampling.steps": 50, "samples": 1000, "batch": 1},
    )
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        execute(plan("predict", other))
    thread.join()
    log = (finished.folder / "log.txt").read_text()
    assert log.endswith("interrupted\n") and "KeyboardInterrupt" not in log
    assert record(finished.folder) == before
    assert finished.state() == "finished"


def test_of_several_writers_of_a_text_the_first_one_stays(tmp_path: Path) -> None:
    """Threads have one process number, as processes of two containers may have. A process that was killed left an empty
    file behind."""
    for number in range(20):
        path = tmp_path / f"token-{number}"
        if number % 2:
            path.touch()
            write_once(path, "0")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(partial(write_once, path), map(str, range(8))))
        first = path.read_text()
        assert first == "0" if number % 2 else first in "01234567"
        assert path.stat().st_mode & 0o777 == 0o600
        write_once(path, "later")
        assert path.read_text() == first
    assert len(list(tmp_path.iterdir())) == 20


def test_a_lock_of_a_dead_node_is_waited_for(tmp_path: Path) -> None:
    """Its server frees it some time later; this host's own processes are believed at once."""
    with exclusive(tmp_path):
        (tmp_path / ".lock").write_text("process 7 of host elsewhere")
        with pytest.raises(ConfigError, match="process 7 of host elsewhere"), exclusive(tmp_path, patience=1.5):
            pass
    with exclusive(tmp_path):
        assert "elsewhere" not in (tmp_path / ".lock").read_text()


def test_a_lock_survives_the_removal_of_its_file(tmp_path: Path) -> None:
    """Whoever waits for a file that its holder removes gets the lock of a new one, and nobody else holds that."""
    path, inside, most = tmp_path / "lock", [], []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(50):
            with lock_file(path):
                inside.append(1)
                most.append(len(inside))
                inside.pop()
                path.unlink()  # which lets others in

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(most) == 200 and set(most) == {1}


def test_a_lock_is_waited_for_as_long_as_patience_lasts(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    taken = threading.Event()

    def wait() -> None:
        with lock_file(path, 30):
            taken.set()

    waiting = threading.Thread(target=wait)
    with lock_file(path):
        start = time.monotonic()
        with pytest.raises(BlockingIOError, match=f"locked by another process: .{path}"), lock_file(path, 0.5):
            pass
        assert 0.5 <= time.monotonic() - start < 5
        with pytest.raises(BlockingIOError), lock_file(path, 0):
            pass
        waiting.start()
        assert not taken.wait(0.5)
    waiting.join(30)
    assert taken.is_set()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused where a lock is required; a run folder there can be used all the same."""

    def without(*_: object) -> None:
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(OSError, match="no locks here"), lock_file(tmp_path / "lock"):
        pass
    with exclusive(tmp_path), exclusive(tmp_path):
        pass


def test_only_the_split_in_use_identifies_packed_data(tiny_dataset: Path, tmp_path: Path) -> None:
    """Another split beside it changes no stage; another assignment under its name is another input."""
    data = shutil.copytree(tiny_dataset, tmp_path / "packed")

    def planned(split: str) -> str:
        values = {"data": str(data), "out": str(tmp_path / "vae"), "split": split}
        return plan("vae", load_config(VAEConfig, "vae", "demo", (), values)).fingerprint

    index, before = Index.load(data), planned("default")
    record_split(data, None, 3, 0, None, None)
    record_split(data, (0, 0, 1), None, 0, None, "test-only")
    again = Index.load(data)
    assert len(again.splits) == len(index.splits) + 4 and again.digest == index.digest
    assert planned("default") == before
    assert len({planned(split) for split in again.splits}) == len(again.splits)
    other = dataclasses.replace(again.splits["default"], assignment=again.splits["fold-1-of-3"].assignment)
    dataclasses.replace(again, splits={**again.splits, "default": other}).save(data)
    assert planned("default") != before


def test_the_number_of_packing_processes_decides_nothing(tiny_bids: Path, tmp_path: Path) -> None:
    places = {"source": str(tiny_bids), "out": str(tmp_path / "packed")}
    prints = {
        plan("pack", load_config(PackConfig, "pack", "demo", [f"workers={n}"], places)).fingerprint for n in (0, 1, 7)
    }
    assert len(prints) == 1


@pytest.mark.parametrize(("stage", "key"), [("pack", "exclude"), ("pack", "pseudonymise"), ("preprocess", "template")])
def test_a_file_that_a_stage_reads_counts_by_its_content(stage: str, key: str, tiny_bids: Path, tmp_path: Path) -> None:
    """After an edit its result is outdated; under another name it is the same file."""
    file, copied = tmp_path / "file", tmp_path / "copy"

    def planned(path: Path | str) -> str:
        values = {"source": str(tiny_bids), "out": str(tmp_path / "out"), key: str(path)}
        return plan(stage, load_config(STAGES[stage].config_class(), stage, values=values)).fingerprint

    file.write_text("first")
    before = planned(file)
    assert planned(shutil.copy(file, copied)) == before != planned("")
    file.write_text("other")
    assert planned(file) != before


def test_a_file_that_is_away_is_no_changed_one(tiny_bids: Path, tmp_path: Path) -> None:
    verdicts, out = tmp_path / "verdicts.tsv", tmp_path / "packed"
    verdicts.write_text("key\tverdict\nsub-00\treject\n")
    values = {"source": str(tiny_bids), "out": str(out), "exclude": str(verdicts)}
    planned = plan("pack", load_config(PackConfig, "pack", values=values))
    for folder in (out, planned.folder):
        folder.mkdir()
    planned.mark_finished()
    verdicts.rename(tmp_path / "unmounted")
    again = plan("pack", planned.config)
    assert again.state() == "finished" and again.missing == {"exclude": str(verdicts)}


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".img"])
@pytest.mark.parametrize("kind", ["tree", "table"])
def test_a_scan_of_the_same_size_is_another_input(kind: str, ending: str, tmp_path: Path) -> None:
    """The checksum at the end of a compressed scan tells, else its time."""
    source, anat = tmp_path / "source", tmp_path / "source" / "sub-1" / "anat"
    anat.mkdir(parents=True)
    scan = anat / f"sub-1_T1w{ending}"
    table = source / "participants.tsv"
    named = scan.relative_to(source).as_posix().replace(".img", ".hdr")
    table.write_text(f"participant_id\tpath\nsub-1\t{named}\n")
    image = nib.Nifti1Pair if ending == ".img" else nib.Nifti1Image
    found = []
    for order in (1, -1):
        voxels = np.random.default_rng(0).integers(256, size=512).astype(np.uint8)[::order]
        nib.save(image(voxels.reshape(8, 8, 8), np.eye(4)), scan)
        os.utime(scan, (1e9 + order, 1e9 + order))
        found.append((identity(source if kind == "tree" else table), scan.stat().st_size))
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_a_copy_is_the_same_input(tiny_bids: Path, tmp_path: Path) -> None:
    """Also where it does not keep the times of files; a table of people of the same size is another one."""
    shutil.copytree(tiny_bids, tmp_path / "copy", copy_function=shutil.copyfile)
    assert identity(tmp_path / "copy") == identity(tiny_bids)
    table = tmp_path / "copy" / "participants.tsv"
    table.write_text(table.read_text().replace("\tF", "\tM"))
    assert identity(tmp_path / "copy") != identity(tiny_bids)


def test_scans_that_a_table_names_are_found_as_packing_finds_them(tiny_bids: Path, tmp_path: Path) -> None:
    """Below the folder of all files, where there is one; where none of them is there, their file system is away."""
    table, scans = tmp_path / "people.csv", tmp_path / "scans"
    table.write_text("participant_id,path\nsub-00,sub-00/anat/sub-00_T1w.nii.gz\nsub-99,sub-99.nii.gz\n")
    with pytest.raises(FileNotFoundError, match=r"sub-00_T1w\.nii\.gz"):
        identity(table)
    shutil.copytree(tiny_bids, scans)
    before = identity(table, files_root=str(scans))
    shutil.copy(scans / "sub-01" / "anat" / "sub-01_T1w.nii.gz", scans / "sub-00" / "anat" / "sub-00_T1w.nii.gz")
    assert identity(table, files_root=str(scans)) != before


def test_a_run_folder_is_its_owners_alone(tmp_path: Path) -> None:
    assert Run(tmp_path / "pipeline.run").folder.stat().st_mode & 0o777 == 0o700
