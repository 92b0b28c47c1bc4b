"""Git's answers about this code, where it runs from a clone."""

import subprocess
from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]


def git(*arguments: str) -> str:
    """The output of a git command in the clone; empty where there is none, or git fails.

    A repository further up, as around a virtual environment, is another project's.
    """
    if not (CLONE / ".git").exists():
        return ""
    command = ["git", "-C", str(CLONE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout
