"""What works without the packages of the extras, and how a missing one is told."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ABSENT = """
import sys
for name in ("ray", "deepspeed", "mlflow", "submitit", "ants", "deepbet", "nilearn", "sklearn"):
    sys.modules[name] = None  # as where they are not installed
from pathlib import Path
import launchers.submit, mvhpc.cli, shards.__main__
bids, data, model, out = sys.argv[1:]
assert mvhpc.cli.main(["--help"]) == 0
assert mvhpc.cli.main(["predict", "--model", model, "--data", data, "--split", "all", "--given", "image",
                       "--want", "age,sex", "--out", f"{out}/a.tsv"]) == 0
assert shards.__main__.main(["pack", bids, f"{out}/packed", "--spacing", "8", "--keep-suspect", "--workers", "1"]) == 0
vae = ["train", "vae", "--config", "demo", f"data={data}", f"out={out}/vae"]
assert mvhpc.cli.main([*vae, "compute.workers=2"]) == 2
assert mvhpc.cli.main(["dashboard", out]) == 2
assert mvhpc.cli.main(["mlflow-sync", out]) == 2
assert shards.__main__.main(["preprocess", bids, f"{out}/derivative"]) == 2
job = ["--stage", "vae", "--cluster", "local", "--config", "demo", f"data={data}", f"out={out}/job"]
assert launchers.submit.main(job) == 2
"""


@pytest.mark.slow
def test_prediction_and_packing_need_no_extra_and_the_others_name_theirs(
    tiny_bids: Path, tiny_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    places = map(str, (tiny_bids, tiny_dataset, tiny_model, tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", ABSENT, *places], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if "pip install" in line]
    assert "Traceback" not in done.stderr
    for what, extra in (
        ("not tracked: MLflow", "train"),
        ("compute.workers=2 needs ray", "cluster"),
        ("mvhpc dashboard needs mlflow", "train"),
        ("mvhpc mlflow-sync needs mlflow", "train"),
        ("package antspyx is missing", "preprocess"),
        ("submit.py needs submitit", "cluster"),
    ):
        assert any(what in line and f"pip install 'mvhpc[{extra}]'" in line for line in lines), (what, done.stderr)
    assert len((tmp_path / "a.tsv").read_text().splitlines()) == 13


def test_the_packages_of_the_extras_are_no_dependencies_and_make_installs_all() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {line.split(">")[0].split("[")[0] for line in project["dependencies"]}
    extras = project["optional-dependencies"]
    for name in ("train", "cluster", "preprocess"):
        assert not needed & {line.split(">")[0].split("[")[0] for line in extras[name]}
    assert "mvhpc[train,cluster,preprocess]" in extras["dev"]
    assert ".[dev]" in (ROOT / "Makefile").read_text()


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path: Path) -> None:
    """As in the folder that holds a clone."""
    for name in ("mvhpc", "shards", "launchers"):
        (tmp_path / name).mkdir()
    code = "import launchers.submit, mvhpc, shards.pack; mvhpc.load"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0
