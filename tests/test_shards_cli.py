"""The `shards` command, and processes of it that are killed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvhpc.config import load_config
from mvhpc.data_stages import PackConfig
from shards.__main__ import main
from shards.dataset import open_dataset
from shards.errors import TooManyRejects, explain
from shards.files import is_complete
from shards.index import Index
from shards.pack import pack
from shards.verify import verify
from shards.volumes import canonical
from tests.packing import PEOPLE, SIZE, bids, content, packed

# --- processes that are killed ------------------------------------------------------------------------------------

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import shards.header, shards.index, shards.shard_writer
from shards.pack import pack
from shards.packing.journal import Journal
shards.shard_writer.SHARD_RECORDS = 2
moment, source, out, storage = sys.argv[1:]
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
add = Journal.add
def second_shard(self, shard):
    if self.shards: die()
    add(self, shard)
moved = []
def second_move(self, target):
    moved.extend([target] if target.suffix in ("", ".tar") else [])
    return die() if len(moved) == 2 else os.replace(self, target)
def torn(path, content):
    path.with_name(".index.json.part").write_bytes(content[:100])
    die()
if moment == "second shard": Journal.add = second_shard
if moment == "move": Path.replace = second_move
if moment == "index": shards.index.Index.save = die
if moment == "torn index": shards.header.write_bytes = torn
if moment == "clean-up": shutil.rmtree = lambda path, **_: die() if Path(path).name == ".partial" else None
pack(source, out, storage=storage, spacing=2.0, shape=(20, 24, 18), workers=1, keep_suspect=True)
"""


