"""Seconds by step, Dice of tissues and of brain masks, and registration, on real scans.

    python -m benchmarks.preprocess.scans speed --heads HEADS
    python -m benchmarks.preprocess.scans tissue --oasis OASIS
    python -m benchmarks.preprocess.scans brain --heads HEADS --extracted IXI

Seconds are process time of one thread. Tissue maps are compared with label maps (1 CSF, 2 grey, 3 white) in
OASIS/derivatives/tissues, people on whose scans the settings were chosen left out.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shards.nifti import read
from shards.preprocess.bias import correct_bias
from shards.preprocess.extraction import deepbet, extracted_mask
from shards.preprocess.images import Volume, ants_library, resample, to_ants
from shards.preprocess.recipe import Recipe
from shards.preprocess.registration import Template, load_template, register
from shards.preprocess.tissue import tissue_maps
from shards.qc.registered import compare

T = TypeVar("T")
CHOSEN_ON = {  # of OASIS, seen when the settings of N4 and of the mixture were chosen
    *("10040", "10061", "10101", "10113", "10145", "10156", "10220", "10239", "10282", "10300", "10353", "10456"),
}
LABELS = {"CSF": 1, "GM": 2, "WM": 3}


def load(path: Path) -> Volume:
    scan = read(path)
    return Volume(scan.voxels, scan.affine)


def timed(seconds: dict[str, float], step: str, function: Callable[[], T]) -> T:
    start = time.process_time()
    result = function()
    seconds[step] = time.process_time() - start
    return result


def resample_all(volumes: list[Volume], template: Template, transform: NDArray[np.float64]) -> list[Volume]:
    return [resample(v, template.brain.affine, template.brain.voxels.shape, transform) for v in volumes]


def dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def speed(heads: Path, count: int = 2) -> None:
    """Heads at 1 mm, every step; results at 1 mm."""
    network = deepbet("cpu")
    template = load_template(None, Recipe())
    for path in sorted(heads.glob("sub-*/anat/*_T1w.nii.gz"))[:count]:
        coarse = load(path)
        step = np.linalg.norm(coarse.affine[:3, :3], axis=0)
        size = [int(n * s) for n, s in zip(coarse.voxels.shape, step)]
        head = resample(coarse, coarse.affine @ np.diag([*(1 / step), 1.0]), (size[0], size[1], size[2]))
        seconds: dict[str, float] = {}
        mask = timed(seconds, "brain", partial(network, head))
        brain = head.like(head.voxels * mask.voxels)
        brain = timed(seconds, "bias", partial(correct_bias, brain, mask))
        for kind in ("rigid", "affine"):
            found = timed(seconds, kind, partial(register, brain, mask, template, kind))
            at = template.brain.affine, template.brain.voxels.shape, found
            theirs = resample(brain, *at).voxels, resample(mask, *at).voxels > 0.5
            fit = compare(*theirs, template.brain.voxels, template.mask.voxels > 0, kind)
            print(f"{path.name} {kind}: {fit}")
        maps = timed(seconds, "tissue", partial(tissue_maps, brain, mask))
        timed(seconds, "resampling", partial(resample_all, [brain, mask, *maps.values()], template, found))
        print(f"{path.name} {size}: " + ", ".join(f"{step} {s:.1f} s" for step, s in seconds.items()), flush=True)


def tissue(oasis: Path) -> None:
    scores: dict[str, list[list[float]]] = {"mixture": [], "Atropos": []}
    for path in sorted(oasis.glob("sub-*/ses-1/anat/*_T1w.nii.gz")):
        if path.name.removeprefix("sub-OAS").partition("_")[0] in CHOSEN_ON:
            continue
        scan = load(path)
        mask = extracted_mask(scan)
        if mask is None:
            raise SystemExit(f"{path}: not brain-extracted")
        corrected = correct_bias(scan, mask)
        name = path.name.replace("T1w", "desc-csf1gm2wm3_dseg")
        truth = load(oasis / "derivatives" / "tissues" / path.relative_to(oasis).with_name(name)).voxels
        inside = mask.voxels > 0
        maps = tissue_maps(corrected, mask)
        guess = 1 + np.stack([maps[name].voxels for name in LABELS]).argmax(0)
        for method, labels in (("mixture", guess), ("Atropos", atropos(corrected, mask))):
            found = [dice(inside & (labels == number), truth == number) for number in LABELS.values()]
            scores[method].append(found)
            print(path.name, method, " ".join(f"{t} {x:.3f}" for t, x in zip(LABELS, found)), flush=True)
    for method, rows in scores.items():
        mean, sd = np.mean(rows, 0), np.std(rows, 0, ddof=1)
        print(
            f"{method}, {len(rows)} people: "
            + ", ".join(f"{t} {m:.3f} (SD {x:.3f})" for t, m, x in zip(LABELS, mean, sd))
        )


def atropos(brain: Volume, mask: Volume) -> NDArray[np.float32]:
    """Labels by ANTs Atropos from k-means, with a Markov random field; the brightest and darkest voxels clipped."""
    inside = mask.voxels > 0
    clipped = np.clip(brain.voxels, *np.percentile(brain.voxels[inside], (0.5, 99.5)))
    image, region = to_ants(brain.like(np.where(inside, clipped, 0))), to_ants(mask)
    labels: NDArray[np.float32] = (
        ants_library().atropos(image, region, i="Kmeans[3]", m="[0.1,1x1x1]", c="[5,0]")["segmentation"].numpy()
    )
    return labels.round()


def brain(heads: Path, extracted: Path) -> None:
    network = deepbet("cpu")
    scores = []
    for path in sorted(heads.glob("sub-*/anat/*_T1w.nii.gz")):
        found, theirs = network(load(path)), load(extracted / path.relative_to(heads))
        truth = resample(theirs.like(theirs.voxels > 0), found.affine, found.voxels.shape).voxels > 0.5
        scores.append(dice(found.voxels > 0, truth))
        volumes = [float(m.sum()) * found.voxel_ml for m in (found.voxels > 0, truth)]
        print(f"{path.name} Dice {scores[-1]:.3f}, {volumes[0]:.0f} and {volumes[1]:.0f} ml", flush=True)
    print(f"{len(scores)} heads: mean {np.mean(scores):.3f}, least {min(scores):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "tissue", "brain"])
    parser.add_argument("--heads", type=Path, help="BIDS folder of whole heads")
    parser.add_argument("--extracted", type=Path, help="BIDS folder of the same people's brains")
    parser.add_argument("--oasis", type=Path, help="BIDS folder of brains with label maps of tissues")
    args = parser.parse_args()
    if args.what == "speed":
        speed(args.heads)
    elif args.what == "tissue":
        tissue(args.oasis)
    else:
        brain(args.heads, args.extracted)


if __name__ == "__main__":
    main()
