"""Small real inputs shared by the tests: a BIDS tree, shards packed from it, and an untrained joint model."""

import os
from collections.abc import Sequence
from pathlib import Path

from mvhpc.inference.encode import EncodeConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of networks so small more took twice as long

import nibabel as nib
import numpy as np
import psutil
import pytest
import torch

from mvhpc import config
from mvhpc.execute import execute, plan
from mvhpc.inference.encode import run as encode
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.bundle import save_autoencoder, save_joint
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.training_people import TrainingPeople
from mvhpc.runs.folder import Run
from mvhpc.training.scalars import ScalarsConfig
from mvhpc.variables import Variables
from shards.dataset import open_dataset
from shards.pack import pack
from shards.schema import Schema

SCHEMA = {
    "image": {"kind": "volume", "suffix": "T1w"},
    "age": {"kind": "continuous", "range": [0, 120], "unit": "years"},
    "sex": {"kind": "categorical", "classes": ["F", "M"], "aliases": {"female": "F", "male": "M"}},
}
DIFFUSION = config.DiffusionConfig(
    steps=1000,
    beta_start=0.0015,
    beta_end=0.0195,
    time="independent",
    shared_fraction=0.25,
    clean_fraction=0.25,
    noise_fraction=0.25,
    volume="v",
    continuous="v",
    weights={},
)

SMALL_JOINT = {  # overrides of the joint stage, for latents of 2 x 2 x 2
    "model.channels": [16, 16],
    "model.attention": [False, True],
    "model.head_channels": 16,
    "model.norm_groups": 8,
    "model.embedding": 16,
    "model.res_blocks": 1,
}
SMALL_SCALARS = {  # overrides of the stage scalars
    "encoder.spacing": 16.0,
    "encoder.channels": [8, 8],
    "encoder.embedding": 8,
    "encoder.components": 2,
    "encoder.ensemble_members": 2,
    "training.epochs": 1,
    "training.batch": 4,
    "compute.device": "cpu",
    "compute.threads": 1,
}

LONGEST = ("slurm_faults", "slurm", "training_workers", "gpu_benchmark", "launchers", "mlflow", "export")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that parallel processes end at about the same time."""
    files = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: files.index(item.path.name) if item.path.name in files else len(files))


def listening(process: psutil.Process) -> set[str]:
    """The addresses at which a process waits for connections."""
    found = (c for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN)
    return {c.laddr.ip.removeprefix("::ffff:") for c in found}


def write_bids(folder: Path, subjects: int, size: int = 20, seed: int = 0) -> Path:
    """A BIDS tree of textured ellipsoids at 8 mm; the fourth person has no age and the fifth no sex."""
    rng = np.random.default_rng(seed)
    lines = ["participant_id\tage\tsex"]
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, size)] * 3, indexing="ij"))
    for i in range(subjects):
        name, age, sex = f"sub-{i:02d}", rng.uniform(20, 80), rng.integers(2)
        axes = np.array([0.6, 0.75, 0.65]) * (0.85 + 0.1 * sex + 0.05 * rng.standard_normal())
        inside = np.sum((grid / axes[:, None, None, None]) ** 2, 0) < 1
        voxels = inside * (1 - 0.4 * (np.abs(grid).max(0) < age / 200) + 0.1 * rng.random(inside.shape))
        (folder / name / "anat").mkdir(parents=True)
        image = nib.Nifti1Image(voxels.astype(np.float32), np.diag([8.0, 8, 8, 1]))
        nib.save(image, folder / name / "anat" / f"{name}_T1w.nii.gz")
        lines.append(f"{name}\t{'n/a' if i == 3 else f'{age:.1f}'}\t{'n/a' if i == 4 else 'FM'[sex]}")
    (folder / "participants.tsv").write_text("\n".join(lines) + "\n")
    return folder


def pack_people(
    bids: Path,
    fractions: tuple[float, float, float],
    out: Path | None = None,
    storage: str = "zarr",
    schema: dict[str, dict[str, object]] = SCHEMA,
) -> Path:
    """The people of :func:`write_bids` packed beside it, at 16 x 16 x 16 voxels of 8 mm."""
    out = out or bids.parent / "packed"
    pack(
        bids,
        out,
        storage=storage,
        schema=Schema.from_dict(schema),
        spacing=8.0,
        shape=(16, 16, 16),
        max_rejects="0",
        fractions=fractions,
        keep_suspect=True,  # ellipsoids are no brains
    )
    return out


@pytest.fixture(scope="session")
def tiny_bids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BIDS tree of 12 people."""
    return write_bids(tmp_path_factory.mktemp("tiny") / "bids", 12)


