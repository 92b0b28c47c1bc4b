"""Packings that are killed at any moment: run again, they end with the bytes of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.dataset import open_dataset
from shards.verify import foreign_files, verify
from tests.packing import PEOPLE, bids, content, head, packed, save, volumes


@pytest.fixture(autouse=True)
def two_per_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.shard_writer.SHARD_RECORDS", 2)


KILLED = """
import sys
import shards.shard_writer
shards.shard_writer.SHARD_RECORDS = 2
from shards.pack import pack
if __name__ == "__main__":
    source, out, storage, workers = sys.argv[1:]
    pack(source, out, storage=storage, spacing=2.0, shape=(20, 24, 18), workers=int(workers), max_rejects="100%",
         keep_suspect=True)
"""


@pytest.mark.parametrize(("storage", "workers"), [("zarr", 1), ("webdataset", 2)])
def test_killed_at_any_moment_and_run_again(tmp_path: Path, storage: str, workers: int) -> None:
    """An update of a data set is killed again and again; all the while the old data set can be read."""
    source, script = bids(tmp_path / "bids", PEOPLE), tmp_path / "killed.py"
    script.write_text(KILLED)
    outs = [tmp_path / name for name in ("killed", "once")]
    for out in outs:
        packed(source, out, storage=storage)
    old = volumes(outs[0])
    save(source / "sub-01/anat/sub-01_T1w.nii.gz", head(40))
    people = [(f"sub-{i}", "50", "F") for i in range(60, 66)]
    for name, *_ in people:
        save(source / name / "anat" / f"{name}_T1w.nii.gz", head(int(name[4:])))
    table = source / "participants.tsv"
    table.write_text(table.read_text() + "".join("\t".join(p) + "\n" for p in people))
    draw, kills = random.Random(workers), 0
    for _ in range(5):
        command = [sys.executable, str(script), str(source), str(outs[0]), storage, str(workers)]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        limit = time.monotonic() + draw.uniform(0.2, 0.6) * (1 + kills)  # the first within the imports
        while process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        assert volumes_of_old(outs[0], old)
    packed(source, outs[0], storage=storage)
    packed(source, outs[1], storage=storage)
    assert content(outs[0]) == content(outs[1]) and kills


OTHER_OPTIONS = """
import os, signal, sys
from pathlib import Path
import shards.header
from shards.pack import pack
moment, source, out = sys.argv[1:]
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
replace = Path.replace
def first_move(self, target):
    replace(self, target)
    if target.name in ("0", "shard-00000.tar"): die()
if moment == "first move": Path.replace = first_move
if moment == "header": shards.header.write_bytes = die
pack(source, out, spacing=2.0, shape=(20, 24, 18), max_rejects="100%", keep_suspect=True)
"""


@pytest.mark.parametrize("moment", ["first move", "header"])
@pytest.mark.parametrize(
    ("other", "update"),  # another grid or format is refused where a data set is
    [("storage", False), ("spacing", False), ("pseudonymise", False), ("pseudonymise", True)],
)
def test_killed_and_run_with_other_options(tmp_path: Path, moment: str, other: str, update: bool) -> None:
    """Nothing of the interrupted packing stays, and everything that is not of a packing does."""
    source, out, key = bids(tmp_path / "bids", PEOPLE[:3]), tmp_path / "out", tmp_path / "key"
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    options: dict[str, object] = {"storage": "webdataset", "spacing": 4.0, "pseudonymise": key}
    options = {other: options[other]}
    if update:
        packed(source, out, **options)
        save(source / "sub-01/anat/sub-01_T1w.nii.gz", head(40))
    out.mkdir(exist_ok=True)
    (out / "notes.txt").write_text("mine")
    command = [sys.executable, "-c", OTHER_OPTIONS, moment, str(source), str(out)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    packed(source, out, **options)
    packed(source, tmp_path / "once", **options)
    assert not list(verify(out))
    found = content(out)
    assert found.pop("notes.txt") == b"mine"
    if update:
        assert volumes(out) == volumes(tmp_path / "once") and foreign_files(out) == ["notes.txt"]
    else:
        assert found == content(tmp_path / "once")
    assert {p.relative_to(out).parts[0] for p in out.rglob("*")} - {"notes.txt"} == {n.split("/")[0] for n in found}
    if other == "pseudonymise":
        assert not any(b"sub-0" in raw for raw in [*found.values(), *map(str.encode, found)])


EACH_WRITE = """
import os, shutil, signal, sys
from pathlib import Path
import shards.shard_writer
from shards.pack import pack
shards.shard_writer.SHARD_RECORDS = 2
os.fsync = lambda _: None  # the machine does not die, and the test takes half of the time
source, before, out, storage = map(Path, sys.argv[1:])
writes = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
done = 0

def run():
    pack(source, out, storage=str(storage), spacing=2.0, shape=(20, 24, 18), max_rejects="100%", keep_suspect=True)

def killed_at(number):
    # Run in a process that dies right before its write of that number; whether there was one.
    child = os.fork()
    if child == 0:
        def hook(event, args):
            global done
            reads = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)
            if event in writes and str(out) in str(args[0]) and not reads:
                if done == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                done += 1
        sys.addaudithook(hook)
        run()
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL

def start():
    shutil.rmtree(out, ignore_errors=True)
    if before.is_dir():
        shutil.copytree(before, out)

def content():
    return {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}

start()
run()
expected, number = content(), 0
while start() or killed_at(number):
    run()
    found = content()
    assert found == expected, (number, [str(p) for p in found | expected if found.get(p) != expected.get(p)])
    number += 1
print(number)
"""


@pytest.mark.parametrize("storage", ["zarr", "webdataset"])
@pytest.mark.parametrize("update", [False, True])
def test_killed_before_any_write_and_run_again(tmp_path: Path, storage: str, update: bool) -> None:
    """A new data set, and an update of one: whichever write is the last, the next packing ends with the same bytes."""
    source, before = bids(tmp_path / "bids", PEOPLE[:3]), tmp_path / "before"
    if update:
        packed(source, before, storage=storage)
        save(source / "sub-01/anat/sub-01_T1w.nii.gz", head(40))
        table = source / "participants.tsv"
        table.write_text(table.read_text().replace("sub-02", "sub-09"))
        (source / "sub-02/anat/sub-02_T1w.nii.gz").rename(source / "sub-02/anat/sub-09_T1w.nii.gz")
        (source / "sub-02").rename(source / "sub-09")
    script = tmp_path / "each.py"
    script.write_text(EACH_WRITE)
    arguments = [str(source), str(before), str(tmp_path / "out"), storage]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 20  # writes, each of which was the last


def volumes_of_old(folder: Path, old: dict[str, bytes]) -> bool:
    """Whether every row that has not changed can be read, from the old index or from the new one."""
    dataset = open_dataset(folder)
    return all(dataset.read(key, "image").tobytes() == raw for key, raw in old.items() if key != "sub-01")
