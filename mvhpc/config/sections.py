"""Sections of configurations that several stages share; those of one stage are in its module."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from mvhpc.config.errors import ConfigError, at_least, choose

SCHEDULES = ("constant", "cosine")


@dataclass
class Optimizer:
    """AdamW and its schedule: ``lr`` rises over ``warmup`` steps, then is constant or falls as a cosine to zero."""

    lr: float
    betas: list[float]
    weight_decay: float
    warmup: int
    schedule: str  # constant | cosine
    clip: float  # largest gradient norm; 0 switches clipping off

    def __post_init__(self) -> None:
        choose(self.schedule, SCHEDULES, "optimizer.schedule")
        names = ("lr", "weight_decay", "warmup", "clip")
        at_least(0, {f"optimizer.{name}": getattr(self, name) for name in names})
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas={self.betas}: two numbers from 0 to below 1 are needed, as [0.9, 0.99]")


@dataclass
class Training:
    """Length of training, batches, validation and checkpoints."""

    epochs: int
    batch: int  # samples per step of all workers together
    accumulate: int  # micro-batches per step and worker
    validate_every: int  # epochs
    checkpoint_every: int  # steps
    keep: int  # checkpoints
    log_every: int  # steps
    seed: int
    damaged: str = "error"  # a sample whose stored volume is damaged: error | skip, in favour of the next one

    def __post_init__(self) -> None:
        counts = ("epochs", "batch", "accumulate", "validate_every", "checkpoint_every", "log_every")
        at_least(1, {f"training.{name}": getattr(self, name) for name in counts})


@dataclass
class Device:
    """Device and precision of a stage that runs in one process."""

    device: str  # auto | cpu | cuda
    precision: str  # float32 | bfloat16 | auto: bfloat16 if the device is fast at it
    threads: int  # CPU threads per worker; 0: torch's default, or the cores divided among the workers
    compile: bool  # torch.compile for networks that are called many times


@dataclass
class Workers(Device):
    """The same for a stage that can be divided among workers."""

    workers: int

    def __post_init__(self) -> None:
        at_least(1, {"compute.workers": self.workers})


@dataclass
class Compute(Workers):
    """The same for training. One worker is this process; several use Ray Train and DeepSpeed."""

    zero_stage: int  # 0 to 3, DeepSpeed ZeRO
    offload: str  # none | cpu: device of the optimizer's state, from ZeRO-1 on
    retries: int  # restarts by Ray; in a job also of Ray itself, consecutive ones without a new checkpoint
    hang_minutes: float  # without a step until a worker logs all stacks and exits; 0: never


STORES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks", "databricks-uc")  # of MLflow 3


@dataclass
class Tracking:
    """The MLflow store; an empty ``uri`` means ``mlflow.db`` (sqlite) beside the run folder."""

    uri: str
    experiment: str

    def __post_init__(self) -> None:
        check_store(self.uri)


def check_store(uri: str) -> None:
    """Refuse a tracking URI that MLflow takes for none of its stores, or that holds a password.

    A password would be written to run folders and logs. Folders of files (``file:``, ``./mlruns``) are stores of
    MLflow 2; MLflow 3 refuses them.

    Raises:
        ConfigError: such a URI; the message does not repeat a password.
    """
    parts = urlsplit(uri)
    if parts.password is not None:
        raise ConfigError(
            f"tracking.uri: remove the password for {parts.hostname} from it, and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (for a database its own variable, as PGPASSWORD) in the environment"
        )
    kind = parts.scheme.partition("+")[0]  # postgresql+psycopg2: a database with its driver
    if uri not in ("", "databricks") and kind not in STORES:
        what = "a folder of files, which MLflow 3 does not take" if kind in {"", "file"} else "no MLflow store"
        raise ConfigError(
            f"tracking.uri={uri} is {what}; use sqlite:///FOLDER/mlflow.db or the http address of a server, or leave "
            "it empty (mlflow.db beside the run folder)"
        )


@dataclass
class AutoencoderConfig:
    """MONAI AutoencoderKL; one level per entry of ``channels``, each after the first halves every axis."""

    channels: list[int]
    latent_channels: int
    res_blocks: int
    norm_groups: int
    checkpointing: bool
    shortcut: bool = False  # a linear map beside the networks, fitted in closed form before training


@dataclass
class DenoiserConfig:
    """3D U-Net of latent diffusion."""

    scalars: str  # late: given to the U-Net, drawn by the model of scalars; early: drawn by it, as in the paper; auto
    channels: list[int]
    attention: list[bool]
    res_blocks: int
    head_channels: int
    norm_groups: int
    embedding: int  # width of time and scalar embeddings
    dropout: float
    checkpointing: bool
    linear_components: int = 0  # of the linear denoiser that the U-Net's output is added to (late); 0: none


@dataclass
class EncoderConfig:
    """3D encoders of pooled volumes, and their heads for scalars."""

    spacing: float  # of the pooled volumes, mm
    ensemble_members: int  # each trained without a fold of its own
    components: int  # of the mixture that is predicted for a number
    channels: list[int]
    embedding: int  # width of scalar embeddings


@dataclass
class ViTConfig:
    """3D vision transformer (MONAI ViT): ``layers`` blocks of width ``hidden`` on cubes of ``patch`` voxels."""

    patch: int
    hidden: int
    layers: int
    heads: int
    mlp: int
    dropout: float


@dataclass
class ResNetConfig:
    """3D ResNet (MONAI) of a depth, whose channels are multiplied by ``width``."""

    depth: int  # 10 | 18 | 34 | 50 | 101 | 152 | 200
    width: float


@dataclass
class DiffusionConfig:
    """The forward processes and the parameterisations."""

    steps: int  # T
    beta_start: float
    beta_end: float
    time: str  # shared | independent
    shared_fraction: float  # with independent time, probability of one common t
    clean_fraction: float  # probability of t = 0, per variable
    noise_fraction: float  # probability of t = T, per variable
    volume: str  # eps | v | x0
    continuous: str  # eps | v | x0
    weights: dict[str, float]  # loss weight by variable; default 1


@dataclass
class Sampling:
    """How a conditional is sampled."""

    conditioning: str  # auto | clean | repaint
    steps: int  # of volumes and continuous variables
    stride: int  # of categories, in levels; 0: as the solver
    solver: str  # of volumes and continuous variables: ddim | dpm (DPM-Solver++ 2M)
    guidance: float  # 1: none; above 1 strengthens the given values

    def __post_init__(self) -> None:
        at_least(1, {"sampling.steps": self.steps})
        at_least(0, {"sampling.stride": self.stride})