@pytest.mark.parametrize(
    ("moment", "storage"),
    [
        *((moment, "zarr") for moment in ("second shard", "move", "index", "torn index", "clean-up")),
        *((moment, "webdataset") for moment in ("second shard", "move", "index")),
    ],
)
def test_a_killed_packing_is_complete_or_resumes(
    tmp_path: Path, moment: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever the process is killed, its output is seen as what it is, and the next one ends with the same bytes."""
    source, out = bids(tmp_path / "bids", PEOPLE), tmp_path / "out"
    arguments = [moment, str(source), str(out), storage]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert is_complete(out) == (moment == "clean-up")
    monkeypatch.setattr("shards.shard_writer.SHARD_RECORDS", 2)
    packed(source, tmp_path / "once", storage=storage, max_rejects="5%")
    if moment == "clean-up":
        assert list(verify(out)) == []
    monkeypatch.setattr("shards.convert.canonical", counted := Counted(canonical))
    packed(source, out, storage=storage, max_rejects="5%")
    assert counted.calls == (5 if moment == "second shard" else 0)  # complete shards are not made again
    if moment != "clean-up":
        (out / ".index.json.part").unlink(missing_ok=True)
    assert content(out) == content(tmp_path / "once") and is_complete(out)


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


def test_files_of_others_do_not_make_a_result_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not is_complete(out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert not is_complete(out)
    source = bids(tmp_path / "bids", PEOPLE)
    (source / "sub-03/anat/sub-03_T1w.nii.gz").unlink()
    with pytest.raises(TooManyRejects):
        packed(source, out, max_rejects="0")
    assert (out / "rejected.tsv").exists() and not is_complete(out)
    assert is_complete(out / "rejected.tsv")


# --- command line -------------------------------------------------------------------------------------------------


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = bids(tmp_path / "bids", [*PEOPLE, ("sub-x", "200", "F")]), tmp_path / "out"
    command = ["pack", str(source), str(out), "--spacing", "2", "--shape", "16", "18", "14", "--workers", "1"]
    command.append("--keep-suspect")
    assert main([*command, "--format", "webdataset"]) == 1
    printed = capsys.readouterr()
    assert (out / "rejected.tsv").is_file() and "1 of 8 rows are faulty" in printed.err
    assert printed.err.startswith("packing 7 rows into 1 shard, in 1 process\n")
    assert main([*command, "--format", "webdataset", "--max-rejects", "20%"]) == 0
    printed = capsys.readouterr()
    assert "packed 7 of 8 rows" in printed.out
    assert "packing" not in printed.err  # the shard was complete before
    assert main(["verify", str(out)]) == 0
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "16 x 18 x 14 float16, 2 mm, RAS" in text and "F 4, M 3" in text and "35.0 (SD 10.0) years, 20 to 50" in text
    assert main(["inspect", str(out), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["splits"]["default"]["test"] == 1 and described["provenance"]["rejected"] == 1
    raw = bytearray((out / "shards/shard-00000.tar").read_bytes())
    raw[5000] ^= 1
    (out / "shards/shard-00000.tar").write_bytes(raw)
    assert main(["verify", str(out)]) == 1
    assert "shards/shard-00000.tar: sub-00.image.npy" in capsys.readouterr().err


def test_options_come_from_a_preset_and_flags_go_over_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The short form takes spacing and shape from configs/pack, as the stage does."""
    source = bids(tmp_path / "bids", PEOPLE)
    for arguments, preset in ([], "default"), (["--config", "demo"], "demo"):
        out = tmp_path / preset
        assert main(["pack", str(source), str(out), *arguments, "--workers", "1", "--keep-suspect"]) == 0
        stage = load_config(PackConfig, "pack", preset, (), {"source": str(source), "out": str(out)})
        used = Index.load(out).provenance["arguments"]
        assert {"format": stage.format, "spacing": stage.spacing, "shape": stage.shape} | used == used
        assert (used["fractions"], used["seed"], used["max_rejects"]) == (stage.split, stage.seed, stage.max_rejects)
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        "spacing: 4\nshape: [10, 12, 9]\nworkers: 1\nsplit_column: set\nmax_rejects: 3\nkeep_suspect: true\n"
    )
    flags = ["--split", "0", "0", "1", "--format", "webdataset"]
    assert main(["pack", str(source), str(tmp_path / "mine"), "--config", str(preset), *flags]) == 0
    index = Index.load(tmp_path / "mine")
    assert (index.storage, index.grid["spacing"], index.grid["shape"]) == ("webdataset", 4, [10, 12, 9])
    assert set(index.split().assignment.values()) == {"test"}
    capsys.readouterr()
    for text, reason in [
        ("spacin: 4", "Did you mean 'spacing'"),
        ("spacing: wide", "spacing: 'wide' where a value such as 2.0"),
        ("shape: [10, 12]", "shape: [10, 12] where a value such as ['auto']"),
        ("folds: true", "folds: True"),
        ("- 4", "expected 'key: value' lines"),
        ("a: b: c", "not readable as YAML"),
    ]:
        preset.write_text(text)
        assert main(["pack", str(source), str(tmp_path / "no"), "--config", str(preset)]) == 2
        assert f"{preset}: " in (message := capsys.readouterr().err) and reason in message
    with pytest.raises(SystemExit, match="2"):
        main(["pack", str(source), str(tmp_path / "no"), "--split", "1", "0", "0", "--split-column", "x"])
    assert "not allowed with argument --split" in capsys.readouterr().err


