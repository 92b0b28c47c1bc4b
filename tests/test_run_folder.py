"""A run folder is worked in by one process at a time, however the one before ended."""

import subprocess
import sys
from pathlib import Path

import pytest

from mvhpc.config import ConfigError, load_config
from mvhpc.data_stages import PhantomConfig
from mvhpc.execute import execute, plan
from mvhpc.runs.folder import exclusive

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


def test_what_is_refused_leaves_the_record_of_what_is_there(tmp_path: Path) -> None:
    out = str(tmp_path / "people.v1")
    execute(plan("phantom", load_config(PhantomConfig, "phantom", "demo", ["subjects=2"], {"out": out})))
    folder = tmp_path / "people.v1.run"
    before = [(folder / name).read_bytes() for name in ("stage.json", "config.yaml")]
    with pytest.raises(FileExistsError, match=r"people\.v1 is there already"):
        execute(plan("phantom", load_config(PhantomConfig, "phantom", "demo", ["subjects=3"], {"out": out})))
    assert before == [(folder / name).read_bytes() for name in ("stage.json", "config.yaml")]


def test_a_lock_of_a_dead_node_is_waited_for(tmp_path: Path) -> None:
    """Its server frees it some time later; this host's own processes are believed at once."""
    with exclusive(tmp_path):
        (tmp_path / ".lock").write_text("process 7 of host elsewhere")
        with pytest.raises(ConfigError, match="process 7 of host elsewhere"), exclusive(tmp_path, patience=1.5):
            pass
    with exclusive(tmp_path):
        assert "elsewhere" not in (tmp_path / ".lock").read_text()
