"""Predictions from latents and from volumes, chains, and the encoding of a scan."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_sections.data import untrained_model, volumes
from benchmarks.gpu_sections.settings import Settings
from benchmarks.gpu_sections.timing import median_seconds
from mvhpc.config import load_config
from mvhpc.inference.generate import GenerateConfig
from mvhpc.inference.predict import PredictConfig
from mvhpc.inference.predictor import Predictor
from mvhpc.inference.sampler import Sampler
from mvhpc.runtime.devices import resolve_precision
from mvhpc.runtime.randomness import generator
from mvhpc.variables import Categorical
from shards.dataset import open_dataset

WANT = ["age", "sex"]
Job = Callable[[], dict[str, Any]]


def inference(folder: Path, settings: Settings) -> Iterator[tuple[str, Job]]:
    """Section ``inference``, by an untrained joint model of the preset's widths."""
    data = volumes(folder, settings)
    model = untrained_model(folder, settings)
    compute = settings.joint_config(latents="none", vae="none").compute
    query = load_config(PredictConfig, "predict", "default", values={"out": "", "model": "", "data": "", "want": WANT})
    sampler = Sampler(model, query.sampling, compute.device, compute.precision, scalars=True)
    device, volume = sampler.device, sampler.model.variables.volumes[0]
    z = torch.randn(settings.chains, *volume.shape, device=device)  # (B, C, h, w, d)

    def from_latents(rows: int) -> dict[str, Any]:
        def predict() -> list[Any]:
            return [*sampler.posterior({"image": z[:rows]}, rows).laws(WANT).values()]

        for law in predict():
            _finite(law if isinstance(law, Tensor) else law.mean)
        return _per_person(median_seconds(predict, device, 4), rows)

    yield f"{settings.chains} people, from latents", lambda: from_latents(settings.chains)
    yield "one person, from latents", lambda: from_latents(1)

    def from_volumes() -> dict[str, Any]:
        predictor = Predictor(model, data, ["image"], WANT, 1, 0, query.sampling, 0, compute.device, compute.precision)
        keys = open_dataset(data).keys("train")[:1]
        for row in predictor(keys):
            _finite(torch.tensor([row["age"], row["age_sd"]]))
        return _per_person(median_seconds(lambda: predictor(keys), device), 1)

    yield "one person, from a stored volume", from_volumes
    yield "chains with an unknown category, image given", lambda: chains({"image": z}, WANT)
    yield "chains with everything unknown", lambda: chains({}, None)

    sampling = load_config(GenerateConfig, "generate", "default", values={"out": "", "model": ""}).sampling

    def chains(given: dict[str, Tensor], want: list[str] | None) -> dict[str, Any]:
        drawer = Sampler(model, replace(sampling, conditioning="clean"), compute.device, compute.precision)
        noise = [generator(0, "gpu", i) for i in range(settings.chains)]
        drawn = drawer(given, noise, want=want)
        for variable in drawer.model.variables.scalars:
            values = drawn[variable.name]
            _finite(values.float())
            if isinstance(variable, Categorical):
                variable.decode(values)  # raises where there is no such class
        value = median_seconds(lambda: drawer(given, noise, want=want), device, repeat=3)
        return _per_person(value, settings.chains) | {"network_calls": drawer.calls}

    def encode() -> dict[str, Any]:
        precision = resolve_precision(compute.precision, device)
        scan = torch.rand(1, 1, *settings.voxels, device=device)  # (1, 1, H, W, D)

        @torch.inference_mode()
        def job() -> Tensor:
            with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
                return sampler.model.autoencoder.encode(scan)[0]  # (1, C, h, w, d)

        _finite(job())
        return _per_person(median_seconds(job, device), 1)

    yield "encoding of one scan", encode


def _finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise FloatingPointError("a prediction is not finite")


def _per_person(seconds: float, people: int) -> dict[str, Any]:
    assert math.isfinite(seconds)
    return {"people": people, "ms_per_person": 1000 * seconds / people, "people_per_second": people / seconds}
