"""Typed configuration: a dataclass tree per stage, filled from YAML and dotted overrides.

Values come, later over earlier, from ``configs/STAGE/default.yaml``, the named preset or file, and ``key=value``
overrides. The dataclasses give names and types alone; numbers and their sources stand in the YAML files.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from shards.errors import nearest

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, file or preset and what to do."""


def at_least(least: int, counts: Mapping[str, int]) -> None:
    """Refuse counts, by key, below the least that make sense.

    Raises:
        ConfigError: naming the key.
    """
    for key, count in counts.items():
        if count < least:
            raise ConfigError(f"{key}={count}: at least {least} is needed")


def in_one_process(compute: "Compute") -> None:
    """Refuse more workers where a stage has but one.

    Raises:
        ConfigError: with what to do.
    """
    if compute.workers != 1:
        raise ConfigError(f"compute.workers={compute.workers}: this stage runs in one process; take 1")


# --- parts shared by several stages -----------------------------------------------------------------------------


@dataclass
class Optimizer:
    """AdamW and its schedule. ``lr`` rises over ``warmup`` steps, then stays or falls as a cosine to zero."""

    lr: float
    betas: list[float]
    weight_decay: float
    warmup: int
    schedule: str  # constant | cosine
    clip: float  # largest gradient norm; 0 switches clipping off


@dataclass
class Training:
    """How long, in what batches, and what is kept."""

    epochs: int
    batch: int  # samples per step over all workers together, whatever their number
    accumulate: int  # micro-batches per step and worker
    validate_every: int  # epochs
    checkpoint_every: int  # steps
    keep: int  # checkpoints
    log_every: int  # steps
    seed: int

    def __post_init__(self) -> None:
        counts = ("epochs", "batch", "accumulate", "validate_every", "checkpoint_every", "log_every")
        at_least(1, {f"training.{name}": getattr(self, name) for name in counts})


@dataclass
class Compute:
    """Where it runs. One worker runs in the process itself, more run through Ray Train and DeepSpeed."""

    workers: int
    zero_stage: int  # 0-3, DeepSpeed ZeRO
    precision: str  # float32 | bfloat16 | auto: bfloat16 where the device is made for it
    device: str  # auto | cpu | cuda
    threads: int  # per worker; 0 divides the cores among the workers
    retries: int  # restarts from the last checkpoint by Ray; in a job also of Ray itself, in a row without a new one
    compile: bool = False  # denoiser and what is trained through torch.compile
    # Of training alone, so that other stages need not name them.
    offload: str = "none"  # none | cpu: where the optimiser's state lives, from ZeRO-1 on
    hang_minutes: float = 30.0  # without a step, after which a worker writes all stacks to its log and ends; 0: never

    def __post_init__(self) -> None:
        at_least(1, {"compute.workers": self.workers})


@dataclass
class Tracking:
    """The MLflow store; an empty ``uri`` means ``mlflow.db`` (sqlite) beside the run folder."""

    uri: str
    experiment: str

    def __post_init__(self) -> None:
        refuse_password(self.uri)


def refuse_password(uri: str) -> None:
    """Keep passwords out of tracking URIs, which are written to run folders and logs.

    Raises:
        ConfigError: for a URI that holds one; it is not repeated.
    """
    parts = urlsplit(uri)
    if parts.password is not None:
        raise ConfigError(
            f"tracking.uri: take the password for {parts.hostname} out of it, and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (for a database its own variable, as PGPASSWORD) in the environment"
        )


# --- data stages ------------------------------------------------------------------------------------------------


@dataclass
class PhantomConfig:
    """`shards phantom`: procedural brains as a BIDS tree."""

    out: str
    subjects: int
    shape: list[int]
    rich: bool  # a second contrast, a site and a memory score besides
    seed: int
    tracking: Tracking


@dataclass
class PackConfig:
    """`shards pack`: a BIDS tree or CSV -> canonical volumes in shards."""

    source: str
    out: str
    format: str  # zarr | webdataset
    schema: str  # name under configs/schema or a YAML file
    spacing: float  # mm
    shape: list[int]  # voxels
    max_rejects: str  # "5%" or a count
    split: list[float]  # train, validation, test
    group: str  # participants column whose equal values stay on one side; "" for none
    folds: int  # also record this many cross-validation folds; 0 for none
    seed: int
    workers: int
    tracking: Tracking


# --- the autoencoder --------------------------------------------------------------------------------------------


@dataclass
class Autoencoder:
    """MONAI AutoencoderKL; as many levels as ``channels`` has entries, each after the first halving every axis."""

    channels: list[int]
    latent_channels: int
    res_blocks: int
    norm_groups: int
    checkpointing: bool