@pytest.fixture(scope="session")
def tiny_dataset(tiny_bids: Path) -> Path:
    """Those 12 people packed at 16 x 16 x 16; half of them test."""
    return pack_people(tiny_bids, (0.4, 0.1, 0.5))


@pytest.fixture(scope="session")
def tiny_vae(tiny_dataset: Path) -> Path:
    """A run folder that holds an untrained autoencoder."""
    small = config.AutoencoderConfig([8, 8, 8, 16], latent_channels=4, res_blocks=1, norm_groups=4, checkpointing=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_autoencoder(tiny_dataset.parent / "vae" / "model", Autoencoder(small), small)
    return tiny_dataset.parent / "vae"


@pytest.fixture(scope="session")
def tiny_scalars(tiny_dataset: Path) -> Path:
    """A run folder of a model of scalars of the training and validation part of ``tiny_dataset``, six people."""
    places = {"data": str(tiny_dataset), "out": str(tiny_dataset.parent / "scalars"), **SMALL_SCALARS}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr("mvhpc.training.scalars.FEWEST", 6)
        execute(plan("scalars", config.load_config(ScalarsConfig, "scalars", "default", (), places)))
    return tiny_dataset.parent / "scalars"


@pytest.fixture(scope="session")
def tiny_model(tiny_dataset: Path, tiny_vae: Path, tiny_scalars: Path) -> Path:
    """A run folder of a joint model on the grid of ``tiny_dataset``, whose U-Net is untrained."""
    return save_untrained(tiny_dataset, "late", tiny_vae, tiny_scalars)


@pytest.fixture(scope="session")
def tiny_early(tiny_dataset: Path, tiny_vae: Path) -> Path:
    """The same of the early design, which predicts scalars by chains."""
    return save_untrained(tiny_dataset, "early", tiny_vae, None)


def save_untrained(
    data: Path, design: str, vae: Path, scalars: Path | None, variables: Sequence[str] = tuple(SCHEMA)
) -> Path:
    """The run folder of a joint model of some variables with an untrained U-Net, beside the data."""
    schema, dataset = Schema.from_dict({name: SCHEMA[name] for name in variables}), open_dataset(data)
    unet = config.DenoiserConfig(
        scalars=design,
        channels=[16, 32],
        attention=[False, True],
        res_blocks=1,
        head_channels=16,
        norm_groups=8,
        embedding=16,
        dropout=0.0,
        checkpointing=False,
    )
    latent = {"image": {"shape": [4, 2, 2, 2], "mean": torch.tensor(0.0), "sd": torch.tensor(1.0)}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = JointDenoiser(Variables.from_schema(schema, latent), unet, DIFFUSION.steps)
        for weights in network.parameters():  # output layers start at zero
            weights.data += 0.05 * torch.randn_like(weights)
    keys = [key for part in ("train", "validation") for key in dataset.keys(part)]
    folder = data.parent / {"late": "joint", "early": "early"}[design]
    save_joint(
        folder / "model",
        network.state_dict(),
        vae,
        scalars,
        model=unet,
        diffusion=DIFFUSION,
        schema=schema,
        latent=latent,
        grid=dataset.index.grid,
        training=TrainingPeople.of(dataset.index, keys, schema, [dataset.values(key) for key in keys]),
    )
    return folder


@pytest.fixture(scope="session")
def tiny_latents(tiny_dataset: Path, tiny_vae: Path) -> Path:
    """The latents of ``tiny_dataset``, mirrored ones too."""
    out = tiny_dataset.parent / "latents"
    places = {"data": str(tiny_dataset), "vae": str(tiny_vae), "out": str(out)}
    encode(config.load_config(EncodeConfig, "encode", "default", (), places), Run(out.with_name("encode")))
    return out


@pytest.fixture(scope="session")
def tiny_inputs(tiny_latents: Path, tiny_vae: Path, tiny_scalars: Path) -> dict[str, str]:
    """The inputs of the joint stage, by their keys."""
    return {"latents": str(tiny_latents), "vae": str(tiny_vae), "scalars": str(tiny_scalars)}
