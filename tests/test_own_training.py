"""The examples of the section on own training in the documents run as they stand."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from shards.dataset import open_dataset
from tests.conftest import pack_people

ROOT = Path(__file__).resolve().parent.parent
SECTION = (ROOT / "docs/how-to.md").read_text().partition("## Own training on packed data")[2].partition("\n## ")[0]
EXAMPLES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tiny_bids: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``packed`` and ``packed-tar``: twelve people in both formats."""
    folder = tmp_path_factory.mktemp("own")
    for name, storage in (("packed", "zarr"), ("packed-tar", "webdataset")):
        pack_people(tiny_bids, (0.4, 0.1, 0.5), folder / name, storage)
        assert len(open_dataset(folder / name).keys("train")) >= 4
    return folder


def test_there_are_examples_of_each_library() -> None:
    assert len(EXAMPLES) == 4


def test_the_examples_run(folder: Path) -> None:
    """One after the other in one process; without those of a library that is not installed."""
    code = [
        e for e in EXAMPLES if all(map(find_spec, re.findall(r"^(?:from|import) (torchdata|xarray)", e, re.MULTILINE)))
    ]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
