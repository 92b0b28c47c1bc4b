"""The law of export: a network that was best at a checkpoint's step is exported to the bits that training exported."""

import json
from pathlib import Path

import pytest

from mvhpc.cli import main
from mvhpc.config import ConfigError, load_config, to_yaml
from mvhpc.execute import execute, plan
from mvhpc.models.training_people import TrainingPeople
from mvhpc.runs.folder import read_record
from mvhpc.training.joint import JointConfig
from mvhpc.training.vae import VAEConfig
from shards.dataset import open_dataset
from tests.conftest import SMALL_JOINT
from tests.ellipsoids import pack_ellipsoids
from tests.toy_task import curves

SHORT = [
    "training.epochs=4",
    "training.batch=2",
    "training.checkpoint_every=1000",
    "compute.threads=1",
    "optimizer.warmup=2",
]
VAE = [
    "model.channels=[4,8]",
    "model.norm_groups=4",
    "model.res_blocks=1",
    "loss.perceptual=0",
    "loss.discriminator_channels=4",
    "loss.discriminator_layers=1",
    "optimizer.lr=1e-3",
]


SCORES = {"autoencoder": "reconstruction", "denoiser": "loss"}


def best_step(run: Path, score: str) -> int:
    """The step of the least validation metric."""
    found = {step: value for (step, name), value in curves(run).items() if name == f"validation/{score}"}
    return min(found, key=lambda step: (found[step], step))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_the_model_of_a_checkpoint_is_what_training_exported(
    tmp_path: Path, tiny_latents: Path, tiny_inputs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = pack_ellipsoids(tmp_path / "data", train=4, validation=2)
    values = {"out": str(tmp_path / "vae"), "data": str(data)}
    runs = {"vae": execute(plan("vae", load_config(VAEConfig, "vae", "default", [*VAE, *SHORT], values)))}

    places = {**tiny_inputs, "out": str(tmp_path / "joint")}
    two = ["compute.workers=2", "compute.zero_stage=3", "ema=0.9"]
    joint = load_config(JointConfig, "joint", "default", [*SHORT, *two], {**SMALL_JOINT, **places})
    runs["joint"] = execute(plan("joint", joint))

    networks = {"vae": ["autoencoder"], "joint": ["denoiser"]}
    for stage, summary in runs.items():
        run, step = tmp_path / stage, int(summary["best_step"])
        checkpoint = run / "checkpoints" / f"step-{step:08d}"
        assert main(["export", str(checkpoint), str(tmp_path / f"{stage}-model")]) == 0
        assert f"the model of step {step} is written" in capsys.readouterr().out
        best = [name for name in networks[stage] if step == best_step(run, SCORES[name])]
        assert best, "the step is the best of some network"
        ours, theirs = content(tmp_path / f"{stage}-model" / "model"), content(run / "model")
        if best == networks[stage]:
            assert ours == theirs
        if stage == "joint":
            known, data = TrainingPeople.read(json.loads(ours["model.json"])), open_dataset(tiny_latents)
            assert known == TrainingPeople.read(json.loads(theirs["model.json"]))
            assert len(known.names) == len([*data.keys("train"), *data.keys("validation")]) == len(known.scans)
        for name in best:
            assert {file for file in ours if file.startswith(name)} == {f for f in theirs if f.startswith(name)}
        assert main(["export", str(run), str(tmp_path / f"{stage}-best")]) == 0
        assert content(tmp_path / f"{stage}-best" / "model") == theirs
        assert main(["export", str(run), str(tmp_path / f"{stage}-best")]) == 1
        assert "exists already" in capsys.readouterr().err
    spelt = {**places, "latents": f"{tiny_latents.parent}/../{tiny_latents.parent.name}/{tiny_latents.name}"}
    again = load_config(JointConfig, "joint", "default", [*SHORT, "ema=0.9"], {**SMALL_JOINT, **spelt})
    assert execute(plan("joint", again))["best_step"] == runs["joint"]["best_step"]
    config = tmp_path / "joint" / "config.yaml"
    trained = config.read_text()
    other = load_config(JointConfig, "joint", "default", [*SHORT, *two, "scaling=range"], {**SMALL_JOINT, **places})
    with pytest.raises(ConfigError, match="trained with scaling=sd, not range"):
        execute(plan("joint", other))
    assert config.read_text() == trained and read_record(tmp_path / "joint")["status"] == "finished"
    config.write_text(to_yaml(other))
    newest = max((tmp_path / "joint" / "checkpoints").glob("step-*"))
    assert main(["export", str(newest), str(tmp_path / "other")]) == 2
    assert "trained with scaling=sd, not range" in capsys.readouterr().err
    assert main(["export", str(tiny_latents), str(tmp_path / "nothing")]) == 2
    assert "no model there, no checkpoint" in capsys.readouterr().err
