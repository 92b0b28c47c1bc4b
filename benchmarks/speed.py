"""Our network against MONAI's DiffusionModelUNet of the same widths, in one run.

    python benchmarks/speed.py [--preset default] [--latents 4 12 16 12 | --voxels 160 192 160] [--batch 8]
        [--precision float32] [--compile] [--alone]

Both see the same latents, an age and a sex. MONAI's as it comes: the scalars as input channels and as cross-attention
context, float32, its own attention. Ours as it is trained and asked: scalars late, fused attention, bfloat16
where the device is made for it. Training is a whole step (noise, forward, loss, backward, AdamW). Prediction is one
denoising of the volume, all that MONAI's says; for ours also one of volume, age and sex together, as joint chains need,
and one answer about age and sex, which needs no U-Net: of a batch, and of one person from latents and, with
``--voxels``, from the volume by the preset's autoencoder. Medians over interleaved repetitions, so that both meet the
same machine.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mvhpc.config import load_config
from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.diffusion.posterior import Posterior
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.kernels.channels_last import lay_out
from mvhpc.models.kernels.cpu_conv3d import mend_convolutions
from mvhpc.models.kernels.packed_weights import freeze, pack
from mvhpc.runtime.devices import repeatable, resolve_device, resolve_precision
from mvhpc.runtime.randomness import generator
from mvhpc.training.engines.base import adamw
from mvhpc.training.joint import JointConfig
from mvhpc.training.metrics import peak
from mvhpc.training.vae import VAEConfig
from mvhpc.variables import Categorical, Continuous, Variables, Volume

CALLS = 8


class Ours:
    """Our network, diffusion and optimiser of a preset."""

    def __init__(
        self, config: JointConfig, latents: Sequence[int], device: torch.device, precision: str, compiled: bool
    ) -> None:
        channels, *size = latents
        volume = Volume("image", (channels, size[0], size[1], size[2]))
        variables = Variables([volume, Continuous("age", 0, 100), Categorical("sex", ("F", "M"))])
        self.diffusion = JointDiffusion(variables, config.diffusion).to(device)
        torch.manual_seed(0)
        self.network = JointDenoiser(variables, config.model, self.diffusion.masked_level).to(device)
        self.optimizer = adamw(self.network, 1e-4, config.optimizer)
        self.device, self.precision, self.questions = device, resolve_precision(precision, device), config.questions
        if device.type == "cpu":
            mend_convolutions(self.network)
        else:
            lay_out(self.network)
        self.asked = copy.deepcopy(self.network).eval()
        freeze(self.asked, self.precision, JointDenoiser.TELLING)
        if compiled:
            self.network.compile()
            self.asked.compile()
        else:
            pack(self.asked)

    def cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)

    def train(self, batch: dict[str, Tensor]) -> None:
        rows = [generator(0, i, q) for i in range(len(batch["age"])) for q in range(self.questions)]
        noised = self.diffusion.noise(batch, {}, self.diffusion.draw_times(rows), rows)
        with self.cast():
            outputs = self.network(noised.z, noised.t, moving=noised.moving)
        loss = self.diffusion.total(self.diffusion.losses(outputs, noised)).mean()
        self.optimizer.zero_grad()
        with repeatable(self.device):
            loss.backward()
        self.optimizer.step()

    @torch.inference_mode()
    def denoise(self, batch: dict[str, Tensor], want: Sequence[str]) -> None:
        t = {name: torch.full((len(x),), 500, device=self.device) for name, x in batch.items()}
        with self.cast():
            self.asked(batch, t, want)

    @torch.inference_mode()
    def answer(self, batch: dict[str, Tensor]) -> None:
        with self.cast():
            posterior = Posterior(self.asked, self.diffusion, {"image": batch["image"]}, len(batch["age"]))
        posterior.laws(["age", "sex"])


class Monai:
    """MONAI's network as it comes, with the same widths."""

    def __init__(self, config: JointConfig, latents: Sequence[int], device: torch.device) -> None:
        torch.manual_seed(0)
        m = config.model
        self.network = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=latents[0] + 2,
            out_channels=latents[0],
            channels=m.channels,
            attention_levels=m.attention,
            num_res_blocks=m.res_blocks,
            num_head_channels=m.head_channels,
            norm_num_groups=m.norm_groups,
            with_conditioning=True,
            cross_attention_dim=2,
        ).to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        scalars = torch.stack([batch["age"][:, 0], 2.0 * batch["sex"] - 1], 1)  # (B, 2)
        planes = scalars[:, :, None, None, None].expand(-1, -1, *batch["image"].shape[2:])
        t = torch.full((len(scalars),), 500, device=scalars.device)
        out: Tensor = self.network(torch.cat([batch["image"], planes], 1), t, scalars[:, None])
        return out

    def train(self, batch: dict[str, Tensor]) -> None:
        noise = torch.randn_like(batch["image"])
        loss = F.mse_loss(self.forward(batch | {"image": batch["image"] + noise}), noise)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.inference_mode()
    def denoise(self, batch: dict[str, Tensor]) -> None:
        self.forward(batch)


