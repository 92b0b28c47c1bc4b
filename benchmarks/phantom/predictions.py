"""Predictions of every method on the scoreboard, and their cost."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.phantom.models import densenet_name
from mvhpc.config import Device, Sampling, load_config
from mvhpc.diffusion.density import crps, quantile
from mvhpc.evaluation import ensembles
from mvhpc.inference.baseline_predictor import BaselinePredictor
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.sampler import Sampler
from mvhpc.models.bundle import JointModel, load
from mvhpc.models.joint_network import JointNetwork
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
        calls, flops, seconds: per person, flops from latents (DenseNet: from voxels).
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
        predictor.predict(*predictor.inputs(keys[:1]))
    point = predicted.numpy() if want == "age" else predicted[:, 1].numpy()
    return Prediction(point, calls=1, flops=counter.get_total_flops(), seconds=seconds)


class Joint:
    """A joint model with one way of sampling, on people whose latents are stored.

    Args:
        model: run folder of a joint model.
        dataset: packed volumes.
        sampling: how a conditional is sampled.
        samples: chains per person, where it is sampled by chains.
        whole: count the cost of the whole U-Net in every call, as in the paper; ours skips what no wanted variable
            needs, which changes no prediction.
    """

    def __init__(
        self, model: Path, dataset: Dataset, sampling: Sampling, samples: int = 1, whole: bool = False
    ) -> None:
        self.sampler = Sampler(load(model, kind=JointModel), sampling, CPU, scalars=True)
        self.dataset, self.latents, self.samples = dataset, open_dataset(model.parent / "latents"), samples
        self.exact, self.whole = sampling.conditioning == "posterior", whole

    def given(self, keys: Sequence[str], names: Sequence[str]) -> dict[str, Tensor]:
        """Encoded values of some variables, one row per person."""
        model = self.sampler.model
        scalars, _ = model.variables.encode_scalars([self.dataset.values(key) for key in keys])
        if "image" in names:
            volume = model.variables.volumes[0]
            stored = [torch.from_numpy(self.latents.read(key, "image").astype(np.float32)) for key in keys]
            scalars["image"] = volume.encode(torch.stack(stored))
        return {name: scalars[name] for name in names}

    def predict(
        self, keys: Sequence[str], want: str, names: Sequence[str], truth: Floats, batch: int = 50
    ) -> Prediction:
        """Predict for all people, in batches, from latents; the autoencoder is not counted."""
        given = self.given(keys, names)
        predict = self.densities if self.exact else self.chains
        parts = []
        for i in range(0, len(keys), batch):
            rows = {name: value[i : i + batch] for name, value in given.items()}
            parts.append(predict(rows, len(keys[i : i + batch]), want, keys[i:]))
        few = 20  # the whole U-Net is slow
        cost = self.cost({name: value[:few] for name, value in given.items()}, min(few, len(keys)), want, keys)
        predicted = np.concatenate(parts)
        if want == "sex":
            return Prediction(predicted, **cost)
        if self.exact:
            mean, sd, low, median, high, score = self.described(predicted, truth)
            whole = float(np.sqrt(np.mean(sd**2) + mean.var()))
            return Prediction(median, np.stack([low, high], 1), score, whole, **cost)
        return Prediction(
            predicted.mean(1),
            ensembles.quantiles(predicted, [0.05, 0.95]),
            ensembles.crps(predicted, truth),
            float(predicted.std()),
            **cost,
        )

    def densities(self, given: dict[str, Tensor], rows: int, want: str, keys: Sequence[str] = ()) -> Floats:
        """Chances of M (rows,), or per person the logits, means and SDs of the density's components."""
        law = self.sampler.posterior(given, rows).laws([want])[want]
        if isinstance(law, Tensor):
            return law[:, 1].numpy()
        parts = law.component_distribution
        return torch.stack([law.mixture_distribution.logits, parts.mean, parts.stddev], 1).numpy()

    def described(self, predicted: Floats, truth: Floats) -> tuple[Floats, Floats, Floats, Floats, Floats, Floats]:
        """Mean, SD, 5 %, 50 % and 95 % quantiles and CRPS, in years, of the densities that :meth:`densities` found."""
        age = self.sampler.model.variables["age"]
        assert isinstance(age, Continuous)
        logits, means, sds = torch.from_numpy(predicted).unbind(1)
        law = MixtureSameFamily(Categorical(logits=logits), Normal(means, sds))
        scale, z = (age.high - age.low) / 2, age.encode(truth.tolist())[:, 0].double()
        points = quantile(law, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
        years = [age.decode(law.mean), law.stddev * scale, *(age.decode(points[:, i]) for i in range(3))]
        return tuple(x.numpy() for x in [*years, crps(law, z) * scale])  # type: ignore[return-value]

    def chains(self, given: dict[str, Tensor], rows: int, want: str, keys: Sequence[str] = ()) -> Floats:
        """Ages (rows, samples) in years, or the share of M (rows,)."""
        n, variable = self.samples, self.sampler.model.variables[want]
        repeated = {name: value.repeat_interleave(n, 0) for name, value in given.items()}
        noise = [generator(0, "scoreboard", key, chain) for key in keys[:rows] for chain in range(n)]
        drawn = self.sampler(repeated, noise, want=[want])[want]
        if isinstance(variable, Continuous):
            return variable.decode(drawn).reshape(rows, n).numpy()
        return drawn.double().reshape(rows, n).mean(1).numpy()

    def cost(self, given: dict[str, Tensor], rows: int, want: str, keys: Sequence[str]) -> dict[str, Any]:
        """Network calls, FLOPs and seconds per person, for a batch of ``rows`` people."""
        model = self.sampler.model
        calls = self.sampler.calls(given, [want]) * (1 if self.exact else self.samples)
        if self.whole:
            self.sampler.model = replace(model)
            vars(self.sampler.model)["network"] = AllOutputs(model.network)  # in place of the cached property
        predict = self.densities if self.exact else self.chains
        with FlopCounterMode(display=False) as counter:
            predict({name: value[:1] for name, value in given.items()}, 1, want, keys)
        start = time.monotonic()
        predict(given, rows, want, keys)
        seconds = (time.monotonic() - start) / rows
        self.sampler.model = model
        return {"calls": calls, "flops": counter.get_total_flops(), "seconds": seconds}


class AllOutputs:
    """The joint model's networks, which compute all outputs, whatever is wanted."""

    def __init__(self, network: JointNetwork) -> None:
        self.network = network

    def __call__(self, z: dict[str, Tensor], t: dict[str, Tensor], want: Sequence[str]) -> dict[str, Tensor]:
        return self.network(z, t)
