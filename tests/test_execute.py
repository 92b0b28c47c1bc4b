"""A stage is done whole, recorded as finished the moment it is, and an outdated result is set aside, never lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mvhpc.config import ConfigError, load_config
from mvhpc.data_stages import PackConfig, PhantomConfig
from mvhpc.execute import PlannedStage, execute, plan, set_aside
from mvhpc.inference.prediction_tables import write_predictions
from mvhpc.pipeline.run import do
from mvhpc.runs.folder import read_record
from mvhpc.stages import STAGES
from mvhpc.training.vae import VAEConfig
from shards.errors import DataError
from shards.schema import Schema

HOLD = """
import sys
from pathlib import Path
from mvhpc.runs.folder import exclusive
with exclusive(Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.read()
"""


def phantom(out: Path, subjects: int = 2) -> PlannedStage:
    overrides = [f"subjects={subjects}", "shape=[16,16,16]"]
    return plan("phantom", load_config(PhantomConfig, "phantom", "demo", overrides, {"out": str(out)}))


def test_a_result_without_its_record_is_taken_as_finished(tmp_path: Path) -> None:
    """The process was killed after the result was renamed into place and before the record was written."""
    out = tmp_path / "scans"
    execute(phantom(out))
    record = tmp_path / "scans.run" / "stage.json"
    content = json.loads(record.read_text())
    for key in ("summary", "seconds"):
        del content[key]
    record.write_text(json.dumps(content | {"status": "running"}))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert phantom(out).state() == "finished"
    assert do(phantom(out)) is None
    assert read_record(record.parent)["status"] == "finished"
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert phantom(out, subjects=3).state() == "changed"


def test_a_result_that_another_command_made_anew_is_set_aside(tmp_path: Path) -> None:
    out = tmp_path / "scans"
    do(phantom(out))
    described = out / "dataset_description.json"
    content = json.loads(described.read_text())
    described.write_text(json.dumps({**content, "GeneratedBy": [{**content["GeneratedBy"][0], "Version": "99"}]}))
    assert phantom(out).state() == "finished"  # by another version
    described.write_text(json.dumps({**content, "Name": "another"}))
    assert phantom(out).state() == "changed"
    do(phantom(out))
    assert "another" in (tmp_path / "scans.old-1" / described.name).read_text()
    record = tmp_path / "scans.run" / "stage.json"
    record.write_text(json.dumps({k: v for k, v in read_record(record.parent).items() if k != "description"}))
    described.write_text("{")
    assert phantom(out).state() == "finished"  # recorded by an earlier version


@pytest.mark.parametrize("stage", ["vae", "pack"])
def test_predictions_that_are_written_to_the_folder_of_a_result_leave_it_finished(
    stage: str, tiny_dataset: Path, tmp_path: Path
) -> None:
    """They make the folder a BIDS derivative; the model would be trained again."""
    out, source = tmp_path / "out", tmp_path / "source"
    for folder in (out, source, tmp_path / "out.run"):
        folder.mkdir()
    if stage == "pack":
        shutil.copytree(tiny_dataset, out, dirs_exist_ok=True)
    paths = {"out": str(out), {"vae": "data", "pack": "source"}[stage]: str(source)}
    made = plan(stage, load_config(STAGES[stage].config_class(), stage, "demo", (), paths))
    made.mark_finished()
    assert made.state() == "finished"
    facts = {"given": ["image"], "want": ["age"]}
    write_predictions(out / "age.tsv", [{"key": "sub-01", "subject": "sub-01", "age": 50.0}], Schema.load(), facts)
    assert (out / "dataset_description.json").exists()
    assert made.state() == "finished"


def test_packed_data_as_the_source_of_a_packing_are_refused_in_words(tiny_dataset: Path, tmp_path: Path) -> None:
    """The key ``split`` of a packing has numbers, and is no name of a recorded split."""
    paths = {"out": str(tmp_path / "out"), "source": str(tiny_dataset)}
    with pytest.raises(DataError, match=r"participants\.tsv"):
        do(plan("pack", load_config(PackConfig, "pack", "demo", (), paths)))


def test_a_strangers_folder_is_never_taken_for_a_result(tmp_path: Path) -> None:
    out = tmp_path / "scans"
    out.mkdir()
    (out / "dataset_description.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(FileExistsError, match="scans exists already"):
            execute(phantom(out))
    with pytest.raises(ConfigError, match="scans exists, and no record says that stage phantom made it"):
        do(phantom(out))
    assert [path.name for path in tmp_path.glob("scans*/*.json")] == ["dataset_description.json"]


def test_what_is_set_aside_takes_a_free_name(tmp_path: Path) -> None:
    out = tmp_path / "scans"
    (tmp_path / "scans.old-2").mkdir()
    (tmp_path / "scans.old-2" / "kept").touch()
    for subjects in (2, 3, 4):
        do(phantom(out, subjects))
    assert (tmp_path / "scans.old-2" / "kept").exists()
    count = {name: len(list((tmp_path / name).glob("sub-*"))) for name in ("scans.old-1", "scans.old-3", "scans")}
    assert count == {"scans.old-1": 2, "scans.old-3": 3, "scans": 4}


def training(out: Path, seed: int) -> PlannedStage:
    overrides = [f"data={out}-data", f"training.seed={seed}"]
    return plan("vae", load_config(VAEConfig, "vae", "demo", overrides, {"out": str(out)}))


def set_aside_and_die(planned: PlannedStage, changes: int) -> bool:
    """Set a result aside in another process, which is killed after some changes of files; return whether it was."""

    def count(event: str, arguments: object) -> None:
        nonlocal changes
        if event in {"os.mkdir", "os.rename", "os.remove"}:
            changes -= 1
            if changes < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(count)
            set_aside(planned)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def test_a_training_that_a_kill_left_set_aside_in_part_is_neither_finished_nor_a_strangers(tmp_path: Path) -> None:
    """Killed at any moment, it is set aside again by the new settings, and begins anew by the old ones."""
    whole = {"checkpoints", "model", "journal.jsonl", "stage.json"}
    for changes in range(99):
        out = tmp_path / f"{changes}" / "vae"
        before, after = training(out, 0), training(out, 1)
        for name in whole - {"stage.json"}:
            (out / name).mkdir(parents=True)
        (out / "stage.json").write_text(json.dumps({**before.record(), "status": "finished"}))
        if not set_aside_and_die(after, changes):
            assert before.state() == after.state() == "new"
            assert whole == {path.name for path in (tmp_path / f"{changes}" / "vae.old-1").iterdir()}
            break
        assert after.state() == "changed"
        assert before.state() == "running" or whole <= {path.name for path in out.iterdir()}
        set_aside(after)
        assert after.state() == "new"
    assert changes > len(whole)


def test_a_folder_in_which_a_process_is_at_work_is_not_set_aside(tmp_path: Path) -> None:
    out = tmp_path / "scans"
    execute(phantom(out))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "scans.run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConfigError, match=f"process {other.pid} of host .* is at work there"):
            set_aside(phantom(out, subjects=3))
        other.kill()
    assert out.is_dir() and not list(tmp_path.glob("*.old-*"))