def test_errors_are_one_line_without_traceback(tmp_path: Path) -> None:
    for arguments, status, reason in [
        (["phantom", str(tmp_path / "p"), "--subjects", "0"], 2, "at least one"),
        (["pakc", "a", "b"], 2, "Did you mean 'pack'?"),
        (["verify", str(tmp_path)], 2, "no packed data set here"),
        (["verify", str(tmp_path), "--workers", "-1"], 2, "expected a number of processes, or 0 for one per core"),
        (["pack", "nowhere", str(tmp_path), "--spacing", "2", "--shape", "8", "8", "8"], 2, "no such folder"),
        (["pack", "nowhere", "out", "--config", "dmo"], 2, "Did you mean 'demo'?"),
        (["pack", "nowhere", "out", "--spacing", "1_2"], 2, "'1_2'"),
        (["pack", "nowhere", "out", "--shape", "1_6", "16", "16"], 2, "'1_6'"),
        (["phantom", "out", "--subjects", "1_0"], 2, "'1_0'"),
    ]:
        done = subprocess.run([sys.executable, "-m", "shards", *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert reason in done.stderr and len(done.stderr.splitlines()) == 1
    done = subprocess.run(
        [sys.executable, "-m", "shards", "pack", "--help"], capture_output=True, text=True, check=True
    )
    assert "examples:" in done.stdout and "--max-rejects" in done.stdout


def test_a_folder_of_any_name_is_packed_and_read_in_the_locale_c(tmp_path: Path) -> None:
    source = bids(tmp_path / "source", PEOPLE[:2])
    out, options = str(tmp_path / "Zürich"), ["--spacing", "2", "--shape", *map(str, SIZE), "--keep-suspect"]
    for arguments in (["pack", str(source), out, *options], ["verify", out], ["inspect", out]):
        done = subprocess.run(
            [sys.executable, "-m", "shards", *arguments],
            env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_a_full_disk_is_named_with_what_to_do() -> None:
    """The operating system does not name the file whose content finds no room."""
    full = OSError(errno.ENOSPC, "No space left on device")
    assert explain(full, "out") == "the disk of out is full: free some space and repeat the command"
    named = OSError(errno.ENOENT, "No such file or directory", "x")
    assert explain(named, "out") == "[Errno 2] No such file or directory: 'x'"


@pytest.mark.parametrize("module", ["shards.__main__", "mvhpc.cli", "mvhpc.bids_app", "launchers.submit"])
def test_commands_draw_without_the_backend_of_a_notebook(module: str) -> None:
    """Jupyter names it to the commands that it starts, and it is no part of their Python."""
    script = f"import {module}, mvhpc.evaluation.figures"
    environment = {**os.environ, "MPLBACKEND": "module://no_such_module"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif("MVHPC_IXI" not in os.environ, reason="needs real scans: set MVHPC_IXI to their BIDS folder")
def test_real_scans_are_centred_and_whole(tmp_path: Path) -> None:
    summary = pack(os.environ["MVHPC_IXI"], tmp_path, spacing=4, shape=(40, 48, 40), workers=2)
    assert summary["rejected"] == 0 and summary["cropped"] == 0
    dataset = open_dataset(tmp_path)
    for key in dataset.keys():  # noqa: SIM118 - not a dictionary
        voxels = dataset.read(key, "image").astype(np.float64)
        positions = np.indices(voxels.shape).reshape(3, -1)
        centre = positions @ voxels.ravel() / voxels.sum()
        np.testing.assert_allclose(centre, [20, 24, 20], atol=0.3)


def test_a_derivative_of_fmriprep_is_packed_by_entities_and_names(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = bids(tmp_path / "source", PEOPLE)
    for file in sorted(source.rglob("*_T1w.nii.gz")):
        stem = file.name.removesuffix("_T1w.nii.gz")
        shutil.copy(file, file.with_name(f"{stem}_space-MNI152NLin2009cAsym_desc-preproc_T1w.nii.gz"))
        file.rename(file.with_name(f"{stem}_desc-preproc_T1w.nii.gz"))
    table = source / "participants.tsv"
    table.write_text(table.read_text().replace("\tage\t", "\tyears\t", 1).replace("\tsex", "\tGender", 1))
    out = tmp_path / "packed"
    command = [
        "pack",
        str(source),
        str(out),
        *["--spacing", "2", "--shape", "20", "24", "18", "--workers", "1", "--keep-suspect"],
    ]
    chosen = ["--entities", "space=MNI152NLin2009cAsym,desc=preproc", "--rename", "years=age"]
    assert main([*command, *chosen[2:]]) == 1 and "choose by --entities" in capsys.readouterr().err
    assert main([*command, *chosen[:2]]) == 2 and "--rename COLUMN=age" in capsys.readouterr().err
    assert main([*command, *chosen]) == 0
    output = capsys.readouterr().out
    assert "note: column 'years' is read as 'age'" in output and "note: column 'Gender' is read as 'sex'" in output
    index = Index.load(out)
    assert index.provenance["arguments"]["entities"] == {"space": "MNI152NLin2009cAsym", "desc": "preproc"}
    assert {r.values["sex"] for r in index.records} >= {"F", "M"}
    with pytest.raises(SystemExit):
        main([*command, "--entities", "space"])
