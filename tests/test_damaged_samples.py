"""Training on data with damaged volumes: an error that names them, or the next sample in their place."""

from pathlib import Path

import pytest
import torch

from mvhpc.config import ConfigError
from mvhpc.runs.journal import read
from mvhpc.training.damaged import Samples
from mvhpc.training.loop import train
from mvhpc.training.vae import VAETask
from shards.dataset import Dataset, open_dataset
from shards.errors import IntegrityError
from tests.ellipsoids import pack_ellipsoids
from tests.test_vae_training import config

SETTINGS = ("training.epochs=1", "loss.adversarial=0")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return pack_ellipsoids(tmp_path / "data", train=6, validation=2)


def damage(dataset: Dataset, key: str, variable: str) -> None:
    """Change one bit of a stored volume."""
    record = dataset.record(key)
    [file] = [p for p in (dataset.folder / "data.zarr" / variable).rglob("*") if p.is_file() and p.name != "zarr.json"]
    raw = bytearray(file.read_bytes())
    raw[record.offsets[variable] + record.sizes[variable] // 2] ^= 1
    file.write_bytes(raw)


def test_the_next_intact_sample_takes_the_place_of_a_damaged_one(data: Path, tmp_path: Path) -> None:
    task = VAETask(config(data, tmp_path / "vae", *SETTINGS))
    last = task.samples - 1
    damage(task.dataset, *task.train[last])
    task.dataset = open_dataset(data)
    with pytest.raises(IntegrityError, match=task.train[last][0]):
        Samples(task, "error").load([0, last])
    samples = Samples(task, "skip")
    for _ in range(2):
        assert torch.equal(samples.load([2, last, 1])["volume"], task.load([2, 0, 1])["volume"])
    assert list(samples.damaged) == [last] and len(samples.news()) == 1 and samples.news() == []
    damage(task.dataset, *task.train[3])
    task.dataset = open_dataset(data)
    with pytest.raises(IntegrityError, match=task.train[3][0]):  # more than one in a hundred
        samples.load([3])
    with pytest.raises(ConfigError, match="skip"):
        Samples(task, "skipp")


def test_training_ends_and_says_what_it_skipped(data: Path, tmp_path: Path) -> None:
    dataset = open_dataset(data)
    damaged = VAETask(config(data, tmp_path, *SETTINGS)).train[2]
    damage(dataset, *damaged)
    for mode in ("error", "skip"):
        settings = config(data, tmp_path / mode, *SETTINGS, f"training.damaged={mode}")
        if mode == "error":
            with pytest.raises(IntegrityError, match=damaged[0]):
                train(VAETask(settings), settings, tmp_path / mode)
            continue
        train(VAETask(settings), settings, tmp_path / mode)
        events = list(read(tmp_path / mode))
        warnings = [event["text"] for event in events if event["event"] == "warning"]
        assert len(warnings) == 1 and damaged[0] in warnings[0] and "skipped" in warnings[0]
        counts = [e["metrics"]["train/damaged_samples"] for e in events if "train/loss" in e.get("metrics", {})]
        assert counts[-1] == 1
