"""Our network against MONAI's DiffusionModelUNet of the same widths, in one run.

    python benchmarks/speed.py [--preset default] [--latents 8 16 16 16] [--batch 8]

Both see the same latents, an age and a sex. MONAI's as it comes: the scalars as input channels and as cross-attention
context, float32, its own attention. Ours as it is trained and asked: scalars late, fused attention, bfloat16
where the device is made for it. Training is a whole step (noise, forward, loss, backward, AdamW). Prediction
is one denoising of everything, and for ours also one answer about age and sex, which needs no U-Net. Medians over
interleaved repetitions, so that both meet the same machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mvhpc.config import JointConfig, load_config
from mvhpc.devices import keep_thin_convolutions_exact, resolve_device, resolve_precision
from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.diffusion.posterior import Posterior
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.randomness import generator
from mvhpc.training.meters import peak
from mvhpc.variables import Categorical, Continuous, Variables, Volume


class Ours:
    """Our network, diffusion and optimiser of a preset."""

    def __init__(self, config: JointConfig, latents: list[int], device: torch.device) -> None:
        channels, *size = latents
        volume = Volume("image", (channels, size[0], size[1], size[2]))
        variables = Variables([volume, Continuous("age", 0, 100), Categorical("sex", ("F", "M"))])
        self.diffusion = JointDiffusion(variables, config.diffusion).to(device)
        torch.manual_seed(0)
        self.network = JointDenoiser(variables, config.model, self.diffusion.blind).to(device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-4)
        self.device, self.precision = device, resolve_precision("auto", device)
        keep_thin_convolutions_exact(self.network)

    def cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)

    def train(self, batch: dict[str, Tensor]) -> None:
        generators = [generator(0, i) for i in range(len(batch["age"]))]
        noised = self.diffusion.noise(batch, {}, self.diffusion.draw_times(generators), generators)
        with self.cast():
            outputs = self.network(noised.z, noised.t)
        loss = self.diffusion.total(self.diffusion.losses(outputs, noised)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.inference_mode()
    def denoise(self, batch: dict[str, Tensor]) -> None:
        t = {name: torch.full((len(x),), 500, device=self.device) for name, x in batch.items()}
        with self.cast():
            self.network(batch, t)

    @torch.inference_mode()
    def answer(self, batch: dict[str, Tensor]) -> None:
        with self.cast():
            posterior = Posterior(self.network, self.diffusion, {"image": batch["image"]}, len(batch["age"]))
            posterior.laws(["age", "sex"])


class Monai:
    """MONAI's network as it comes, with the same widths."""

    def __init__(self, config: JointConfig, latents: list[int], device: torch.device) -> None:
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


def seconds(job: Callable[[], None], device: torch.device) -> float:
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="default", help="of configs/joint, for the widths")
    parser.add_argument("--latents", type=int, nargs=4, default=[4, 12, 16, 12], metavar="N", help="channels and size")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    options = parser.parse_args()
    device = resolve_device(options.device)
    config = load_config(JointConfig, "joint", options.preset, ["out=none", "latents=none", "vae=none"])
    ours, monai = Ours(config, options.latents, device), Monai(config, options.latents, device)
    g = torch.Generator().manual_seed(0)
    batch = {
        "image": torch.randn(options.batch, *options.latents, generator=g),
        "age": torch.randn(options.batch, 1, generator=g),
        "sex": torch.randint(2, (options.batch,), generator=g),
    }
    batch = {name: x.to(device) for name, x in batch.items()}
    jobs: dict[str, Callable[[], None]] = {
        "train, MONAI": lambda: monai.train(batch),
        "train, ours": lambda: ours.train(batch),
        "denoise, MONAI": lambda: monai.denoise(batch),
        "denoise, ours": lambda: ours.denoise(batch),
        "answer, ours": lambda: ours.answer(batch),
    }
    measured: dict[str, list[float]] = {name: [] for name in jobs}
    for repetition in range(options.repeat + 2):  # two to warm up
        for name, job in jobs.items():
            measured[name] += [seconds(job, device)] * (repetition > 1)
    median = {name: statistics.median(values) for name, values in measured.items()}
    best = {"train": median["train, MONAI"], "denoise": median["denoise, MONAI"], "answer": median["denoise, MONAI"]}
    lines = ["| | ms a sample | samples/s | TFLOP/s | times MONAI's speed |", "|---|---:|---:|---:|---:|"]
    for name, job in jobs.items():
        with FlopCounterMode(display=False) as counter:
            job()
        value, rate = median[name], counter.get_total_flops() / median[name]
        most = peak(device)
        share = f" ({100 * rate / 1e12 / most:.0f} % of peak)" if most else ""
        cells = [f"{1000 * value / options.batch:.2f}", f"{options.batch / value:.1f}", f"{rate / 1e12:.3g}{share}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {best[name.split(',')[0]] / value:.2f} |")
    text = f"preset {options.preset}, latents {options.latents}, batch {options.batch}, {device}, ours in "
    text += f"{str(ours.precision).removeprefix('torch.')}\n\n" + "\n".join(lines) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
