"""Work of one micro-batch of a preset on one GPU, counted on tensors without data.

The real networks run forward and backward on fake tensors under bfloat16 autocast. Every operator that PyTorch sends
to the device is counted: its floating-point operations (:data:`torch.utils.flop_counter.flop_registry`), the bytes it
reads and writes, and the memory in use. The time of an operator is the longer of its arithmetic and its traffic (the
roofline model). The linear denoiser of the joint stage, a thousandth of the U-Net's operations, is left out.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Distribution
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mvhpc.config import load_config
from mvhpc.diffusion.joint import JointDiffusion, Noised
from mvhpc.models.autoencoder import Autoencoder, kl_divergence
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.perceptual import SqueezeLPIPS, slice_distance
from mvhpc.stages import STAGES
from mvhpc.training.engines.deepspeed import PERSISTENT
from mvhpc.training.joint import JointConfig
from mvhpc.training.vae import Discriminator, discriminator_loss, generator_loss
from mvhpc.variables import Categorical, Continuous, Variables, Volume

VOXELS = (160, 192, 160)  # of the presets: 1 mm
PRESETS = ("paper", "h200")
KINDS = ("joint", "vae")  # stages
REDUCTION = 8  # of the presets' autoencoders, per axis
aten = torch.ops.aten
autocast = partial(torch.autocast, "cpu", torch.bfloat16)
FORMULAS = flop_registry | {  # the fused attention of fake tensors is that of CPUs, which has no formula of its own
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


@dataclass(frozen=True)
class Device:
    """The rates that an operator reaches: arithmetic in FLOP/s and memory traffic in bytes/s."""

    arithmetic: float
    traffic: float


@dataclass(frozen=True)
class Work:
    """One micro-batch on one GPU.

    Attributes:
        parameters: trained weights, all networks together.
        large: tensors of them that ZeRO-3 fetches for every layer; the smaller ones stay whole.
        flops: floating-point operations, forward and backward, recomputation of checkpointed activations included.
        traffic: bytes read and written.
        kernels: operators launched.
        seconds: they take, by the roofline of a :class:`Device`.
        activations: most bytes alive at a time beside weights, their gradients and what the optimiser keeps.
    """

    parameters: int
    large: int
    flops: int
    traffic: int
    kernels: int
    seconds: float
    activations: int


class Counter(TorchDispatchMode):
    """Counts the operators inside its context; see :class:`Work`."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device
        self.flops = self.traffic = self.kernels = self.alive = self.peak = 0
        self.seconds = 0.0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given, results = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out))
        there = {x.untyped_storage()._cdata for x in given}  # of weights, which views of them share
        for storage in (x.untyped_storage() for x in results):
            if storage._cdata not in there | self._seen:
                self._hold(storage)
        if func.namespace == "aten" and not func.is_view:
            traffic = sum(x.numel() * x.element_size() for x in (*given, *results))
            formula = FORMULAS.get(func._overloadpacket)
            flops = int(formula(*args, **(kwargs or {}), out_val=out)) if formula else 0
            self.kernels += 1
            self.flops += flops
            self.traffic += traffic
            self.seconds += max(flops / self.device.arithmetic, traffic / self.device.traffic)
        return out

    def _hold(self, storage: Any) -> None:
        self._seen.add(storage._cdata)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def joint_parts(preset: str) -> tuple[Variables, JointDiffusion, JointConfig]:
    """What a joint model of brain, age and sex is made of, on the latents of the preset's autoencoder."""
    config, channels = settings("joint", preset), settings("vae", preset).model.latent_channels
    height, width, depth = (n // REDUCTION for n in VOXELS)
    volume = Volume("image", (channels, height, width, depth))
    variables = Variables([volume, Continuous("age", 0, 100), Categorical("sex", ("F", "M"))])
    return variables, JointDiffusion(variables, config.diffusion), config


def _joint(preset: str, batch: int) -> tuple[list[nn.Module], Callable[[], None]]:
    """The U-Net, and one micro-batch of it."""
    variables, diffusion, config = joint_parts(preset)
    denoiser = JointDenoiser(variables, config.model, diffusion.masked_level)
    image = torch.randn(batch, *variables.volumes[0].shape)
    z = {"image": image, "age": torch.randn(batch, 1), "sex": torch.zeros(batch, dtype=torch.int64)}
    t = {name: torch.ones(batch, dtype=torch.int64) for name in z}
    noised = Noised(z, t, z, {name: torch.ones(batch, dtype=torch.bool) for name in z})

    def step() -> None:
        with autocast():
            outputs = denoiser(z, t)
        diffusion.total(diffusion.losses({name: x.float() for name, x in outputs.items()}, noised)).mean().backward()

    return [denoiser], step


def _vae(preset: str, batch: int) -> tuple[list[nn.Module], Callable[[], None]]:
    """Autoencoder and discriminator, and one micro-batch of both: :meth:`mvhpc.training.vae.VAETask.step`."""
    config = settings("vae", preset)
    loss = config.loss
    autoencoder = Autoencoder(config.model)
    discriminator = Discriminator(loss.discriminator_channels, loss.discriminator_layers, VOXELS)
    frozen = Discriminator(loss.discriminator_channels, loss.discriminator_layers, VOXELS).requires_grad_(False)
    lpips = SqueezeLPIPS().requires_grad_(False)
    x = torch.rand(batch, 1, *VOXELS)
    noise = torch.randn(batch, *autoencoder.latent_shape(VOXELS))
    draws = [torch.Generator() for _ in range(batch)]

    def step() -> None:
        with autocast():
            y, mean, sigma = (part.float() for part in autoencoder(x, noise))
            logits = frozen(y).float()
        total = (y - x).abs().mean() + loss.kl * kl_divergence(mean, sigma).mean() + generator_loss(logits)
        total = total + loss.perceptual * slice_distance(lpips, y, x, loss.slices, draws).mean()
        total.backward()
        with autocast():
            both = discriminator(torch.cat([y.detach(), x])).float()
        discriminator_loss(*both.chunk(2)).backward()

    return [autoencoder, discriminator], step


@cache
def settings(stage: str, preset: str) -> Any:
    """The configuration of a stage's preset, its paths left open; of the joint stage with a model of scalars."""
    paths = {"joint": ("out", "latents", "vae"), "vae": ("out", "data")}[stage]
    config: Any = load_config(STAGES[stage].config_class(), stage, preset, values=dict.fromkeys(paths, "..."))
    if stage == "joint" and config.model.scalars == "auto":
        config.model.scalars = "late"
    return config


@cache
def count(stage: str, preset: str, batch: int, device: Device) -> Work:
    """One micro-batch of a preset on one GPU.

    Args:
        stage: ``joint`` or ``vae``.
        preset: ``paper`` or ``h200``, of ``configs/STAGE``.
        batch: rows.
        device: what an operator may use.
    """
    Distribution.set_default_validate_args(False)  # needs data
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        networks, step = _joint(preset, batch) if stage == "joint" else _vae(preset, batch)
        weights = [p for network in networks for p in network.train().parameters()]
        for p in weights:  # gradients are counted by themselves: ZeRO may divide them
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with Counter(device) as c:
            step()
    large = sum(p.numel() > PERSISTENT for p in weights)
    return Work(sum(p.numel() for p in weights), large, c.flops, c.traffic, c.kernels, c.seconds, c.peak)
