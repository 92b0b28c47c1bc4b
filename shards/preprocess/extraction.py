"""Brain masks: found in the scan itself where it is brain-extracted already, otherwise by a network."""

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from shards.errors import DataError
from shards.foreground import background, faces
from shards.preprocess.images import Volume

CLEAR_FACES = 0.95  # share of the voxels on a volume's faces that are background where the brain is extracted
LARGEST_BRAIN_ML = 2400.0  # with all fluid inside the skull; heads without a neck are larger
WHOLE = 0.95  # share of the foreground in its largest connected part
ALIKE = 0.3  # size of a second part, relative to the largest; parts of one brain that lie apart are smaller


def extracted_mask(scan: Volume) -> Volume | None:
    """The mask of a scan that is brain-extracted already; None where it is not.

    Such a scan has one background value on its faces, and a foreground in one piece that is no larger than a brain.

    Raises:
        ValueError: two objects of similar size lie side by side on such a background; a network would find one of them.
    """
    empty = background(scan.voxels)
    if (faces(scan.voxels) == empty).mean() < CLEAR_FACES:
        return None
    foreground = scan.voxels != empty
    parts, count = ndimage.label(foreground)
    if count == 0:
        return None
    sizes = np.bincount(parts.ravel())[1:]
    if sizes.max() < WHOLE * sizes.sum():
        _check_alone(parts, sizes)
        return None
    if foreground.sum() * scan.voxel_ml > LARGEST_BRAIN_ML:
        return None
    return scan.like(ndimage.binary_fill_holes(parts == 1 + sizes.argmax()))


def _check_alone(parts: NDArray[np.int32], sizes: NDArray[np.int64]) -> None:
    """Refuse two parts of similar size that a plane along the grid can separate: a scalp around its brain is none."""
    second, first = np.argsort(sizes)[-2:]
    boxes = ndimage.find_objects(parts)
    apart = any(a.stop <= b.start or b.stop <= a.start for a, b in zip(boxes[first], boxes[second]))
    if apart and sizes[second] > ALIKE * sizes[first]:
        raise ValueError(
            f"two objects side by side, one {sizes[second] / sizes[first]:.0%} as large as the other: several brains, "
            "or a brain in parts; give each person's whole brain or head a file"
        )


def deepbet(device: str) -> Callable[[Volume], Volume]:
    """A function from a head to its brain mask, by deepbet (Fisch et al., 2024), whose networks come with the package.

    The function raises ValueError where it finds no brain.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    import torch
    from deepbet import BrainExtraction

    network: Any = BrainExtraction(no_gpu=device == "cpu")

    def mask(scan: Volume) -> Volume:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # processes work on other scans at the same time
        try:
            probability = network.run_model(scan.voxels.copy())
            found = network.postprocess(probability > 0.5)
        except (AssertionError, RuntimeError) as error:
            raise ValueError("deepbet finds no brain in it") from error
        finally:
            torch.set_num_threads(threads)
        if not found.any():
            raise ValueError("deepbet finds no brain in it")
        return scan.like(found)

    return mask


def hd_bet(weights: Path, device: str) -> Callable[[Volume], Volume]:
    """A function from a head to its brain mask, by HD-BET 2 (Isensee et al., 2019), a network of nnU-Net.

    The function raises ValueError where it finds no brain.

    Args:
        weights: the zip file of its release, which holds ``plans.json``, ``dataset.json`` and ``fold_all``. Loading it
            runs code that it may hold; check its hash before.
        device: ``cpu`` or ``cuda``.

    Raises:
        DataError: a zip file without exactly one ``plans.json``.
    """
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    network = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=device == "cuda", device=torch.device(device)
    )
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(weights) as archive:
            archive.extractall(folder)
        plans = sorted(Path(folder).rglob("plans.json"))
        if len(plans) != 1:
            raise DataError(f"{weights}: expected one plans.json in it, found {len(plans)}")
        network.initialize_from_trained_model_folder(str(plans[0].parent), ("all",))

    def mask(scan: Volume) -> Volume:
        spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)[::-1]
        labels = network.predict_single_npy_array(  # axes (channel, z, y, x)
            np.ascontiguousarray(scan.voxels.T)[None], {"spacing": list(map(float, spacing))}
        )
        found = np.asarray(labels).T > 0
        if not found.any():
            raise ValueError("HD-BET finds no brain in it")
        return scan.like(found)

    return mask
