"""Our network beside MONAI's DiffusionModelUNet of the same widths, in one run.

    python -m benchmarks.speed.monai [--preset default] [--voxels 96 128 96] [--batch 8] [--precision float32]

Both get random latents of such volumes, an age and a sex. MONAI's network is used as it comes: scalars as input
channels and as context of the cross-attention, in float32. Ours is used as the stages use it, with its linear denoiser:
trained by the task and the engine of the joint stage, and loaded by a sampler for inference. A training step is noise,
forward, loss, backward and AdamW. "Denoise" is one call. Medians of interleaved repetitions.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_sections.data import latents, untrained_model
from benchmarks.gpu_sections.settings import Settings
from benchmarks.gpu_sections.timing import seconds
from benchmarks.gpu_sections.training import Trainer
from mvhpc.config import load_config
from mvhpc.inference.generate import GenerateConfig
from mvhpc.inference.sampler import Sampler
from mvhpc.runtime.devices import resolve_device
from mvhpc.training.joint import JointConfig, JointTask
from mvhpc.training.metrics import peak_tflops
from shards.files import write_text

LEVEL = 500  # of T = 1000, at which volumes are denoised


class Monai:
    """MONAI's network with the widths of a preset, and AdamW."""

    def __init__(self, config: JointConfig, shape: Sequence[int], device: torch.device) -> None:
        torch.manual_seed(0)
        m = config.model
        self.network = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=shape[0] + 2,
            out_channels=shape[0],
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
        """The output (B, C, h, w, d) at :data:`LEVEL`."""
        scalars = torch.stack([batch["age"][:, 0], 2.0 * batch["sex"] - 1], 1)  # (B, 2)
        planes = scalars[:, :, None, None, None].expand(-1, -1, *batch["image"].shape[2:])
        t = torch.full((len(scalars),), LEVEL, device=scalars.device)
        out: Tensor = self.network(torch.cat([batch["image"], planes], 1), t, scalars[:, None])
        return out

    def train(self, batch: dict[str, Tensor]) -> None:
        """One training step."""
        noise = torch.randn_like(batch["image"])
        loss = F.mse_loss(self.forward(batch | {"image": batch["image"] + noise}), noise)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.inference_mode()
    def denoise(self, batch: dict[str, Tensor]) -> None:
        """One call for the volume."""
        self.forward(batch)


def jobs_of(settings: Settings, config: JointConfig, folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed, by name; one call is one batch."""
    values = {"out": "", "model": untrained_model(folder, settings), "compute.precision": config.compute.precision}
    sampler = Sampler.of(load_config(GenerateConfig, "generate", "default", values=values))
    device, shape = sampler.device, sampler.model.variables.volumes[0].shape
    monai, trainer, n = Monai(config, shape, device), Trainer(JointTask(config), config, 1), config.training.batch
    g = torch.Generator().manual_seed(0)
    drawn = {
        "image": torch.randn(n, *shape, generator=g),
        "age": torch.randn(n, 1, generator=g),
        "sex": torch.randint(2, (n,), generator=g),
    }
    batch = {name: x.to(device) for name, x in drawn.items()}
    levels = {name: torch.full((n,), LEVEL, device=device) for name in batch}

    @torch.inference_mode()
    def denoise() -> None:
        with torch.autocast(device.type, sampler.precision, enabled=sampler.precision is not torch.float32):
            sampler.model.denoise(batch, levels, ["image"])

    return {
        "train, MONAI": lambda: monai.train(batch),
        "denoise, MONAI": lambda: monai.denoise(batch),
        "train, ours": lambda: trainer.step(0),
        "denoise, ours": denoise,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="default", help="of the stages joint and vae, for the widths")
    parser.add_argument("--voxels", type=int, nargs=3, default=[96, 128, 96], metavar="N", help="of a volume")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--precision", default="auto", help="of ours: auto, float32 or bfloat16")
    parser.add_argument("--markdown", type=Path, help="write the table there too")
    options = parser.parse_args()
    height, width, depth = options.voxels
    joint = {"training.batch": options.batch, "compute.precision": options.precision}
    settings = Settings(options.preset, (height, width, depth), joint, samples=options.batch)
    device = resolve_device("auto")
    measured: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="mvhpc-monai-") as folder:
        config = settings.joint_config(**latents(Path(folder), settings))
        jobs = jobs_of(settings, config, Path(folder))
        for repetition in range(options.repeat + 2):  # two to warm up
            for name, job in jobs.items():
                value = seconds(job, device, 8 if device.type == "cuda" else 1)
                measured.setdefault(name, []).extend([value] * (repetition > 1))
    median = {name: statistics.median(values) for name, values in measured.items()}
    lines = ["| | ms a sample | samples/s | TFLOP/s | times MONAI's speed |", "|---|---:|---:|---:|---:|"]
    for name, job in jobs.items():
        with FlopCounterMode(display=False) as counter:
            job()
        value, rate, most = median[name], counter.get_total_flops() / median[name] / 1e12, peak_tflops(device)
        share = f" ({100 * rate / most:.0f} % of peak)" if most else ""
        theirs = median["train, MONAI" if name.startswith("train") else "denoise, MONAI"]
        cells = [f"{1000 * value / options.batch:.2f}", f"{options.batch / value:.1f}", f"{rate:.3g}{share}"]
        lines.append(f"| {name} | {' | '.join([*cells, f'{theirs / value:.2f}'])} |")
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    facts = f"preset {options.preset}, volumes {tuple(options.voxels)}, batch {options.batch}, {machine}"
    text = f"{facts}, precision of ours {options.precision}\n\n" + "\n".join(lines) + "\n"
    print(text)
    if options.markdown:
        write_text(options.markdown, text)


if __name__ == "__main__":
    main()
