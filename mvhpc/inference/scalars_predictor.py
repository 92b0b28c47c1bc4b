"""Predictions for the subjects of a data set by a model of scalars, from voxels or tissue maps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvhpc.config import ConfigError
from mvhpc.evaluation.tables import subject_of
from mvhpc.inference.flags import UNKNOWN, recipe_flag, row_flag
from mvhpc.inference.groups import GroupedPredictor
from mvhpc.inference.law_cells import decode_draws, law_cells
from mvhpc.inference.prediction_tables import Row
from mvhpc.inference.predictor import PredictConfig, check_query
from mvhpc.inference.scalar_inputs import Inputs, check_channels, read_inputs
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.models.scalar_stack import StackPosterior
from mvhpc.models.training_people import TrainingPeople
from mvhpc.models.typicality import COMPONENTS
from mvhpc.records import check_data, scalar_values, true_value
from mvhpc.runtime.devices import one_thread
from mvhpc.runtime.randomness import generator, rand
from mvhpc.variables import Volume
from shards.dataset import open_dataset

RELIABLE = 20  # held-out people, the fewest for calibration


class ScalarsPredictor(GroupedPredictor):
    """Answers one query about any subjects of one data set.

    A given variable that a subject lacks is unknown for this subject. A subject that lacks everything given has no
    answer, and no joint draws, where something is given.

    Args:
        config: data and query.
        model: a model of scalars.

    Raises:
        ConfigError: a query that the model does not take, or data on another grid or without its tissue maps.
    """

    method, calls = "stacking", 1
    group = 1  # a person is read much longer than predicted

    def __init__(self, config: PredictConfig, model: ScalarsModel) -> None:
        if config.sampling.conditioning != "auto" or config.sampling.guidance != 1:
            raise ConfigError(f"{config.model} predicts without chains; leave sampling.conditioning=auto, guidance=1")
        self.config, self.given, self.want = config, list(config.given), list(config.want)
        self.model, self.dataset, self.schema = model, open_dataset(config.data), model.schema
        check_query(self.schema, self.given, self.want)
        check_data(model.grid, self.schema, self.dataset, self.given, self.want)
        self.volumes = [name for name in self.given if self.schema[name].kind == "volume"]
        check_channels(model, self.dataset, self.volumes)
        site = model.meta["site"]
        self.facts = {
            "samples": None,
            "sampling": None,
            "calibrated_on": model.meta["extra"]["calibrated on"],
            "site": site and {"name": site["name"], "people": site["people"], "scalars": list(site["scalars"])},
        }
        self.training = TrainingPeople.read(model.meta)
        self.notes = self._few_people()
        self.notes += [note for name in self.want if (note := model.stack.no_better(name, self.given))]
        self.learnt = self.training.learnt(self.dataset.index)
        self.common_flags = recipe_flag(model.meta["recipe"], self.dataset.index.provenance.get("recipe"))

    def read(self, keys: Sequence[str]) -> Inputs:
        """Pooled volumes, encoded scalars, and which of them are known.

        Raises:
            IntegrityError: a damaged volume, with its record.
        """
        return read_inputs(self.model, self.dataset, keys, self.given)

    @torch.inference_mode()
    @one_thread()  # a row does not depend on the number of threads
    def answer(self, keys: Sequence[str], inputs: Inputs) -> list[Row]:
        """Predictions, one row per subject, in order; joint draws under the key ``draws``, values by variable."""
        model, n = self.model, len(keys)
        rows = [scalar_values(self.dataset, key, self.schema, self.given) for key in keys]
        pooled, values, known = inputs
        posterior = StackPosterior(model.stack, pooled, values, known)
        cells = {}
        for name, law in posterior.laws(self.want).items():
            variable = model.variables[name]
            assert not isinstance(variable, Volume)
            cells[name] = law_cells(variable, law, [true_value(self.dataset, key, self.schema[name]) for key in keys])
        if self.config.draws:
            noise = [generator(self.config.seed, "predict", key, "draws") for key in keys]
            uniform = rand(noise, (self.config.draws, len(self.want))).double().clamp(1e-7, 1 - 1e-7)
            drawn = {
                name: decode_draws(model.variables[name], x, n)
                for name, x in posterior.draw(self.want, uniform).items()
            }
        unusual = self._p_values(posterior, known)
        found: list[Row] = []
        for i, key in enumerate(keys):
            lacking = [name for name in self.given if not known[name][i]]
            answered = not self.given or len(lacking) < len(self.given)
            row: Row = {"key": key, "subject": subject_of(key)}
            for name in self.want:
                own = cells[name][i]
                row |= own if answered and not self.training.uniform(name) else dict.fromkeys(own)
                row[f"{name}_true"] = true_value(self.dataset, key, self.schema[name])
            if self.config.draws:
                row["draws"] = {name: x[i] if answered else () for name, x in drawn.items()}
            p = {name: x[i] for name, x in unusual.items() if known[name][i]}
            row["typicality"] = min((float(x.min()) for x in p.values()), default=None)
            flags = [
                *self.scan_flags(key),
                *(self.common_flags if any(known[name][i] for name in self.volumes) else ()),
                *row_flag(self.schema, self.training, p, rows[i], row, self.want, self.learnt.get(key, "")),
            ]
            row["not_given"] = ",".join(lacking) or None
            row["flag"] = "; ".join(flags if answered else [UNKNOWN]) or "ok"
            found.append(row)
        return found

    def _few_people(self) -> list[str]:
        """Of which wanted scalars the intervals and probabilities rest on few people, in words."""
        site, found = self.model.meta["site"] if self.volumes else None, []
        for name in self.want:
            people = self.model.meta["extra"]["calibrated on"]
            people = min(people, self.training.variables.get(name, {}).get("people", people))
            if site and name in site["scalars"]:
                people = site["people"]
            if people < RELIABLE:
                found.append(
                    f"{name}: calibrated on {people} held-out people; with fewer than {RELIABLE} do not rely on its "
                    "intervals and probabilities"
                )
        return found

    def _p_values(self, posterior: StackPosterior, known: dict[str, Tensor]) -> dict[str, Tensor]:
        """By given volume, the p-values (B, 2) of its distances from the training's people."""
        member, scores = self.model.stack.linear[0], posterior.scores[0]
        return {
            name: self.model.typical[name].p_values(member.components[name].distances(scores[name], COMPONENTS))
            for name in self.volumes
        }
