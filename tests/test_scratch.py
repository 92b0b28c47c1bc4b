"""The temporary folder of a process is removed with it, or by the next process."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mvhpc.config import ConfigError
from mvhpc.runtime import scratch
from mvhpc.runtime.scratch import MAX_PATH, scratch_folder, short_parent, sweep, temporary_folder

CODE = (
    "import sys, mvhpc.runtime.scratch as t; print(t.scratch_folder(t.Path(sys.argv[1])), flush=True); sys.stdin.read()"
)


def start(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process with a folder, and the folder."""
    command = [sys.executable, "-c", CODE, str(parent)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_the_folder_of_a_killed_process_is_removed_and_no_other(tmp_path: Path) -> None:
    (killed, left), (living, used) = start(tmp_path), start(tmp_path)
    others = tmp_path / "mvhpc-of-something-else"
    others.mkdir()
    assert used.stat().st_mode & 0o777 == 0o700
    killed.kill()
    killed.wait()
    assert left.is_dir()
    sweep(tmp_path)
    assert not left.exists() and used.is_dir() and others.is_dir()
    living.communicate()
    assert living.returncode == 0 and not used.exists()


def test_one_folder_a_process() -> None:
    assert scratch_folder() == scratch_folder()


def test_a_temporary_folder_is_removed_with_its_content() -> None:
    with temporary_folder() as folder, temporary_folder() as other:
        assert folder != other and folder.parent == other.parent == scratch_folder()
        (folder / "file").touch()
    assert not folder.exists() and not other.exists()


def test_folders_of_ray_follow_tmpdir_where_its_path_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as short:
        for chosen, expected in ((short, short), (str(tmp_path / ("long" * 10)), "/tmp"), ("/absent", "/tmp")):
            if chosen != "/absent":
                Path(chosen).mkdir(exist_ok=True)
            monkeypatch.setattr(tempfile, "tempdir", chosen)
            assert short_parent(24) == Path(expected)
        monkeypatch.setattr(scratch, "SHORT", ("/absent",))  # as where /tmp is read-only
        with pytest.raises(ConfigError, match="set TMPDIR to a folder on a local disk whose path has at most 16 bytes"):
            short_parent(24)
        monkeypatch.setattr(tempfile, "tempdir", short)
        assert short_parent(24) == Path(short)


def test_sockets_of_ray_fit_below_the_longest_folder() -> None:
    longest = "/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store.1"
    assert MAX_PATH + len(longest) <= 107
