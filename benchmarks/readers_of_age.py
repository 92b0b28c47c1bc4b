"""What of age small networks read from latents, by how these are standardised: why the reader is as it is.

    python benchmarks/readers_of_age.py runs/scoreboard/latents [--epochs 20]

Each is trained on age alone, by squared error, mirrored half of the time: a linear map of all elements, the model's
reader on latents standardised by element (as the U-Net has them) and by channel, and the reader and the linear map
together. The mean absolute error of the test people, in years, at the end.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mvhpc.config import DenoiserConfig
from mvhpc.models.heads import Reader
from mvhpc.variables import Volume
from shards.dataset import Dataset, open_dataset
from shards.progress import progress

MODEL = DenoiserConfig("late", 8, 1, [32, 64], [False, True], 1, 32, 8, 128, 0.0, False)
BATCH, RATE = 32, 1e-3


def people(dataset: Dataset, part: str, split: str) -> tuple[Tensor, Tensor]:
    """Latents as they are and, for training, mirrored (N, 1 or 2, C, h, w, d), and ages (N,) of those who have one."""
    keys = [key for key in dataset.keys(part, split) if dataset.values(key)["age"] is not None]
    names = ["image", "image_mirrored"] if part == "train" else ["image"]
    versions = [[dataset.read(key, name) for name in names] for key in keys]
    ages = [float(dataset.values(key)["age"]) for key in keys]  # type: ignore[arg-type]
    return torch.from_numpy(np.array(versions)).float(), torch.tensor(ages)


class Sum(nn.Module):
    """The sum of what several networks see, bent once, as a number."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        width = MODEL.channels[-1]
        self.parts = nn.ModuleList(parts)
        self.bend = nn.Sequential(nn.Linear(width, 256), nn.SiLU(), nn.Linear(256, width))
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.stack([part(x) for part in self.parts]).sum(0)  # (B, width)
        return self.out(seen + self.bend(seen))[:, 0]


class Channelwise(nn.Module):
    """The reader, on latents standardised by channel."""

    def __init__(self, reader: Reader, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.reader, self.scale, self.shift = reader, scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(x * self.scale + self.shift)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents")
    parser.add_argument("split", nargs="?", default="default")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    dataset = open_dataset(options.latents)
    (x, ages), (test, truth) = (people(dataset, part, options.split) for part in ("train", "test"))
    mean, sd = ages.mean(), ages.std()
    both = x.flatten(0, 1)
    spread = both.std(0)
    spread = spread.clamp(min=float(0.1 * spread.square().mean().sqrt()))
    channels, height, width, depth = spread.shape
    volume = Volume("image", (channels, height, width, depth), both.mean(0), spread)
    x, test = volume.encode(x), volume.encode(test[:, 0])
    scale, shift = volume.channelwise()

    def reader(channelwise: bool) -> nn.Module:
        network = Reader(channels, MODEL)
        network.adapt(x[:256, 0] * scale + shift if channelwise else x[:256, 0])
        return Channelwise(network, scale, shift) if channelwise else network

    def linear() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(volume.mean.numel(), MODEL.channels[-1]))

    ways: dict[str, Callable[[], Sum]] = {
        "linear map": lambda: Sum(linear()),
        "reader, by element": lambda: Sum(reader(False)),
        "reader, by channel": lambda: Sum(reader(True)),
        "reader, by channel, and linear map": lambda: Sum(reader(True), linear()),
    }
    for label, build in ways.items():
        torch.manual_seed(0)
        network = build()
        steps = options.epochs * (len(x) // BATCH)
        optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
        for _ in progress(range(options.epochs), label, unit="epoch"):
            for rows in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
                said = network(x[rows, torch.randint(2, (BATCH,))])
                loss = (said - (ages[rows] - mean) / sd).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            error = (torch.cat([network(part) for part in test.split(64)]) * sd + mean - truth).abs().mean()
        print(f"{label:36s} {error:.2f}", flush=True)


if __name__ == "__main__":
    main()
