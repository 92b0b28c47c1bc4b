"""Model folders: bit-identical round trips, damage named, moved folders still whole."""

import shutil
from pathlib import Path

import pytest
import torch

from mvhpc import config
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import AutoencoderModel, JointModel, ModelError, load, save_autoencoder, save_joint
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.kernels.cpu_conv3d import patch_conv3d
from mvhpc.variables import Variables
from shards.files import write_bytes
from shards.schema import Schema

MODEL = config.AutoencoderConfig(channels=[4, 4], latent_channels=2, res_blocks=1, norm_groups=2, checkpointing=False)
DENOISER = config.DenoiserConfig("late", 4, 1, [8, 8], [False, True], 1, 4, 4, 16, 0.0, False)
DIFFUSION = config.DiffusionConfig(1000, 0.0015, 0.0195, "independent", 0.25, 0.25, 0.25, "v", "v", {})
SCHEMA = Schema.from_dict(
    {
        "scan": {"kind": "volume", "suffix": "T2w"},
        "height": {"kind": "continuous", "range": [50, 250], "unit": "cm"},
        "site": {"kind": "categorical", "classes": ["north", "south", "west"]},
    }
)
LATENT = {"scan": {"shape": [2, 4, 4, 4], "mean": torch.full((2, 4, 4, 4), 0.25), "sd": torch.tensor(2.0)}}
GRID = {"spacing": 2.0, "shape": [8, 8, 8], "affine": [[2, 0, 0, -7], [0, 2, 0, -7], [0, 0, 2, -7], [0, 0, 0, 1]]}


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
    network, meta = load(folder)
    original = autoencoder(0).state_dict()
    assert list(network.state_dict()) == list(original)
    assert all(torch.equal(value, original[name]) for name, value in network.state_dict().items())
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert meta["extra"] == {"psnr": 30.5}


def test_a_moved_folder_loads_and_keeps_its_identity(folder: Path, tmp_path: Path) -> None:
    before = load(folder)[1]
    shutil.move(folder / "model", tmp_path / "elsewhere")
    assert load(tmp_path / "elsewhere")[1] == before


def test_saving_again_replaces_the_older_weights(folder: Path) -> None:
    before = load(folder)[1]["sha256"]
    save_autoencoder(folder / "model", autoencoder(1), MODEL)
    network, meta = load(folder)
    assert meta["sha256"] != before
    assert torch.equal(next(network.parameters()), next(autoencoder(1).parameters()))
    assert sorted(p.name for p in (folder / "model").iterdir()) == sorted(["model.json", weights(folder).name])


def test_an_interrupted_save_leaves_the_older_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(folder)[1]

    def full_at_last(path: Path, content: bytes) -> None:
        if path.name == "model.json":
            raise OSError("disk full")
        write_bytes(path, content)

    monkeypatch.setattr("mvhpc.models.bundle.write_bytes", full_at_last)
    with pytest.raises(OSError, match="disk full"):
        save_autoencoder(folder / "model", autoencoder(1), MODEL)
    assert load(folder)[1] == before


@pytest.mark.parametrize("where", [0.1, 0.5, 0.999])
def test_one_changed_bit_is_found_and_the_file_named(folder: Path, where: float) -> None:
    path = weights(folder)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=path.name):
        load(folder)


def test_missing_pieces_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no trained model"):
        load(tmp_path / "nowhere")
    path = weights(folder)
    path.unlink()
    with pytest.raises(ModelError, match=path.name):
        load(folder)
    (folder / "model" / "model.json").write_text('{"format": 1')
    with pytest.raises(ModelError, match=r"model\.json: damaged"):
        load(folder)


def denoiser(seed: int) -> JointDenoiser:
    torch.manual_seed(seed)
    return JointDenoiser(Variables.from_schema(SCHEMA, LATENT), DENOISER)


def save_example(folder: Path, vae: Path) -> None:
    save_joint(
        folder,
        denoiser(3).state_dict(),
        vae,
        model=DENOISER,
        diffusion=DIFFUSION,
        schema=SCHEMA,
        latent=LATENT,
        grid=GRID,
        extra={"loss": 1.5},
    )


def test_a_joint_model_is_self_contained(folder: Path, tmp_path: Path) -> None:
    """It works, bit for bit as before, after its autoencoder's run is gone and it was moved."""
    save_example(tmp_path / "joint" / "model", folder)
    shutil.rmtree(folder)
    shutil.move(tmp_path / "joint", tmp_path / "moved")
    model = load(tmp_path / "moved")
    expected = denoiser(3).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.denoiser.state_dict().items())
    assert model.grid == GRID
    assert model.schema == SCHEMA
    assert model.meta["extra"] == {"loss": 1.5}
    x = torch.rand(1, 1, 8, 8, 8)
    vae = autoencoder(0).eval()
    patch_conv3d(vae)
    z = model.encode("scan", x)
    assert torch.equal(z, (vae.encode(x)[0] - 0.25) / 2)
    torch.testing.assert_close(model.decode("scan", z), vae.decode(vae.encode(x)[0]).clamp(0, 1))
    with pytest.raises(TypeError, match="height is no volume"):
        model.encode("height", x)


def test_damage_to_any_file_of_a_joint_model_is_named(folder: Path, tmp_path: Path) -> None:
    save_example(tmp_path / "joint" / "model", folder)
    for path in sorted((tmp_path / "joint" / "model").glob("*.safetensors")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ModelError, match=path.name):
            load(tmp_path / "joint")
        path.write_bytes(whole)
    load(tmp_path / "joint")


def test_one_kind_of_model_is_not_taken_for_the_other(folder: Path, tmp_path: Path) -> None:
    save_example(tmp_path / "joint" / "model", folder)
    with pytest.raises(ModelError, match="of the kind autoencoder;"):
        load(folder, kind=JointModel)
    with pytest.raises(ModelError, match="of the kind joint;"):
        load(tmp_path / "joint", kind=AutoencoderModel)
    assert isinstance(load(folder), AutoencoderModel) and isinstance(load(tmp_path / "joint"), JointModel)
