"""Predictions of every method on the scoreboard, and their cost."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.phantom.models import densenet_name
from mvhpc.config import Device, Sampling, load_config
from mvhpc.diffusion.density import crps, quantile
from mvhpc.diffusion.joint import Batch
from mvhpc.diffusion.laws import Law, join
from mvhpc.evaluation import ensembles
from mvhpc.inference.baseline_predictor import BaselinePredictor
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.sampler import Sampler
from mvhpc.inference.scalar_inputs import read_inputs
from mvhpc.models.bundle import JointModel, load
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.models.scalar_stack import StackPosterior
from mvhpc.runtime.randomness import generator
from mvhpc.variables import Continuous
from shards.dataset import Dataset, open_dataset
from shards.phantom.anatomy import AGES, best_possible, posterior, read_tables
from shards.phantom.anatomy import Posterior as Exact

CPU = Device(device="cpu", precision="float32", threads=0, compile=False)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Prediction:
    """Predictions of a method for N people, and their cost.

    Attributes:
        point: ages (N,), or chances of being M (N,); of a density the median, which minimises the absolute error.
        interval: 90 %, (N, 2); None where there is none.
        crps: (N,).
        sd: SD of the mixture over all people: with nothing given, that of p(age).
        calls, flops, seconds: per person, flops from latents (DenseNet: from voxels; ours: from pooled voxels).
    """

    point: Floats
    interval: Floats | None = None
    crps: Floats | None = None
    sd: float = math.nan
    calls: int = 0
    flops: float = math.nan
    seconds: float = math.nan


def ideal(root: Path, keys: Sequence[str], want: str, given: Sequence[str], truth: Floats) -> Prediction:
    """The exact posterior of the phantoms."""
    source = read_tables(root / "source").set_index("participant_id", drop=False)
    table = source.loc[list(keys)]
    if want == "sex":
        return Prediction(best_possible(table, given)["M"].to_numpy())
    exact: Exact = posterior(table if "image" in given else None, None, table["sex"] if "sex" in given else None)
    n = len(keys)
    mass = np.broadcast_to(exact.age_mass, (n, len(exact.ages)))
    below = np.cumsum(mass, 1)
    step = (AGES[1] - AGES[0]) / len(exact.ages)
    score = ((below - (exact.ages >= truth[:, None])) ** 2).sum(1) * step
    low, median, high = (np.broadcast_to(exact.quantile(q), n) for q in (0.05, 0.5, 0.95))
    spread = np.broadcast_to(exact.sd, n)
    return Prediction(
        median.copy(), np.stack([low, high], 1), score, float(np.sqrt(np.mean(spread**2) + np.var(exact.mean)))
    )


def constant(dataset: Dataset, n: int, want: str, truth: Floats) -> Prediction:
    """The mean age of the training part, or its share of men."""
    seen = [dataset.values(key)[want] for key in dataset.keys("train")]
    if want == "sex":
        return Prediction(np.full(n, np.mean([v == "M" for v in seen])))
    ages = np.array(seen, float)
    interval = np.tile(np.quantile(ages, [0.05, 0.95]), (n, 1))
    apart = np.abs(ages[:, None] - ages).mean()
    score = np.abs(ages - truth[:, None]).mean(1) - apart / 2
    return Prediction(np.full(n, ages.mean()), interval, score, float(ages.std()))


def densenet(root: Path, keys: Sequence[str], want: str, given: Sequence[str], batch: int = 32) -> Prediction | None:
    """The DenseNet121 of the query; None where no image is given."""
    if "image" not in given:
        return None
    places = {"model": str(root / densenet_name(want, given)), "data": str(root / "packed"), "out": ""}
    query = {"given": list(given), "want": [want], "compute.device": "cpu"}
    predictor = open_predictor(load_config(PredictConfig, "predict", values=places | query))
    assert isinstance(predictor, BaselinePredictor)
    people = [predictor.inputs(keys[i : i + batch]) for i in range(0, len(keys), batch)]
    start = time.monotonic()
    predicted = torch.cat([predictor.predict(*part) for part in people])
    seconds = (time.monotonic() - start) / len(keys)
    with FlopCounterMode(display=False) as counter:
        predictor.predict(*predictor.inputs(keys[: predictor.group]))
    point = predicted.numpy() if want == "age" else predicted[:, 1].numpy()
    return Prediction(point, calls=1, flops=counter.get_total_flops() // predictor.group, seconds=seconds)


def ours(
    root: Path, keys: Sequence[str], want: str, given: Sequence[str], truth: Floats, batch: int = 32
) -> Prediction:
    """The model of scalars."""
    model = load(root / "scalars", kind=ScalarsModel)
    dataset, variable = open_dataset(root / "packed"), model.variables[want]
    people = [read_inputs(model, dataset, keys[i : i + batch], given) for i in range(0, len(keys), batch)]

    @torch.inference_mode()
    def predict(pooled: Batch, values: Batch, known: Batch) -> Law:
        return StackPosterior(model.stack, pooled, values, known).laws([want])[want]

    start = time.monotonic()
    law = join([predict(*part) for part in people])
    seconds = (time.monotonic() - start) / len(keys)
    with FlopCounterMode(display=False) as counter:
        predict(*read_inputs(model, dataset, keys[:1], given))
    cost: dict[str, Any] = {"calls": 1, "flops": counter.get_total_flops(), "seconds": seconds}
    if isinstance(law, Tensor):
        return Prediction(law[:, 1].numpy(), **cost)
    assert isinstance(variable, Continuous)
    scale = (variable.high - variable.low) / 2
    points = variable.decode(quantile(law, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)))
    low, median, high = points.reshape(len(keys), 3).T.numpy()
    score = (crps(law, variable.encode(truth.tolist())[:, 0].double()) * scale).numpy()
    whole = float((law.stddev.square().mean() + law.mean.var()).sqrt()) * scale
    return Prediction(median, np.stack([low, high], 1), score, whole, **cost)


class Paper:
    """The paper's procedure, on people whose latents are stored: an ensemble of chains.

    Args:
        root: of the scoreboard.
        sampling: how a conditional is sampled.
        samples: chains per person.
    """

    def __init__(self, root: Path, sampling: Sampling, samples: int) -> None:
        self.model, self.samples = load(root / "paper", kind=JointModel), samples
        self.sampler = Sampler(self.model, sampling, CPU)
        self.dataset, self.latents = open_dataset(root / "packed"), open_dataset(root / "latents")

    def given(self, keys: Sequence[str], names: Sequence[str]) -> Batch:
        """Encoded values of some variables, one row per person."""
        scalars, _ = self.model.variables.encode_scalars([self.dataset.values(key) for key in keys])
        if "image" in names:
            volume = self.model.variables.volumes[0]
            stored = [torch.from_numpy(self.latents.read(key, "image").astype(np.float32)) for key in keys]
            scalars["image"] = volume.encode(torch.stack(stored))
        return {name: scalars[name] for name in names}

    def predict(
        self, keys: Sequence[str], want: str, names: Sequence[str], truth: Floats, batch: int = 50
    ) -> Prediction:
        """Predict for all people, in batches, from latents; the autoencoder is not counted."""
        parts = [self.chains(keys[i : i + batch], want, names) for i in range(0, len(keys), batch)]
        predicted, cost = np.concatenate(parts), self.cost(keys[:20], want, names)
        if want == "sex":
            return Prediction(predicted.mean(1), **cost)
        return Prediction(
            predicted.mean(1),
            ensembles.quantiles(predicted, [0.05, 0.95]),
            ensembles.crps(predicted, truth),
            float(predicted.std()),
            **cost,
        )

    def chains(self, keys: Sequence[str], want: str, names: Sequence[str]) -> Floats:
        """Ages in years, or whether it is M, (rows, samples)."""
        n, variable = self.samples, self.model.variables[want]
        repeated = {name: value.repeat_interleave(n, 0) for name, value in self.given(keys, names).items()}
        noise = [generator(0, "scoreboard", key, chain) for key in keys for chain in range(n)]
        drawn = self.sampler(repeated, noise, want=[want])[want]
        values = variable.decode(drawn) if isinstance(variable, Continuous) else drawn.double()
        return values.reshape(len(keys), n).numpy()

    def cost(self, keys: Sequence[str], want: str, names: Sequence[str]) -> dict[str, Any]:
        """Network calls, FLOPs and seconds per person, for a batch of these people.

        Every call computes the whole U-Net, as in the paper; ours skips what no wanted variable needs, which changes no
        prediction.
        """
        denoise = self.model.denoise
        with patch.object(JointModel, "denoise", lambda model, z, t, want: denoise(z, t)):
            with FlopCounterMode(display=False) as counter:
                self.chains(keys[:1], want, names)
            start = time.monotonic()
            self.chains(keys, want, names)
            seconds = (time.monotonic() - start) / len(keys)
        calls = self.sampler.calls(names, [want]) * self.samples
        return {"calls": calls, "flops": counter.get_total_flops(), "seconds": seconds}
