"""Brain extraction of one scan, as the stage `preprocess` does it by default."""

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_sections.inference import Job, per_person
from benchmarks.gpu_sections.settings import Settings
from benchmarks.gpu_sections.timing import seconds
from shards.preprocess.extraction import deepbet
from shards.preprocess.recipe import Recipe
from shards.preprocess.registration import load_template
from shards.preprocess.requirements import find_device


def extraction(folder: Path, settings: Settings) -> Iterator[tuple[str, Job]]:
    """Section ``extraction``, of the MNI152 template at 1 mm."""
    yield "brain extraction of one scan, deepbet", lambda: extract(settings)


def extract(settings: Settings) -> dict[str, Any]:
    """Time of one brain mask, and its overlap with the template's own."""
    device = find_device("auto")
    network, template = deepbet(device), load_template(None, Recipe())
    mask = network(template.brain).voxels
    own = template.mask.voxels
    dice = 2 * float((mask * own).sum()) / float(mask.sum() + own.sum())
    times = [seconds(lambda: network(template.brain), torch.device(device)) for _ in range(settings.extractions)]
    return per_person(statistics.median(times), 1) | {"dice": dice}