@torch.inference_mode()
def encode(autoencoder: Autoencoder, ours: Ours, volume: Tensor) -> Tensor:
    """Latents of volumes (B, 1, H, W, D), as stage ``encode`` makes them."""
    with ours.cast():
        return autoencoder.encode(volume)[0].float()


def seconds(job: Callable[[], None], device: torch.device) -> float:
    """Of one call; on a GPU of several in a row, for there the host prepares the next while the GPU works."""
    if device.type != "cuda":
        start = time.perf_counter()
        job()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        job()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / CALLS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="default", help="of configs/joint, for the widths")
    parser.add_argument("--latents", type=int, nargs=4, default=[4, 12, 16, 12], metavar="N", help="channels and size")
    parser.add_argument("--voxels", type=int, nargs=3, metavar="N", help="of a volume, in place of --latents")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--precision", default="auto", help="of ours: auto, float32 or bfloat16")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile")
    parser.add_argument("--alone", action="store_true", help="ours alone, where MONAI's does not fit beside it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    options = parser.parse_args()
    device = resolve_device(options.device)
    config = load_config(JointConfig, "joint", options.preset, ["out=none", "latents=none", "vae=none"])
    latents: Sequence[int] = options.latents
    if options.voxels:
        vae = load_config(VAEConfig, "vae", options.preset, ["out=none", "data=none"])
        autoencoder = Autoencoder(vae.model).to(device).eval()
        latents = autoencoder.latent_shape(options.voxels)
    with device:  # initial weights are drawn there, which takes half a minute less
        ours = Ours(config, latents, device, options.precision, options.compile)
        monai = None if options.alone else Monai(config, latents, device)
    g = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randn(options.batch, *latents, generator=g),
        "age": torch.randn(options.batch, 1, generator=g),
        "sex": torch.randint(2, (options.batch,), generator=g),
    }
    batch = {name: x.to(device) for name, x in batch.items()}
    one = {name: x[:1] for name, x in batch.items()}
    jobs: dict[str, Callable[[], None]] = {}
    if monai:
        jobs |= {"train, MONAI": lambda: monai.train(batch), "denoise, MONAI": lambda: monai.denoise(batch)}
    jobs |= {
        "train, ours": lambda: ours.train(batch),
        "denoise, ours": lambda: ours.denoise(batch, ["image"]),
        "denoise with age and sex, ours": lambda: ours.denoise(batch, [*batch]),
        "answer, ours": lambda: ours.answer(batch),
        "answer of one, ours": lambda: ours.answer(one),
    }
    if options.voxels:
        volume = torch.rand(1, 1, *options.voxels, generator=g).to(device)
        jobs["answer of one from voxels, ours"] = lambda: ours.answer(
            {**one, "image": encode(autoencoder, ours, volume)}
        )
    measured: dict[str, list[float]] = {name: [] for name in jobs}
    for repetition in range(options.repeat + 2):  # two to warm up
        for name, job in jobs.items():
            measured[name] += [seconds(job, device)] * (repetition > 1)
    median = {name: statistics.median(values) for name, values in measured.items()}
    lines = ["| | ms a sample | samples/s | TFLOP/s | times MONAI's speed |", "|---|---:|---:|---:|---:|"]
    for name, job in jobs.items():
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            job()
        value, rate = median[name], counter.get_total_flops() / median[name]
        most = peak(device)
        share = f" ({100 * rate / 1e12 / most:.0f} % of peak)" if most else ""
        samples = 1 if "one" in name else options.batch
        theirs = median.get("train, MONAI" if name.startswith("train") else "denoise, MONAI")
        times = f"{theirs / value:.2f}" if theirs and samples > 1 else ""
        cells = [f"{1000 * value / samples:.2f}", f"{samples / value:.1f}", f"{rate / 1e12:.3g}{share}", times]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    precision = str(ours.precision).removeprefix("torch.") + ", compiled" * options.compile
    text = (
        f"preset {options.preset}, latents {tuple(latents)}, batch {options.batch}, {machine}, ours in {precision}\n\n"
    )
    text += "\n".join(lines) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
