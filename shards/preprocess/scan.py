"""The steps on one scan."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.preprocess.bias import correct_bias
from shards.preprocess.extraction import background, extracted_mask
from shards.preprocess.images import Volume, resample
from shards.preprocess.recipe import Recipe
from shards.preprocess.registration import Template, register
from shards.preprocess.tissue import tissue_maps
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
        sha256: of the scan's file.
        extraction: how the brain was found: ``deepbet``, ``hd-bet``, ``mask``, ``none``.
        figures: brain volume (ml), and of the registration: correlation, overlap, volume ratio of the template to
            the scan.
    """

    image: Volume
    mask: Volume
    tissue: dict[str, Volume]
    matrix: NDArray[np.float64] | None
    sha256: str
    extraction: str
    figures: dict[str, float] = field(default_factory=dict)


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
        brain = correct_bias(brain, mask)
    tissue = tissue_maps(brain, mask) if "tissue" in recipe.steps else {}
    figures = {"brain_ml": float(mask.voxels.sum(dtype=np.float64)) * mask.voxel_ml}
    if "registration" not in recipe.steps or template is None:
        return Result(brain, mask, tissue, None, scan.sha256, extraction, figures)
    found = register(brain, mask, template, recipe.registration)
    figures |= {
        "correlation": found.correlation,
        "overlap": found.overlap,
        "volume_ratio": 1 / abs(float(np.linalg.det(found.matrix[:3, :3]))),
    }
    shape = template.brain.voxels.shape
    image, inside, *maps = (
        resample(v, template.brain.affine, shape, found.matrix)  # type: ignore[arg-type]
        for v in (brain, mask, *tissue.values())
    )
    mask = inside.like(inside.voxels > 0.5)
    image = image.like(np.where(mask.voxels > 0, image.voxels, 0))
    tissue = {name: m.like(np.clip(m.voxels, 0, 1)) for name, m in zip(tissue, maps)}
    return Result(image, mask, tissue, found.matrix, scan.sha256, extraction, figures)


def _brain(
    head: Volume, recipe: Recipe, extract: Extractor | None, mask_file: Path | None
) -> tuple[Volume, str]:
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
