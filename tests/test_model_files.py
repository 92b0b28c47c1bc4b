"""Model folders: bit-identical round trips, damage named, moved folders still whole."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvhpc import config
from mvhpc.export import export
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import AutoencoderModel, JointModel, load, save_autoencoder, save_joint
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.kernels.cpu_conv3d import patch_conv3d
from mvhpc.models.model_folder import ModelError
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.variables import Variables
from shards.files import write_bytes
from shards.schema import Schema
from tests.conftest import DIFFUSION
from tests.networks import settings
from tests.toy_task import digest

MODEL = config.AutoencoderConfig(channels=[4, 4], latent_channels=2, res_blocks=1, norm_groups=2, checkpointing=False)
DENOISER = settings(channels=[8, 8], head_channels=4)
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

    monkeypatch.setattr("mvhpc.models.model_folder.write_bytes", full_at_last)
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


def state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return JointDenoiser(Variables.from_schema(SCHEMA, LATENT), DENOISER).state_dict()


def save_example(folder: Path, vae: Path, seed: int = 3, scalars: Path | None = None) -> None:
    save_joint(
        folder,
        state(seed),
        vae,
        scalars,
        model=DENOISER,
        diffusion=DIFFUSION,
        schema=SCHEMA,
        latent=LATENT,
        grid=GRID,
        extra={"loss": 1.5},
    )


@pytest.mark.parametrize("place", ["../weights.safetensors", "/tmp/weights.safetensors", "x/weights.safetensors"])
def test_weights_in_another_folder_are_not_read(folder: Path, place: str) -> None:
    manifest = folder / "model" / "model.json"
    meta = json.loads(manifest.read_text())
    meta["networks"]["autoencoder"]["file"] = place
    manifest.write_text(json.dumps(meta))
    with pytest.raises(ModelError, match="lies in another folder"):
        load(folder)
    with pytest.raises(ModelError, match="lies in another folder"):
        export(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


def test_a_joint_model_is_self_contained(folder: Path, tmp_path: Path) -> None:
    """It works, bit for bit as before, after its autoencoder's run is gone and it was moved."""
    save_example(tmp_path / "joint" / "model", folder)
    shutil.rmtree(folder)
    shutil.move(tmp_path / "joint", tmp_path / "moved")
    model = load(tmp_path / "moved")
    assert weights_of(model) == digest(state(3))
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


def test_damage_to_any_file_of_a_joint_model_is_named(folder: Path, tiny_scalars: Path, tmp_path: Path) -> None:
    save_example(tmp_path / "joint" / "model", folder, scalars=tiny_scalars)
    for path in sorted((tmp_path / "joint" / "model").glob("*.safetensors")):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ModelError, match=path.name):
            use(load(tmp_path / "joint"))
        path.write_bytes(whole)
    use(load(tmp_path / "joint"))


def use(model: Any) -> None:
    """Have every file read."""
    assert model.denoiser and model.autoencoder
    assert model.scalars is None or model.scalars.stack


def weights_of(model: Any) -> str:
    return digest(dict(model.denoiser.state_dict()))


def test_its_model_of_scalars_is_the_trained_one_and_needs_no_other_file(
    folder: Path, tiny_scalars: Path, tmp_path: Path
) -> None:
    save_example(tmp_path / "joint" / "model", folder, scalars=tiny_scalars)
    for name in ("denoiser", "autoencoder"):
        (path,) = (tmp_path / "joint" / "model").glob(f"{name}-*.safetensors")
        path.unlink()
    model, alone = load(tmp_path / "joint", kind=JointModel), load(tiny_scalars, kind=ScalarsModel)
    assert model.scalars is not None
    for ours, theirs in zip(model.scalars.stack.linear, alone.stack.linear, strict=True):
        assert digest(ours.tensors()) == digest(theirs.tensors())
    assert model.scalars.stack.mixing == alone.stack.mixing
    assert {**model.scalars.meta, "networks": 0} == {**alone.meta, "networks": 0}
    with pytest.raises(ModelError, match="denoiser"):
        use(model)


def test_a_kill_between_any_two_steps_leaves_the_old_model_or_the_new_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next export works."""
    target = tmp_path / "joint" / "model"
    save_example(target, folder)
    old_and_new = {digest(state(3)), digest(state(4))}
    done, limit, ended = 0, 0, False

    def killed_before(step: Any) -> Any:
        def step_or_die(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done > limit:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        return step_or_die

    while not ended:
        save_example(target, folder)
        done = 0
        with monkeypatch.context() as patch:
            for method in ("write_bytes", "replace", "unlink"):
                patch.setattr(Path, method, killed_before(getattr(Path, method)))
            try:
                save_example(target, folder, 4)
                ended = True
            except KeyboardInterrupt:
                limit += 1
        model = load(target, kind=JointModel)
        use(model)
        assert weights_of(model) in old_and_new
    assert limit > 6 and weights_of(load(target)) == digest(state(4))
    assert len(list(target.iterdir())) == 4, "no leftovers: three files of tensors and model.json"


def test_one_kind_of_model_is_not_taken_for_the_other(folder: Path, tmp_path: Path) -> None:
    save_example(tmp_path / "joint" / "model", folder)
    with pytest.raises(ModelError, match="of the kind autoencoder;"):
        load(folder, kind=JointModel)
    with pytest.raises(ModelError, match="of the kind joint;"):
        load(tmp_path / "joint", kind=AutoencoderModel)
