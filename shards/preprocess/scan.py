"""The steps on one scan."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.foreground import background, tissue_bounds
from shards.nifti import read
from shards.preprocess import bias, images, registration, tissue
from shards.preprocess.extraction import extracted_mask
from shards.preprocess.images import Volume, resample
from shards.preprocess.recipe import Recipe
from shards.preprocess.registration import Template
from shards.qc.figures import measure
from shards.qc.limits import T1W, verdict, violated
from shards.qc.registered import compare

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
        figures: of quality control, by :mod:`shards.qc`: of the scan as it is, of the brain (``brain.``) and of the
            registration; of the registration also the volume of the template relative to the scan's.
        flags: the figures that violate a limit.
        suspect: whether the scan would be rejected if suspect scans were not kept.
    """

    image: Volume
    mask: Volume
    tissue: dict[str, Volume]
    matrix: NDArray[np.float64] | None
    extraction: str
    figures: dict[str, float]
    flags: list[str]
    suspect: bool


def preprocess_scan(
    path: Path,
    recipe: Recipe,
    template: Template | None,
    extract: Extractor | None,
    mask_file: Path | None = None,
    suffix: str = T1W,
    keep_suspect: bool = False,
) -> Result:
    """Run the steps of the recipe on one scan, and check it before and after them.

    Args:
        path: of the scan.
        recipe: the steps.
        template: to register to; of a follow-up, the subject's first session in the template's space.
        extract: network that finds the brain.
        mask_file: brain mask on the scan's grid, for the extraction by ``mask``.
        suffix: of the scan in BIDS; limits of T1-weighted intensities hold for ``T1w`` alone.
        keep_suspect: go on with a scan that fails quality control, and flag the result.

    Raises:
        ValueError: the scan cannot be used or fails quality control; the message gives the reason without the path.
    """
    scan = read(path)
    head = Volume(_without_outliers(scan.voxels, scan.voxels != background(scan.voxels)), scan.affine)
    quality = _Quality(suffix, keep_suspect)
    quality.add(scan.figures(), head=True)
    mask, extraction = _brain(head, recipe, extract, mask_file)
    head = head.like(_without_outliers(head.voxels, mask.voxels > 0))
    low = min(0.0, float(head.voxels[mask.voxels > 0].min()))
    brain = head.like(np.where(mask.voxels > 0, head.voxels - low, 0))
    if "bias" in recipe.steps:
        brain = bias.correct_bias(brain, mask)
    unextracted = "brain" not in recipe.steps or recipe.brain == "none"
    quality.add(measure(brain.voxels, brain.affine), head=unextracted, prefix="brain.")
    maps = tissue.tissue_maps(brain, mask) if "tissue" in recipe.steps else {}
    if "registration" not in recipe.steps or template is None:
        return Result(brain, mask, maps, None, extraction, quality.figures, quality.flags, quality.suspect)
    matrix = registration.register(brain, mask, template, recipe.registration)
    shape = template.brain.voxels.shape
    image, inside, *warped = (resample(v, template.brain.affine, shape, matrix) for v in (brain, mask, *maps.values()))
    mask = inside.like(inside.voxels > 0.5)
    image = image.like(np.where(mask.voxels > 0, image.voxels, 0))
    maps = {name: m.like(np.clip(m.voxels, 0, 1)) for name, m in zip(maps, warped)}
    fit = compare(image.voxels, mask.voxels > 0, template.brain.voxels, template.mask.voxels > 0, recipe.registration)
    quality.add(fit | {"volume_ratio": 1 / abs(float(np.linalg.det(matrix[:3, :3])))})
    return Result(image, mask, maps, matrix, extraction, quality.figures, quality.flags, quality.suspect)


def _without_outliers(voxels: NDArray[np.float32], inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The same with dead pixels, spikes and overflows inside of a mask cut to the lowest or highest tissue there."""
    values = voxels[inside]
    if not values.size:
        return voxels
    lowest, highest = tissue_bounds(values)
    tissue = values[(values >= lowest) & (values <= highest)]
    return np.where(inside, np.clip(voxels, tissue.min(), tissue.max()), voxels)


class _Quality:
    """Quality control of one scan, step by step.

    Attributes:
        figures: all figures so far.
        flags: names of figures that violate a limit.
        suspect: whether one of these limits rejects.
    """

    def __init__(self, suffix: str, keep_suspect: bool) -> None:
        self.suffix, self.keep_suspect = suffix, keep_suspect
        self.figures: dict[str, float] = {}
        self.flags: list[str] = []
        self.suspect = False

    def add(self, figures: dict[str, float], *, head: bool = False, prefix: str = "") -> None:
        """Add figures.

        Raises:
            ValueError: they are outside of their limits, and suspect scans are not kept.
        """
        self.figures |= {prefix + name: value for name, value in figures.items()}
        reasons = verdict(figures, self.suffix, head, extracted=not head)
        if reasons and not self.keep_suspect:
            raise ValueError("; ".join(reasons))
        self.suspect |= bool(reasons)
        limits = violated(figures, self.suffix, head) + violated(figures, self.suffix, head, rejects=False)
        self.flags += [prefix + limit.figure for limit in limits]


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
