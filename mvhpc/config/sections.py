"""The parts of configurations that several stages share; each stage's own stands in its module."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from mvhpc.config.errors import ConfigError, at_least


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
class Device:
    """Where a stage that runs in one process computes."""

    device: str  # auto | cpu | cuda
    precision: str  # float32 | bfloat16 | auto: bfloat16 where the device is fast at it
    threads: int  # of the CPU, per worker; 0: torch's choice, or the cores divided among the workers
    compile: bool  # torch.compile of the networks that are called many times


@dataclass
class Workers(Device):
    """Where a stage computes that can be divided among workers."""

    workers: int

    def __post_init__(self) -> None:
        at_least(1, {"compute.workers": self.workers})


@dataclass
class Compute(Workers):
    """Where training computes. One worker is this process, several run through Ray Train and DeepSpeed."""

    zero_stage: int  # 0 to 3, DeepSpeed ZeRO
    offload: str  # none | cpu: where the optimizer's state lives, from ZeRO-1 on
    retries: int  # restarts from the last checkpoint by Ray; in a job also of Ray itself, in a row without a new one
    hang_minutes: float  # without a step, after which a worker logs all stacks and exits; 0: never


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


@dataclass
class AutoencoderConfig:
    """MONAI AutoencoderKL; as many levels as ``channels`` has entries, each after the first halving every axis."""

    channels: list[int]
    latent_channels: int
    res_blocks: int
    norm_groups: int
    checkpointing: bool


@dataclass
class DenoiserConfig:
    """3D U-Net of latent diffusion, and how scalars enter and leave it."""

    scalars: str  # late: predicted by a network beside the U-Net; early: by the U-Net, the paper's way
    components: int  # of the predicted density of a number (late); 0: no density
    ensemble_members: int  # networks of scalars (late), each trained without a share of the people; 1: without none
    channels: list[int]
    attention: list[bool]
    res_blocks: int
    head_channels: int
    norm_groups: int
    embedding: int  # width of time and scalar embeddings
    dropout: float
    checkpointing: bool


@dataclass
class DiffusionConfig:
    """The forward processes and what the network predicts."""

    steps: int  # T
    beta_start: float
    beta_end: float
    time: str  # shared | independent
    shared_fraction: float  # of steps, in independent time, that draw one common t
    clean_fraction: float  # probability, per variable, of resting at t = 0
    noise_fraction: float  # probability, per variable, of resting at t = T
    volume: str  # eps | v | x0
    continuous: str  # eps | v | x0
    weights: dict[str, float]  # loss weight per variable, 1 where not named


@dataclass
class Sampling:
    """How a conditional is sampled."""

    conditioning: str  # auto | posterior (scalars alone) | clean | repaint
    steps: int  # of volumes and continuous variables
    stride: int  # of categories, in levels; 0: they step with the solver
    solver: str  # of volumes and continuous variables: ddim | dpm (DPM-Solver++ 2M)
    guidance: float  # 1: none; above 1 the given values have more weight

    def __post_init__(self) -> None:
        at_least(1, {"sampling.steps": self.steps})
        at_least(0, {"sampling.stride": self.stride})
