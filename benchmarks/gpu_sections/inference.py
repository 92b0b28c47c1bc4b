"""Predictions of scalars from voxels, draws of scalars, chains of volumes, and the encoding of a scan."""

from collections.abc import Callable, Iterator
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
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.sampler import Sampler
from mvhpc.inference.scalar_draws import draw_scalars
from mvhpc.inference.scalar_inputs import read_inputs
from mvhpc.inference.scalars_predictor import ScalarsPredictor
from mvhpc.models.scalar_stack import StackPosterior
from mvhpc.runtime.devices import one_thread
from mvhpc.runtime.randomness import generator

WANT = ["age", "sex"]
Job = Callable[[], dict[str, Any]]


def inference(folder: Path, settings: Settings) -> Iterator[tuple[str, Job]]:
    """Section ``inference``, by an untrained joint model of the preset's widths and its model of scalars."""
    model = untrained_model(folder, settings)
    predictor, sampler, n = open_scalars(model, folder, settings), open_sampler(model, settings), settings.chains
    yield f"{n} people, from pooled voxels", lambda: from_pooled(predictor, sampler.device, n)
    yield "one person, from pooled voxels", lambda: from_pooled(predictor, sampler.device, 1)
    yield "one person, from a stored volume", lambda: from_volume(predictor, sampler.device)
    yield "age and sex, drawn", lambda: scalars(predictor, sampler.device, n)
    variables = sampler.model.variables
    known, _ = variables.encode_scalars([{"age": 20 + i % 60, "sex": "FM"[i % 2]} for i in range(n)])
    yield "chains of volumes, age and sex given", lambda: chains(sampler, known, n)
    # A category that is not given was once a tensor on the wrong device.
    yield "chains of volumes, nothing given", lambda: chains(sampler, {}, n)
    yield "encoding of one scan", lambda: encode(sampler, settings)


def open_scalars(model: str, folder: Path, settings: Settings) -> ScalarsPredictor:
    """Of age and sex from volumes, by the model of scalars of a joint model."""
    paths = {"out": "", "model": model, "data": volumes(folder, settings)}
    values = paths | {"given": ["image"], "want": WANT}
    predictor = open_predictor(load_config(PredictConfig, "predict", "default", values=values))
    assert isinstance(predictor, ScalarsPredictor)
    return predictor


def open_sampler(model: str, settings: Settings) -> Sampler:
    """Of volumes, as the stage ``generate`` draws them."""
    precision = settings.joint_config(latents="none", vae="none", scalars="none").compute.precision
    values = {"out": "", "model": model, "sampling.conditioning": "clean", "compute.precision": precision}
    return Sampler.of(load_config(GenerateConfig, "generate", "default", values=values))


def from_pooled(predictor: ScalarsPredictor, device: torch.device, n: int) -> dict[str, Any]:
    """Predictive laws of n people whose volumes are in memory."""
    inputs = read_inputs(predictor.model, predictor.dataset, predictor.dataset.keys("train")[:1], ["image"])
    pooled, values, known = ({name: x.repeat_interleave(n, 0) for name, x in part.items()} for part in inputs)

    @torch.inference_mode()
    @one_thread()
    def job() -> list[Any]:
        return [*StackPosterior(predictor.model.stack, pooled, values, known).laws(WANT).values()]

    for law in job():
        check(law if isinstance(law, Tensor) else law.mean)
    return per_person(median_seconds(job, device), n)


def from_volume(predictor: ScalarsPredictor, device: torch.device) -> dict[str, Any]:
    """Rows of predictions from a packed volume, which is read each time."""
    keys = predictor.dataset.keys("train")[:1]
    for row in predictor(keys):
        check(torch.tensor([row["age"], row["age_sd"], row["sex_p_F"]]))
    return per_person(median_seconds(lambda: predictor(keys), device), len(keys))


def scalars(predictor: ScalarsPredictor, device: torch.device, n: int) -> dict[str, Any]:
    """Joint draws of age and sex given nothing, with which the stage ``generate`` begins."""

    def job() -> list[Any]:
        return draw_scalars(predictor.model, {}, [generator(0, "gpu", "scalars", i) for i in range(n)])

    check(torch.tensor([row["age"] for row in job()]))
    return per_person(median_seconds(job, device), n)


def chains(sampler: Sampler, given: dict[str, Tensor], n: int) -> dict[str, Any]:
    """Chains of volumes: every level takes a call of the U-Net."""
    noise = [generator(0, "gpu", i) for i in range(n)]

    def job() -> dict[str, Tensor]:
        return sampler(given, noise)

    for values in job().values():
        check(values.float())
    return per_person(median_seconds(job, sampler.device, repeat=3), n) | {"steps": sampler.calls(given)}


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
