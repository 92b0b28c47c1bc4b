"""Queries are checked at submission, as far as the model or the data are there by then."""

import json
import shutil
from pathlib import Path

import pytest

from launchers.plan import chain
from launchers.queries import check_queries
from launchers.submit import main
from mvhpc.config import ConfigError
from shards.schema import Schema


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What a query needs of a model to be checked."""
    content = {"format": 8, "kind": "joint", "networks": {}, "schema": Schema.load().to_dict()}
    (tmp_path / "joint" / "model").mkdir(parents=True)
    (tmp_path / "joint" / "model" / "model.json").write_text(json.dumps(content))
    (tmp_path / "data").mkdir()
    return tmp_path / "joint"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--stage predict --given image --want ages data={0}/data out={0}/o.tsv", "Did you mean 'age'?"),
        ("--stage predict --given sex --want image data={0}/data out={0}/o.tsv", "image is a volume"),
        ("--stage translate --given age --want age data={0}/data out={0}/o", "unknown volume 'age'"),
        ("--stage generate --given sexx=F out={0}/o", "Did you mean 'sex'?"),
    ],
)
def test_a_query_that_the_model_does_not_take_is_refused_before_a_job(
    words: str, hint: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.format(tmp_path).split(), f"model={model}", "--cluster", "local"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert hint in line
    assert not list(tmp_path.rglob("jobs"))


def test_queries_of_a_project_are_checked_once_its_data_are_packed(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    query = "queries=[{want: [ages], given: [image]}]"
    steps = chain("demo", ["root=runs/a", "source=scans", query], 1, 0, False)[1]
    check_queries(steps)  # nothing is known yet
    shutil.copytree(tiny_dataset, "runs/a/packed")
    check_queries(steps)  # another data set will be packed
    next(step for step in steps if step.stage == "pack").finished = True
    with pytest.raises(ConfigError, match="Did you mean 'age'"):
        check_queries(steps)