@dataclass
class VAELoss:
    """MAISI's loss: weights of its terms, and the perceptual network's local weight files."""

    l1: float
    kl: float
    perceptual: float
    adversarial: float
    slices: float  # share of the slices per axis that the perceptual term sees
    backbone: str  # SqueezeNet 1.1 weights (torchvision's file)
    heads: str  # LPIPS linear heads for it
    discriminator_channels: int
    discriminator_layers: int


@dataclass
class VAEConfig:
    """`mvhpc train vae`."""

    out: str
    data: str
    split: str
    model: Autoencoder
    loss: VAELoss
    flip: float  # probability of mirroring left and right in training
    optimizer: Optimizer
    discriminator_lr: float
    training: Training
    compute: Compute
    tracking: Tracking


@dataclass
class EncodeConfig:
    """`mvhpc encode`: posterior means of all volumes -> a store of latents."""

    out: str
    data: str
    vae: str
    split: str  # which split's training side the latent scale is measured on
    flip: bool  # also store the latents of mirrored volumes of the training and validation parts
    batch: int
    compute: Compute
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"batch": self.batch})
        in_one_process(self.compute)


# --- the joint model --------------------------------------------------------------------------------------------


@dataclass
class Denoiser:
    """3D U-Net of latent diffusion, and how scalars enter and leave it."""

    scalars: str  # late: beside the U-Net, from what a small reader sees of the volumes; early: the paper's way
    components: int  # of the density said of a number (late); 0: no density
    readers: int  # that answer for scalars together (late), each without a share of the people; 1: none left out
    channels: list[int]
    attention: list[bool]
    res_blocks: int
    head_channels: int
    norm_groups: int
    embedding: int  # width of time and scalar embeddings
    dropout: float
    checkpointing: bool


@dataclass
class Diffusion:
    """The forward processes and what the network is asked to predict."""

    steps: int  # T
    beta_start: float
    beta_end: float
    time: str  # shared | independent
    shared_fraction: float  # of steps, in independent time, that draw one common t
    clean_fraction: float  # probability, per variable, of resting at t = 0
    noise_fraction: float  # probability, per variable, of resting at t = T
    volume: str  # eps | v | x0
    continuous: str  # eps | v | x0
    targets: dict[str, str]  # eps | v | x0 of single variables, by name
    weights: dict[str, float]  # loss weight per variable, 1 where not named


@dataclass
class JointConfig:
    """`mvhpc train joint`."""

    out: str
    latents: str
    vae: str
    split: str
    schema: str  # name under configs/schema, a YAML file, or "" for the schema the data were packed with
    questions: int  # sets of the scalars' levels that each row is trained on, for one look at its volumes
    reveal: float  # chance that the reader is shown clean a volume that the U-Net must denoise
    scaling: str  # sd: one SD each way of the training mean becomes [-1, 1]; range: the schema's range does
    model: Denoiser
    diffusion: Diffusion
    ema: float  # decay per step
    optimizer: Optimizer
    training: Training
    compute: Compute
    tracking: Tracking


# --- the comparison ---------------------------------------------------------------------------------------------


@dataclass
class BaselineConfig:
    """`mvhpc train baseline`."""

    out: str
    data: str
    split: str
    want: str  # the one scalar it answers
    given: list[str]  # volumes, and scalars as further input channels
    flip: float  # probability of mirroring left and right in training
    optimizer: Optimizer
    training: Training
    compute: Compute
    tracking: Tracking


# --- inference --------------------------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How a conditional is sampled."""

    conditioning: str  # auto | posterior (scalars alone) | clean | repaint
    steps: int  # of volumes and continuous variables
    stride: int  # of categorical variables, in units of t
    solver: str  # of volumes and continuous variables: ddim | dpm (DPM-Solver++ 2M)
    guidance: float  # 1 is none; above 1 the given values count for more
    resample: int  # times that each step is taken, with noise put back in between (RePaint); 1: once

    def __post_init__(self) -> None:
        at_least(1, {f"sampling.{name}": getattr(self, name) for name in ("steps", "stride", "resample")})


@dataclass
class PredictConfig:
    """`mvhpc predict`: any variables given, any wanted."""

    out: str  # a TSV file
    model: str
    data: str
    split: str  # train | validation | test | all
    split_name: str  # which recorded split
    given: list[str]
    want: list[str]
    samples: int  # chains per subject, where the answer comes from chains
    draws: int  # joint draws of all that is wanted per subject, from a posterior, into NAME.draws.tsv
    batch: int
    seed: int
    sampling: Sampling
    compute: Compute
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"samples": self.samples, "batch": self.batch})
        at_least(0, {"draws": self.draws})


@dataclass
class GenerateConfig:
    """`mvhpc generate`: synthetic people as a BIDS tree."""

    out: str
    model: str
    count: int
    given: dict[str, str]
    batch: int
    seed: int
    sampling: Sampling
    compute: Compute
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"count": self.count, "batch": self.batch})
        in_one_process(self.compute)


