"""Predictions from latents and from volumes, chains, and the encoding of a scan."""

import copy
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
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.predictor import PredictConfig, Predictor
from mvhpc.inference.sampler import Sampler
from mvhpc.runtime.randomness import generator
from mvhpc.variables import Categorical

WANT = ["age", "sex"]
Job = Callable[[], dict[str, Any]]


def inference(folder: Path, settings: Settings) -> Iterator[tuple[str, Job]]:
    """Section ``inference``, by an untrained joint model of the preset's widths."""
    predictor = untrained_predictor(folder, settings)
    sampler, n = predictor.sampler, settings.chains
    shape = sampler.model.variables.volumes[0].shape
    z = torch.randn(n, *shape, device=sampler.device)  # (B, C, h, w, d)
    keys = predictor.dataset.keys("train")[:1]
    yield f"{n} people, from latents", lambda: from_latents(sampler, z)
    yield "one person, from latents", lambda: from_latents(sampler, z[:1])
    yield "one person, from a stored volume", lambda: from_volume(predictor, keys)
    # A category that is not given was once a tensor on the wrong device.
    yield "chains, image given, age and sex unknown", lambda: chains(sampler, {"image": z}, WANT, n)
    yield "chains, everything unknown", lambda: chains(sampler, {}, None, n)
    yield "encoding of one scan", lambda: encode(sampler, settings)


def untrained_predictor(folder: Path, settings: Settings) -> Predictor:
    """Of age and sex from volumes, by an untrained model."""
    paths = {"out": "", "model": untrained_model(folder, settings), "data": volumes(folder, settings)}
    precision = settings.joint_config(latents="none", vae="none").compute.precision
    query = {"given": ["image"], "want": WANT, "compute.precision": precision}
    predictor = open_predictor(load_config(PredictConfig, "predict", "default", values=paths | query))
    assert isinstance(predictor, Predictor)
    return predictor


def from_latents(sampler: Sampler, z: Tensor) -> dict[str, Any]:
    """Predictive distributions of latents (B, C, h, w, d)."""

    def predict() -> list[Any]:
        return [*sampler.posterior({"image": z}, len(z)).laws(WANT).values()]

    for law in predict():
        check(law if isinstance(law, Tensor) else law.mean)
    return per_person(median_seconds(predict, sampler.device, 4), len(z))


def from_volume(predictor: Predictor, keys: list[str]) -> dict[str, Any]:
    """Predictions from packed volumes, which are read and encoded each time."""
    for row in predictor(keys):
        check(torch.tensor([row["age"], row["age_sd"], row["sex_p_F"]]))
    return per_person(median_seconds(lambda: predictor(keys), predictor.sampler.device), len(keys))


def chains(sampler: Sampler, given: dict[str, Tensor], want: list[str] | None, n: int) -> dict[str, Any]:
    """Chains of the stage ``generate``: every level takes a step of the U-Net and draws categories."""
    sampling = load_config(GenerateConfig, "generate", "default", values={"out": "", "model": ""}).sampling
    drawer = copy.copy(sampler)
    drawer.sampling = replace(sampling, conditioning="clean")
    noise = [generator(0, "gpu", i) for i in range(n)]

    def draw() -> dict[str, Tensor]:
        return drawer(given, noise, want=want)

    drawn, variables = draw(), drawer.model.variables
    for name, values in drawn.items():
        check(values.float())
        variable = variables[name]
        if isinstance(variable, Categorical):
            variable.decode(values)  # raises where there is no such class
    return per_person(median_seconds(draw, drawer.device, repeat=3), n) | {"steps": sampling.steps}


def encode(sampler: Sampler, settings: Settings) -> dict[str, Any]:
    """The latent of one volume, as the stage ``encode`` computes it."""
    device, precision = sampler.device, sampler.precision
    scan = torch.rand(1, 1, *settings.voxels, device=device)  # (1, 1, H, W, D)

    @torch.inference_mode()
    def job() -> Tensor:
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            mean: Tensor = sampler.model.autoencoder.encode(scan)[0]  # (1, C, h, w, d)
        return mean

    check(job().float())
    return per_person(median_seconds(job, device), 1)


def check(values: Tensor) -> None:
    """Raises FloatingPointError where a value is not finite."""
    if not torch.isfinite(values).all():
        raise FloatingPointError("a result is not finite")


def per_person(seconds: float, people: int) -> dict[str, Any]:
    """Times per person of a batch."""
    return {"people": people, "ms_per_person": 1000 * seconds / people, "people_per_second": people / seconds}
