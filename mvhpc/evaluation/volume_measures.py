"""What is measured of each volume of a set, one volume after the other, so that no set has to fit in memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mvhpc.evaluation.sharpness import sharpness
from mvhpc.evaluation.similarity import ms_ssim
from mvhpc.evaluation.ventricles import deep_fluid_ml
from mvhpc.models.feature_networks import FeatureNetwork
from mvhpc.models.pooled_features import linear_features
from mvhpc.records import cube, pool

SPACING = 4.0  # mm, of the voxels that people are compared by
SMOOTHING = 1.0  # of these voxels
PAIRS = 200  # of volumes whose similarity is measured, at most
Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]


@dataclass(frozen=True)
class Measures:
    """Of N volumes.

    Attributes:
        features: of each plane of the network, (N, S, F).
        voxels: smoothed ones of about 4 mm, left and right averaged, (N, V).
        sharpness: energy of fine detail in each plane, (N, 3).
        fluid: deep inside the brain, ml, (N,).
        similarity: MS-SSIM of each volume and the next one, at most :data:`PAIRS`.
    """

    features: list[Floats32]
    voxels: Floats32
    sharpness: Floats
    fluid: Floats
    similarity: Floats


def compared_voxels(volume: Floats32, grid: Mapping[str, Any]) -> Floats32:
    """The voxels (V,) that people are compared by and read from.

    Args:
        volume: (H, W, D) in [0, 1].
        grid: its ``spacing``, mm.
    """
    pooled = pool(torch.from_numpy(volume)[None, None], cube(grid, SPACING))
    found: Floats32 = linear_features(pooled, SMOOTHING)[0].numpy()
    return found


def measure(volumes: Iterable[Floats32], network: FeatureNetwork, grid: Mapping[str, Any]) -> Measures:
    """Measure each of N volumes (H, W, D) in [0, 1], at least 2 of them.

    Args:
        volumes: in an order of chance, as neighbours are taken as pairs.
        network: whose features are compared.
        grid: of the volumes: ``spacing``, mm.
    """
    features, rows = [], []
    similar: list[float] = []
    before: torch.Tensor | None = None
    for volume in volumes:
        x = torch.from_numpy(np.ascontiguousarray(volume, np.float32))
        features.append([plane[0].numpy() for plane in network(x[None])])
        rows.append((compared_voxels(volume, grid), sharpness(volume), deep_fluid_ml(volume, grid["spacing"])))
        if before is not None and len(similar) < PAIRS:
            similar.append(float(ms_ssim(before[None, None], x[None, None])))
        before = x
    voxels, detail, fluid = map(np.stack, zip(*rows, strict=True))
    planes = [np.stack(plane) for plane in zip(*features, strict=True)]
    return Measures(planes, voxels, detail, fluid, np.array(similar))
