"""How large the measurements of :mod:`benchmarks.gpu` are."""

from dataclasses import dataclass, field
from typing import Any

from mvhpc.config import load_config
from mvhpc.training.joint import JointConfig
from mvhpc.training.scalars import ScalarsConfig
from mvhpc.training.vae import VAEConfig

SMALL_VAE = {
    "model.channels": [8, 8, 16],
    "model.res_blocks": 1,
    "model.norm_groups": 4,
    "loss.discriminator_channels": 8,
    "loss.discriminator_layers": 2,
}
SMALL_JOINT = {
    "model.channels": [16, 16],
    "model.attention": [False, True],
    "model.head_channels": 16,
    "model.norm_groups": 8,
    "model.embedding": 16,
    "model.res_blocks": 1,
}


@dataclass(frozen=True)
class Settings:
    """Sizes of the measurements.

    Attributes:
        preset: of the stages ``joint`` and ``vae``, for widths and batches.
        voxels: of a volume.
        joint, vae: overrides of the preset's keys.
        samples: training samples of random latents.
        warm: steps before a measurement.
        steps: of one timed block: of the joint stage, and of the autoencoder.
        blocks: that are timed; the median is reported.
        backend: of torch.compile; ``aot_eager`` traces and differentiates blocks but generates no code, which takes a
            minute on a CPU.
        product: rows and columns of the matrices whose product gives the rate that the device keeps up.
        product_seconds: that their products are repeated for.
        chains: drawn together.
        extractions: of a brain, that are timed; the median is reported.
        people: of the small data sets that are trained on twice.
        rounds, turns: of the comparison with a bare training loop.
    """

    preset: str = "h200"
    voxels: tuple[int, int, int] = (160, 192, 160)
    joint: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    samples: int = 128
    warm: int = 4
    steps: tuple[int, int] = (8, 3)
    blocks: int = 3
    backend: str = "inductor"
    product: int = 8192
    product_seconds: float = 3.0
    chains: int = 64
    extractions: int = 5
    people: int = 64
    rounds: int = 2
    turns: int = 5

    def joint_config(self, **paths: str) -> JointConfig:
        """The joint stage on the data at ``paths``."""
        return load_config(JointConfig, "joint", self.preset, values={"out": "none", **self.joint, **paths})

    def scalars_config(self, **paths: str) -> ScalarsConfig:
        """The model of scalars, by its default configuration."""
        return load_config(ScalarsConfig, "scalars", "default", values={"out": "none", **paths})

    def vae_config(self, **paths: str) -> VAEConfig:
        """The autoencoder's stage, without the perceptual loss, whose weights are a download."""
        values = {"out": "none", "data": "none", "loss.perceptual": 0.0, **self.vae, **paths}
        return load_config(VAEConfig, "vae", self.preset, values=values)


FULL = Settings()
TINY = Settings(
    preset="default",
    voxels=(16, 16, 16),
    joint=SMALL_JOINT | {"training.batch": 4, "compute.precision": "auto"},
    vae=SMALL_VAE | {"training.batch": 2, "compute.precision": "auto"},
    samples=8,
    warm=2,
    steps=(2, 1),
    blocks=2,
    backend="aot_eager",
    product=256,
    product_seconds=0.1,
    chains=2,
    extractions=1,
    people=16,
    rounds=1,
    turns=2,
)
