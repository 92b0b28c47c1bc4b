"""A process's own folder in /tmp goes with it, or with the next one."""

import subprocess
import sys
from pathlib import Path

from mvhpc.runtime.scratch import scratch_folder, sweep

CODE = "import sys, mvhpc.runtime.scratch as t; print(t.scratch_folder(sys.argv[1]), flush=True); sys.stdin.read()"


def start(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that has a folder, and it."""
    command = [sys.executable, "-c", CODE, str(parent)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_killed_processs_folder_is_swept_and_no_others(tmp_path: Path) -> None:
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
