"""Stage ``calibrate``: a model of scalars for a site that it was not trained on, by some labelled people of that site.

The people's scalars are predicted from their volumes. The calibration of each scalar is applied wherever a volume is
given; see :mod:`mvhpc.models.site_calibration`. Nothing is trained. People from whom the model learnt are left out: its
errors about them are smaller than about new people. A scalar of which all people have one value is not calibrated. A
number that is predicted no better for people who are left out than by the mean of the others is shifted alone: its
stretch would make all answers alike.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mvhpc.config import ConfigError, Device, Tracking, at_least
from mvhpc.diffusion.laws import Law, join, take
from mvhpc.evaluation.against_mean import AgainstMean, compare
from mvhpc.evaluation.tables import subject_of
from mvhpc.inference.flags import recipe_flag
from mvhpc.inference.sampler import set_threads
from mvhpc.inference.scalar_inputs import read_inputs
from mvhpc.inference.selection import few
from mvhpc.models.bundle import load_model_of_scalars
from mvhpc.models.conformal import FEWEST
from mvhpc.models.scalar_bundle import ScalarsModel, save_calibrated
from mvhpc.models.scalar_stack import StackPosterior
from mvhpc.models.site_calibration import SiteCalibration, calibrate_site, left_out_errors
from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import check_data, scalar_values, subjects
from mvhpc.runs.folder import Run
from mvhpc.runtime.devices import one_thread, resolve_device
from mvhpc.variables import Continuous
from shards.dataset import Dataset, open_dataset
from shards.files import atomic_folder
from shards.schema import Variable


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
            no scalar that can be calibrated, by ten people with a volume who are no people of the model's training.
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
    training = TrainingPeople.read(model.meta)
    keys = _new_people(subjects(dataset, config.split, config.split_name), dataset, training)
    differs = recipe_flag(model.meta["recipe"], dataset.index.provenance.get("recipe"))
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
    reasons: list[str] = []
    summary: dict[str, Any] = {}
    for name in names:
        rows = (torch.cat(seen) & present[name]).nonzero()[:, 0]
        labelled = {keys[row] for row in rows.tolist()}
        people = len(set(map(subject_of, labelled)))
        if people < FEWEST:
            reasons.append(f"{name}: {people} new people have it and a volume, {FEWEST} are needed")
            continue
        law, labels = take(join(laws[name]), rows), truth[name][rows]
        calibration = _calibrate(model, name, law, labels, [keys[row] for row in rows.tolist()], differs)
        if isinstance(calibration, str):
            reasons.append(calibration)
            continue
        used |= labelled
        found[name] = calibration
        if calibration.note:
            _warn(calibration.note)
        summary |= {f"{name}_people": people, f"{name}_temperature": found[name].temperature}
        if model.schema[name].kind != "categorical":
            summary[f"{name}_stretch"] = found[name].stretch
    if not found:
        raise ConfigError(f"data={config.data}: nothing can be calibrated. {'; '.join(reasons)}")
    for reason in reasons:
        _warn(f"not calibrated: {reason}")
    site = {
        "name": config.site or Path(config.data).resolve().name,
        "people": len(set(map(subject_of, used))),
        "data": dataset.index.digest,
        "scalars": {name: dataclasses.asdict(calibration) for name, calibration in found.items()},
    }
    with atomic_folder(Path(config.out)) as part:
        if training.recorded:
            training = training.and_of(dataset.index, sorted(used))
        save_calibrated(model, part, site, training)
    return summary


def _new_people(keys: Sequence[str], dataset: Dataset, training: TrainingPeople) -> list[str]:
    """The records of people from whom the model did not learn; the others are named in a warning.

    Raises:
        ConfigError: it learnt from all of them.
    """
    if not training.recorded:
        _warn("the model does not say from whom it learnt; calibrated by these people, its intervals may be too narrow")
    learnt = {subject_of(key) for key in training.learnt(dataset.index)}
    left_out = [key for key in keys if subject_of(key) in learnt]
    if left_out:
        _warn(f"{len(left_out)} of {len(keys)} are left out, as the model learnt from them ({few(left_out)})")
    if len(left_out) == len(keys):
        raise ConfigError(f"data={dataset.folder}: the model learnt from all of these people; calibrate by others")
    return [key for key in keys if subject_of(key) not in learnt]


def _warn(text: str) -> None:
    print(f"calibrate: warning: {text}", file=sys.stderr)


def _calibrate(
    model: ScalarsModel, name: str, law: Law, truth: Tensor, keys: Sequence[str], doubts: Sequence[str]
) -> SiteCalibration | str:
    """The calibration of a scalar, or why there is none.

    Args:
        model: that predicted.
        name: of the scalar.
        law: predicted for N visits.
        truth: z_0 (N, 1), or classes (N,).
        keys: of the visits.
        doubts: about all scans.
    """
    if (truth == truth[0]).all():
        return f"{name}: all people have one value, from which nothing is learnt about others"
    variable, doubts, stretched = model.variables[name], list(doubts), True
    if isinstance(variable, Continuous):
        beside = _beside_mean(variable, model.schema[name], law, truth, keys)
        text = f"calibrated by {beside.own.n} people, each left out in turn: {beside.text()}"
        stretched = beside.gain.value > 0
        if not stretched:
            text += "; so answers are shifted alone: check the labels, and whether the people differ enough"
        if beside.better:
            print(text, file=sys.stderr)
        else:
            doubts.append(text)
    note = f"{name}: {'; '.join(doubts)}" if doubts else ""
    return dataclasses.replace(calibrate_site(law, truth, stretched), note=note)


def _beside_mean(variable: Continuous, recorded: Variable, law: Law, truth: Tensor, keys: Sequence[str]) -> AgainstMean:
    """The error of a calibration by the others, about each person, beside that of the others' mean.

    Args:
        variable: what is predicted.
        recorded: the same, of the schema.
        law: predicted for N visits.
        truth: z_0 (N, 1).
        keys: of the visits.
    """
    assert not isinstance(law, Tensor)
    half = (variable.high - variable.low) / 2
    values = variable.decode(truth).numpy()
    errors = half * left_out_errors(law.mean.numpy(), truth[:, 0].double().numpy())
    people = [subject_of(key) for key in keys]
    frame = pd.DataFrame({"subject": people, variable.name: values - errors, f"{variable.name}_true": values})
    found = compare(frame, list((values.sum() - values) / (len(values) - 1)), recorded)
    assert found is not None
    return found
