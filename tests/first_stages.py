"""A small project of which the first five stages are done; a test module takes it in by `pytest_plugins`."""

from pathlib import Path

import pytest

from mvhpc.config import load_config
from mvhpc.execute import plan
from mvhpc.pipeline.plan import Pipeline, PipelineConfig
from mvhpc.pipeline.project import record_project
from mvhpc.pipeline.run import do
from tests.test_pipeline import SMALL


@pytest.fixture(scope="session")
def first_stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``runs/demo``: preset ``demo`` at a small size; phantom, pack, scalars, vae and encode are done."""
    folder = tmp_path_factory.mktemp("first-stages")
    joint = {key: value for key, value in SMALL["joint"].items() if key != "compute"}  # the preset has two workers
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        values = {"root": "runs/demo", **SMALL, "joint": joint}
        pipeline = Pipeline(load_config(PipelineConfig, "pipeline", "demo", (), values))
        record_project(pipeline.config)
        for stage, config in list(pipeline.steps())[:5]:
            do(plan(stage, config))
    return folder