@dataclass
class TranslateConfig:
    """`mvhpc translate`: one volume of every subject given others."""

    out: str
    model: str
    data: str
    split: str  # train | validation | test | all
    split_name: str
    given: list[str]
    want: str
    batch: int
    seed: int
    sampling: Sampling
    compute: Compute
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"batch": self.batch})
        in_one_process(self.compute)


@dataclass
class InpaintConfig:
    """`mvhpc inpaint`: fill in the part of a volume that a mask does not call known."""

    out: str  # a NIfTI file
    model: str
    image: str  # NIfTI
    mask: str  # NIfTI, non-zero where the image is known
    variable: str  # which volume variable; "" where there is one
    given: dict[str, str]
    samples: int
    seed: int
    sampling: Sampling
    compute: Compute
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"samples": self.samples})
        in_one_process(self.compute)


SCHEMAS: dict[str, type] = {
    "phantom": PhantomConfig,
    "pack": PackConfig,
    "vae": VAEConfig,
    "encode": EncodeConfig,
    "joint": JointConfig,
    "baseline": BaselineConfig,
    "predict": PredictConfig,
    "generate": GenerateConfig,
    "translate": TranslateConfig,
    "inpaint": InpaintConfig,
}

# --- reading ----------------------------------------------------------------------------------------------------

C = TypeVar("C")


def choose(word: str, known: Sequence[str], what: str) -> str:
    """``word`` where it is one of ``known``.

    Raises:
        ConfigError: naming the nearest known word.
    """
    if word not in known:
        raise ConfigError(nearest(word, known, what))
    return word


def config_file(folder: str, name: str) -> Path:
    """The YAML file of a preset name under ``configs/folder``, or of a path.

    Raises:
        ConfigError: where neither exists.
    """
    path = Path(name)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        if not path.is_file():
            raise ConfigError(f"no configuration file {name}")
        return path
    presets = {p.stem: p for p in (CONFIGS / folder).glob("*.yaml")}
    if name not in presets:
        raise ConfigError(nearest(name, presets, f"{folder} preset"))
    return presets[name]


def _keys(kind: type, prefix: str = "") -> Iterable[str]:
    for field in dataclasses.fields(kind):
        yield prefix + field.name
        if dataclasses.is_dataclass(field.type) and isinstance(field.type, type):
            yield from _keys(field.type, f"{prefix}{field.name}.")


def load_config(
    kind: type[C],
    folder: str,
    name: str = "default",
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> C:
    """Build a configuration of type ``kind``.

    Args:
        kind: the dataclass.
        folder: the stage's folder under ``configs/``.
        name: a preset of that folder or a YAML file; laid over the folder's ``default.yaml``.
        overrides: ``dotted.key=value``, values in YAML's syntax.
        values: dotted key -> value as it is, laid over everything.

    Raises:
        ConfigError: an unknown preset, a misspelt key (naming the nearest right one), a value of the wrong type, or a
            key left without value; each names its file or override.
    """
    node = OmegaConf.structured(kind)
    layers: list[tuple[str, Any]] = []
    for path in dict.fromkeys([config_file(folder, "default"), config_file(folder, name)]):
        try:
            layers.append((str(path), OmegaConf.load(path)))
        except Exception as error:
            raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override!r}: an override has the form key=value")
        try:
            layers.append((override, OmegaConf.from_dotlist([override])))
        except Exception as error:
            raise ConfigError(f"{override!r}: {error}") from error
    for key, value in (values or {}).items():
        for part in reversed(key.split(".")):
            value = {part: value}
        layers.append((key, value))
    for source, layer in layers:
        try:
            node = OmegaConf.merge(node, layer)
            for key in OmegaConf.missing_keys(layer) if isinstance(layer, DictConfig) else ():
                OmegaConf.update(node, key, MISSING)  # which merging leaves as it was
        except ConfigKeyError as error:
            key = str(getattr(error, "full_key", None) or getattr(error, "key", ""))
            raise ConfigError(f"{source}: {nearest(key, _keys(kind), 'key')}") from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from error
    try:
        OmegaConf.to_container(node, throw_on_missing=True)
        return OmegaConf.to_object(node)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error)
        raise ConfigError(f"{folder}: give a value for {key}, as {key}=VALUE") from error


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain nested dictionaries."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """A configuration as YAML, readable again by :func:`load_config`."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def fingerprint(*parts: Any) -> str:
    """SHA-256 (16 hex digits) of configurations and other JSON-able parts."""
    plain = [to_dict(p) if dataclasses.is_dataclass(p) and not isinstance(p, type) else p for p in parts]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
