"""The steps on one scan."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.preprocess import bias, images, registration, tissue
from shards.preprocess.extraction import background, extracted_mask
from shards.preprocess.images import Volume, resample
from shards.preprocess.recipe import Recipe
from shards.preprocess.registration import Template
from shards.volumes import read

Extractor = Callable[[Volume], Volume]


@dataclass(frozen=True)
class Result:
    """A preprocessed scan.

    Attributes:
        image: the brain, background 0.
        mask: 0 or 1.
        tissue: tissue -> probability; empty where the recipe has no such step.
        matrix: (4, 4), mm in the space of the results to mm in the scan's space; None without registration.
        extraction: how the brain was found: ``deepbet``, ``hd-bet``, ``mask``, ``none``.
        figures: brain volume (ml), and of the registration: correlation, overlap, volume ratio of the template to
            the scan.
    """

    image: Volume
    mask: Volume
    tissue: dict[str, Volume]
    matrix: NDArray[np.float64] | None
    extraction: str
    figures: dict[str, float]


def preprocess_scan(
    path: Path,
    recipe: Recipe,
    template: Template | None,
    extract: Extractor | None,
    mask_file: Path | None = None,
) -> Result:
    """Run the steps of the recipe on one scan.

    Args:
        path: of the scan.
        recipe: the steps.
        template: to register to; of a follow-up, the subject's first session in the template's space.
        extract: network that finds the brain.
        mask_file: brain mask on the scan's grid, for the extraction by ``mask``.

    Raises:
        ValueError: the scan cannot be used; the message gives the reason without the path.
    """
    scan = read(path)
    head = Volume(scan.voxels, scan.affine)
    mask, extraction = _brain(head, recipe, extract, mask_file)
    low = min(0.0, float(head.voxels[mask.voxels > 0].min()))
    brain = head.like(np.where(mask.voxels > 0, head.voxels - low, 0))
    if "bias" in recipe.steps:
        brain = bias.correct_bias(brain, mask)
    maps = tissue.tissue_maps(brain, mask) if "tissue" in recipe.steps else {}
    figures = {"brain_ml": float(mask.voxels.sum(dtype=np.float64)) * mask.voxel_ml}
    if "registration" not in recipe.steps or template is None:
        return Result(brain, mask, maps, None, extraction, figures)
    found = registration.register(brain, mask, template, recipe.registration)
    figures |= {
        "correlation": found.correlation,
        "overlap": found.overlap,
        "volume_ratio": 1 / abs(float(np.linalg.det(found.matrix[:3, :3]))),
    }
    shape = template.brain.voxels.shape
    image, inside, *warped = (
        resample(v, template.brain.affine, shape, found.matrix) for v in (brain, mask, *maps.values())
    )
    mask = inside.like(inside.voxels > 0.5)
    image = image.like(np.where(mask.voxels > 0, image.voxels, 0))
    maps = {name: m.like(np.clip(m.voxels, 0, 1)) for name, m in zip(maps, warped)}
    return Result(image, mask, maps, found.matrix, extraction, figures)


def _brain(head: Volume, recipe: Recipe, extract: Extractor | None, mask_file: Path | None) -> tuple[Volume, str]:
    """The brain mask, and how it was found."""
    if head.voxels.min() == head.voxels.max():
        raise ValueError(f"constant volume: all voxels are {head.voxels.flat[0]:g}")
    if "brain" not in recipe.steps or recipe.brain == "none":
        return head.like(head.voxels != background(head.voxels)), "none"
    if recipe.brain == "mask":
        if mask_file is None:
            raise ValueError("no brain mask beside it")
        given = read(mask_file)
        if given.voxels.shape != head.voxels.shape or not np.allclose(given.affine, head.affine, atol=1e-3):
            raise ValueError("its brain mask has another grid")
        if not (given.voxels > 0.5).any():
            raise ValueError("its brain mask is empty")
        return head.like(given.voxels > 0.5), "mask"
    known = extracted_mask(head) if recipe.brain == "auto" else None
    if known is not None:
        return known, "none"
    if extract is None:
        raise ValueError("it is not brain-extracted, and there is no network to do so")
    return extract(head), "deepbet" if recipe.brain == "auto" else recipe.brain


def parameters(recipe: Recipe) -> dict[str, dict[str, object]]:
    """The fixed settings of the steps, for the sidecars."""
    settings: dict[str, dict[str, object]] = {
        "bias": {
            "method": "N4",
            "spacing_mm": bias.SPACING,
            "shrink_factor": bias.SHRINK,
            "iterations": list(bias.ITERATIONS),
            "tolerance": bias.TOLERANCE,
        },
        "registration": {
            "method": f"ANTs {recipe.registration}, Mattes mutual information",
            "spacing_mm": registration.SPACING,
            "seed": images.SEED,
        },
        "tissue": {
            "method": "mixture of normals",
            "components": list(tissue.COMPONENTS),
        },
    }
    return {step: settings[step] for step in recipe.steps if step in settings}
