"""Model folders: bit-identical round trips, damage named, moved folders still whole."""

import shutil
from pathlib import Path

import pytest
import torch

from mvhpc import config
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import ModelError, load_autoencoder, save_autoencoder

MODEL = config.Autoencoder(channels=[4, 4], latent_channels=2, res_blocks=1, norm_groups=2, checkpointing=False)


def autoencoder(seed: int) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder(MODEL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_autoencoder(tmp_path / "run" / "model", autoencoder(0), MODEL, {"psnr": 30.5})
    return tmp_path / "run"


def weights(folder: Path) -> Path:
    (path,) = (folder / "model").glob("*.safetensors")
    return path


def test_round_trip_is_bit_identical(folder: Path) -> None:
    network, meta = load_autoencoder(folder)
    original = autoencoder(0).state_dict()
    assert list(network.state_dict()) == list(original)
    assert all(torch.equal(value, original[name]) for name, value in network.state_dict().items())
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert meta["extra"] == {"psnr": 30.5}


def test_a_moved_folder_loads_and_keeps_its_identity(folder: Path, tmp_path: Path) -> None:
    before = load_autoencoder(folder)[1]
    shutil.move(folder / "model", tmp_path / "elsewhere")
    assert load_autoencoder(tmp_path / "elsewhere")[1] == before


def test_saving_again_replaces_the_older_weights(folder: Path) -> None:
    before = load_autoencoder(folder)[1]["sha256"]
    save_autoencoder(folder / "model", autoencoder(1), MODEL)
    network, meta = load_autoencoder(folder)
    assert meta["sha256"] != before
    assert torch.equal(next(network.parameters()), next(autoencoder(1).parameters()))
    assert sorted(p.name for p in (folder / "model").iterdir()) == sorted(["model.json", weights(folder).name])


def test_an_interrupted_save_leaves_the_older_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_autoencoder(folder)[1]

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("mvhpc.models.bundle.write_text", full)
    with pytest.raises(OSError, match="disk full"):
        save_autoencoder(folder / "model", autoencoder(1), MODEL)
    assert load_autoencoder(folder)[1] == before


@pytest.mark.parametrize("where", [0.1, 0.5, 0.999])
def test_one_changed_bit_is_found_and_the_file_named(folder: Path, where: float) -> None:
    path = weights(folder)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=path.name):
        load_autoencoder(folder)


def test_missing_pieces_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no trained model"):
        load_autoencoder(tmp_path / "nowhere")
    path = weights(folder)
    path.unlink()
    with pytest.raises(ModelError, match=path.name):
        load_autoencoder(folder)
    (folder / "model" / "model.json").write_text('{"format": 1')
    with pytest.raises(ModelError, match=r"model\.json: damaged"):
        load_autoencoder(folder)
