"""Stage ``calibrate``: a model of scalars for a site that it was not trained on, by some labelled people of that site.

The people's scalars are predicted from their volumes. The calibration of each scalar is applied wherever a volume is
given; see :mod:`mvhpc.models.site_calibration`. Nothing is trained.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mvhpc.config import ConfigError, Device, Tracking, at_least
from mvhpc.diffusion.laws import Law, join, take
from mvhpc.evaluation.tables import subject_of
from mvhpc.inference.sampler import set_threads
from mvhpc.inference.scalar_inputs import read_inputs
from mvhpc.models.bundle import load_model_of_scalars
from mvhpc.models.conformal import FEWEST
from mvhpc.models.scalar_bundle import save_calibrated
from mvhpc.models.scalar_stack import StackPosterior
from mvhpc.models.site_calibration import SiteCalibration, calibrate_site
from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import check_data, scalar_values, subjects
from mvhpc.runs.folder import Run
from mvhpc.runtime.devices import one_thread, resolve_device
from shards.dataset import open_dataset
from shards.files import atomic_folder


@dataclass
class CalibrateConfig:
    """`mvhpc calibrate`."""

    out: str  # a model folder
    model: str
    data: str
    split: str  # train | validation | test | all
    split_name: str  # which recorded split
    site: str  # its name; empty: the name of the folder of the data
    batch: int
    compute: Device
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"batch": self.batch})


@torch.inference_mode()
@one_thread()
def run(config: CalibrateConfig, run: Run) -> dict[str, Any]:
    """Write ``config.out``, a model folder.

    Returns:
        For each calibrated scalar the number of people, the temperature, and of a number the stretch.

    Raises:
        ConfigError: a model that is calibrated already, data without its volumes or tissue maps or on another grid, or
            fewer than ten people with a volume and a scalar.
        FileExistsError: ``config.out`` exists.
    """
    set_threads(config.compute)
    model = load_model_of_scalars(config.model, resolve_device(config.compute.device))
    if model.meta["site"]:
        raise ConfigError(
            f"{config.model} is calibrated for {model.meta['site']['name']} already; give the model that was trained"
        )
    dataset = open_dataset(config.data)
    volumes = [v.name for v in model.variables.volumes if v.name in {w.name for w in dataset.index.schema}]
    if not volumes:
        raise ConfigError(
            f"data={config.data} has no {' or '.join(v.name for v in model.variables.volumes)}, from which the model "
            "predicts; pack data with that volume"
        )
    names = [v.name for v in model.variables.scalars if v.name in {w.name for w in dataset.index.schema}]
    check_data(model.grid, model.schema, dataset, [*volumes, *names])
    keys = subjects(dataset, config.split, config.split_name)
    laws: dict[str, list[Law]] = {name: [] for name in names}
    seen = []
    for first in range(0, len(keys), config.batch):
        pooled, values, known = read_inputs(model, dataset, keys[first : first + config.batch], volumes)
        for name, law in StackPosterior(model.stack, pooled, values, known).laws(names).items():
            laws[name].append(law)
        seen.append(torch.stack([known[name] for name in volumes]).any(0))
    truth, present = model.variables.encode_scalars([scalar_values(dataset, key, model.schema, names) for key in keys])
    found: dict[str, SiteCalibration] = {}
    used: set[str] = set()
    summary: dict[str, Any] = {}
    for name in names:
        rows = (torch.cat(seen) & present[name]).nonzero()[:, 0]
        labelled = {keys[row] for row in rows.tolist()}
        people = len(set(map(subject_of, labelled)))
        if people < FEWEST:
            continue
        used |= labelled
        found[name] = calibrate_site(take(join(laws[name]), rows), truth[name][rows])
        summary |= {f"{name}_people": people, f"{name}_temperature": found[name].temperature}
        if model.schema[name].kind != "categorical":
            summary[f"{name}_stretch"] = found[name].stretch
    if not found:
        raise ConfigError(
            f"data={config.data}: fewer than {FEWEST} people of {config.split} have a volume and one of "
            f"{', '.join(v.name for v in model.variables.scalars)}; label more of them"
        )
    site = {
        "name": config.site or Path(config.data).resolve().name,
        "people": len(set(map(subject_of, used))),
        "data": dataset.index.digest,
        "scalars": {name: dataclasses.asdict(calibration) for name, calibration in found.items()},
    }
    with atomic_folder(Path(config.out)) as part:
        training = TrainingPeople.read(model.meta)
        if training.recorded:
            training = training.and_of(dataset.index, sorted(used))
        save_calibrated(model, part, site, training)
    return summary
