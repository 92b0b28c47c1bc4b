"""One table says which keys of a configuration decide no result; fingerprints and checkpoints both follow it."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mvhpc.checkpoints.compatibility import check
from mvhpc.checkpoints.manifest import Checkpoint
from mvhpc.config import CONFIGS, AutoencoderConfig, ConfigError, Effect, effect, flatten, load_config
from mvhpc.execute import plan
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.stages import STAGES, TRAINED
from tests.test_training_loop import final_state
from tests.toy_task import run_toy, toy_config

NO_EFFECT = {  # of the stages that train
    "compute.compile",
    "compute.device",
    "compute.hang_minutes",
    "compute.offload",
    "compute.retries",
    "compute.threads",
    "compute.workers",
    "compute.zero_stage",
    "out",
    "tracking.experiment",
    "tracking.uri",
    "training.checkpoint_every",
    "training.damaged",
    "training.keep",
    "training.log_every",
}
NAMES = {"given": "image", "want": "age"}


def configuration(stage: str, folder: Path) -> Any:
    """The stage's default configuration with paths in ``folder``; inputs are not there."""
    kind = STAGES[stage].config_class()
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in {"given", "want"}:
            values[field.name] = {"age": "70"} if "dict" in str(field.type) else [NAMES[field.name]]
            values[field.name] = "image" if field.type is str else values[field.name]
        elif field.name == "runs":
            values[field.name] = [str(folder / "run")]
        elif (
            field.name in {"out", "data", "features", "source", "vae", "latents", "scalars", "model", "image", "mask"}
            and field.type is str
        ):
            values[field.name] = str(folder / field.name)
    return load_config(kind, stage, values=values)


def changed(config: Any) -> Iterator[tuple[str, Any]]:
    """(key, the configuration with another value of that key) for every key."""

    def paths(node: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            nested = dataclasses.is_dataclass(value)
            yield from paths(value, (*prefix, field.name)) if nested else [(*prefix, field.name)]

    for *parents, name in paths(config):
        other = copy.deepcopy(config)
        node = other
        for parent in parents:
            node = getattr(node, parent)
        value = getattr(node, name)
        if isinstance(value, bool):
            value = not value
        elif isinstance(value, int | float):
            value = value + 1
        elif name == "schema":
            value = next(path.stem for path in (CONFIGS / "schema").glob("*.yaml") if path.stem != value)
        elif isinstance(value, str):
            value = value + "x"
        else:
            value = {**value, "x": "1"} if isinstance(value, dict) else [*value, *(value[:1] or ["x"])]
        setattr(node, name, value)
        yield ".".join([*parents, name]), other


@pytest.mark.parametrize("stage", STAGES)
def test_fingerprints_follow_the_table(stage: str, tmp_path: Path) -> None:
    """Inputs count by their content, which is the same here."""
    config = configuration(stage, tmp_path)
    before = plan(stage, config).fingerprint
    ignored = {key for key, other in changed(config) if plan(stage, other).fingerprint == before}
    assert ignored - set(STAGES[stage].inputs) == {
        key for key, _ in changed(config) if effect(key) is Effect.NONE and key not in STAGES[stage].inputs
    }
    if stage in TRAINED:
        assert {key for key in ignored if not key.startswith("model.")} - set(STAGES[stage].inputs) == NO_EFFECT


def test_a_schema_counts_by_its_content(tmp_path: Path) -> None:
    """The same file with another content is another schema; a copy of it is the same."""
    file, copied = tmp_path / "my.yaml", tmp_path / "copy.yaml"
    text = (CONFIGS / "schema" / "default.yaml").read_text()
    file.write_text(text)
    copied.write_text(text)
    config = configuration("pack", tmp_path)
    config.schema = str(file)
    before = plan("pack", config).fingerprint
    config.schema = str(copied)
    assert plan("pack", config).fingerprint == before
    copied.write_text(text + "weight: {kind: continuous, range: [30, 200], unit: kg}\n")
    assert plan("pack", config).fingerprint != before


@pytest.mark.parametrize("stage", TRAINED)
def test_finished_training_stays_finished(stage: str, tmp_path: Path) -> None:
    config = configuration(stage, tmp_path)
    planned = plan(stage, config)
    planned.folder.mkdir()
    record = {"fingerprint": planned.fingerprint, "inputs": {}, "status": "finished"}
    (planned.folder / "stage.json").write_text(json.dumps(record))
    for key, state in (("log_every", "finished"), ("keep", "finished"), ("checkpoint_every", "finished")):
        setattr(config.training, key, getattr(config.training, key) + 1)
        assert plan(stage, config).state() == state
    config.optimizer.lr += 1e-3
    assert plan(stage, config).state() == "changed"


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("stage", TRAINED)
def test_checkpoints_follow_the_same_table(stage: str, schedule: str, tmp_path: Path) -> None:
    config = configuration(stage, tmp_path)
    config.optimizer.schedule = schedule
    checkpoint = Checkpoint(tmp_path, 1, {"configuration": flatten(config)}, {})
    refused = {}
    for key, other in changed(config):
        try:
            check(checkpoint, other)
        except ConfigError:
            refused[key] = True
    length = {Effect.LENGTH} if schedule == "cosine" else set()
    compared = [key for key, _ in changed(config) if key != "optimizer.schedule"]
    expected = {key for key in compared if effect(key) in {Effect.RESULT, *length}}
    assert refused.keys() - {"optimizer.schedule"} == expected


@pytest.mark.parametrize("stage", TRAINED)
def test_a_checkpoint_takes_every_spelling_of_a_path(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of inputs, and of files of weights and of the schema."""
    monkeypatch.chdir(tmp_path)
    config, other = configuration(stage, Path("runs")), configuration(stage, tmp_path / "runs")
    for each, folder in ((config, Path("files")), (other, tmp_path / "files")):
        if hasattr(each, "schema"):
            each.schema = str(folder / "schema.yaml")
        if hasattr(each, "loss"):
            each.loss.backbone, each.loss.heads = str(folder / "a.pth"), str(folder / "b.pth")
    assert flatten(config) != flatten(other)
    check(Checkpoint(tmp_path, 1, {"configuration": flatten(config)}, {}), other)


def test_how_often_and_how_many_checkpoints_change_no_bit(tmp_path: Path) -> None:
    """Nor how often metrics are logged."""
    run_toy(toy_config(), tmp_path / "a", 0, 1)
    run_toy(toy_config(training__checkpoint_every=7, training__keep=1, training__log_every=5), tmp_path / "b", 0, 1)
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")


def test_activation_checkpointing_changes_no_bit() -> None:
    gradients = []
    x = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = Autoencoder(AutoencoderConfig([8, 8, 8, 16], 4, 1, 4, checkpointing))
        network.train()
        mean, _ = network.encode(x)
        network.decode(mean).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
