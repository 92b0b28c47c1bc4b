"""Stage ``translate``: one volume of every subject from other variables, such as a missing contrast.

Where a subject has the wanted volume, the drawn one is compared with it.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from mvhpc.config import ConfigError, Device, Sampling, Tracking, at_least, choose, to_dict
from mvhpc.evaluation.figures import DIFFERENCE, difference, gallery, slices
from mvhpc.evaluation.similarity import psnr, ssim
from mvhpc.evaluation.tables import label, subject_of
from mvhpc.inference.flags import UNKNOWN
from mvhpc.inference.geometry import nifti, place_of_record
from mvhpc.inference.prediction_tables import derivative, write_rows
from mvhpc.inference.sampler import Sampler, read_given, versions
from mvhpc.inference.selection import Selection
from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import check_data, check_names
from mvhpc.runs.folder import Run, identity
from mvhpc.runtime.randomness import generator
from shards.dataset import Dataset, open_dataset
from shards.files import atomic_folder, write_text
from shards.progress import progress
from shards.schema import Schema

SHOWN = 4  # subjects in the figure


@dataclass
class TranslateConfig:
    """`mvhpc translate`: one volume of every subject given others."""

    out: str
    model: str
    data: str
    split: str  # train | validation | test | all | auto
    split_name: str
    given: list[str]
    want: str
    batch: int
    seed: int
    sampling: Sampling
    compute: Device
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"batch": self.batch})


def check_query(schema: Schema, config: TranslateConfig) -> None:
    """Refuse a query that a model with these variables does not take.

    Raises:
        ConfigError: as :func:`~mvhpc.records.check_names`; or what is wanted is no volume.
    """
    choose(config.want, [v.name for v in schema.volumes], "volume")
    check_names(schema, config.given, [config.want])


def run(config: TranslateConfig, run: Run) -> dict[str, Any]:
    """Stage ``translate``: write ``config.want`` of every subject to ``config.out``, a BIDS derivative.

    A volume lies where the subject's own scan of that contrast lies, otherwise where the first given volume does; its
    sidecar says where. ``scores.tsv`` lists for each subject the given variables that it lacks, which are unknown then,
    and, where it has the wanted volume, PSNR (dB) and SSIM of the drawn one. Who lacks everything given is left out.

    Returns:
        The number of subjects, the number of those with all given variables, and over these the mean PSNR (dB) and
        SSIM.

    Raises:
        ConfigError: a query that the model does not take, data on another grid, an empty part, or one whose people
            all lack everything given.
        FileExistsError: ``config.out`` exists.
    """
    sampler = Sampler.of(config)
    dataset, schema = open_dataset(config.data), sampler.model.schema
    check_query(schema, config)
    check_data(sampler.model.grid, schema, dataset, config.given, [config.want])
    training = TrainingPeople.read(sampler.model.meta)
    selection = Selection.of(dataset, config.split, config.split_name, training)
    query = f"{config.want} given {label(config.given)}"
    lost = (key for key in selection.keys if config.given and not _knows_any(dataset, key, config.given))
    unanswered = dict.fromkeys(lost, UNKNOWN)
    keys = [key for key in selection.keys if key not in unanswered]
    if not keys:
        raise ConfigError(f"data={config.data}: {UNKNOWN} of any of these people ({label(config.given)})")
    selection.warn(query)
    known = [config.want, *(name for name in config.given if schema[name].kind == "volume")]
    places = {key: place_of_record(dataset.index.grid, schema, dataset.record(key), known) for key in keys}
    if not all(place.known for place in places.values()):
        print(
            f"{query}: warning: {dataset.folder} was packed by an earlier version and does not record where scans lie; "
            "volumes are written in the coordinates of the grid: pack again to place them on the scans",
            file=sys.stderr,
        )
    wanted = schema[config.want]
    scores: list[list[Any]] = []  # key, what was not given, PSNR, SSIM
    shown: list[list[Any]] = []
    with atomic_folder(Path(config.out)) as tree:
        batches = range(0, len(keys), config.batch)
        for start in progress(batches, query, unit="batch"):
            part = keys[start : start + config.batch]
            given, present = read_given(sampler, dataset, part, config.given)
            noise = [generator(config.seed, "translate", key) for key in part]
            drawn = sampler(given, noise, present, want=[config.want])
            with torch.inference_mode():
                voxels = sampler.model.decode(config.want, drawn[config.want]).float().cpu()  # (B, 1, H, W, D)
            for i, (key, made) in enumerate(zip(part, voxels)):
                subject = subject_of(key)
                folder = tree.joinpath(subject, key.removeprefix(subject).lstrip("_"), "anat")
                folder.mkdir(parents=True)
                lacking = ",".join(name for name in config.given if not present[name][i]) or None
                place = places[key]
                name = place.name(key, wanted.suffix)
                nib.save(nifti(made[0].numpy(), place.affine), folder / f"{name}.nii.gz")
                beyond = training.beyond({n: dataset.values(key).get(n) for n in config.given}, schema)
                sidecar = {
                    "Description": f"Drawn given {label(config.given)}, not measured.",
                    "SpatialReference": place.reference,
                    "NotGiven": lacking,
                    "Warnings": [text for text in [*beyond, selection.learnt.get(key, "")] if text],
                }
                write_text(folder / f"{name}.json", json.dumps(sidecar, indent=1))
                scores.append([key, lacking, None, None])
                if dataset.has(key, config.want):
                    true = torch.from_numpy(dataset.read(key, config.want).astype(np.float32))
                    scores[-1][2:] = (f(made[None], true[None, None]).item() for f in (psnr, ssim))
                    if len(shown) < SHOWN and not lacking:
                        shown.append([key, true.numpy(), made[0].numpy()])
        about = derivative(
            f"{config.want} drawn from a generative model given {label(config.given)}",
            Description="These volumes were drawn, not measured.",
            Model=identity(config.model),
            Data=dataset.index.digest,
            Given=config.given,
            Part=selection.part,
            Answered=selection.describe(unanswered),
            Warnings=selection.warnings,
            Sampling=to_dict(sampler.sampling),
            Seed=config.seed,
            Packages=versions(),
        )
        write_text(tree / "dataset_description.json", json.dumps(about, indent=1))
        write_rows(tree / "scores.tsv", ["key", "not_given", "psnr_db", "ssim"], scores)
    print(f"{query}: {selection.words(unanswered)}", file=sys.stderr)
    complete = [row for row in scores if row[1] is None]
    left_out = sum(map(len, selection.left_out.values())) + len(unanswered)
    summary: dict[str, Any] = {"subjects": len(keys), "left_out": left_out, "with_all_given": len(complete)}
    if measured := [row[2:] for row in complete if row[2] is not None]:
        summary |= dict(zip(("psnr_db", "ssim"), np.mean(measured, 0).tolist()))
        with run.figure("translation.png") as path:
            rows = [[slices(true), slices(made)] for _, true, made in shown]
            for row in rows:
                row.append(difference(*row))
            captions = [[key, key, ""] for key, *_ in shown]
            title = f"{len(shown)} of {len(keys)} people"
            spacing = sampler.model.grid["spacing"]
            gallery(rows, path, captions, ["measured", "drawn", DIFFERENCE], title, spacing)
    return summary


def _knows_any(dataset: Dataset, key: str, names: Sequence[str]) -> bool:
    """Whether any of these variables is known of a person."""
    values = dataset.values(key)
    return any(dataset.has(key, name) or values.get(name) is not None for name in names)
