"""Models and packed data from Python: ``mvhpc.load(MODEL).predict(scan)``, ``.generate()``, ``mvhpc.open_dataset``."""

import csv
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.analyze import AnalyzeImage
from nibabel.spatialimages import SpatialImage
from numpy.typing import ArrayLike

from mvhpc.config import choose, load_config
from mvhpc.inference.generate import GenerateConfig, draw_people
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.sampler import Sampler, parse_given
from mvhpc.models.bundle import BaselineModel, JointModel, load_model_of_scalars
from mvhpc.models.bundle import load as load_model
from mvhpc.models.model_folder import ModelError
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.models.training_people import TrainingPeople
from mvhpc.runtime.devices import resolve_device
from mvhpc.scans import Request, predict_scans
from shards.dataset import Dataset, open_dataset
from shards.participant_rows import ID, PATH
from shards.schema import Schema, Value

SUBJECT = "sub-scan"


@dataclass(frozen=True)
class Model:
    """A trained model: of scalars, which predicts scalars of people, or joint, which draws synthetic ones too; or a
    baseline, which answers one query about people of a packed data set.

    Attributes:
        path: its run folder.
        device: ``auto``, ``cpu`` or ``cuda``.
        schema: its variables.
    """

    path: str
    device: str
    schema: Schema

    def predict(
        self,
        scan: str | Path | SpatialImage | ArrayLike,
        given: Mapping[str, Value] | None = None,
        want: Sequence[str] = (),
        affine: ArrayLike | None = None,
    ) -> dict[str, Any]:
        """Predict scalars of one person from a raw scan, preprocessed as the scans that the model was trained on.

        Args:
            scan: a file, an image of nibabel, or voxels (X, Y, Z) with ``affine``.
            given: known scalars by name, as ``{"sex": "F"}``.
            want: variables to predict; all other scalars where empty.
            affine: (4, 4), voxel to mm in RAS; of an array alone.

        Returns:
            The columns of a table of ``mvhpc predict``: of a number ``NAME`` (mean), ``NAME_sd`` and quantiles
            ``NAME_q05`` to ``NAME_q95`` in its unit; of a category the most probable class and ``NAME_p_CLASS``;
            ``flag``: ``ok``, or what is doubtful. Without an answer a cell is None, and the flag says why.

        Raises:
            ConfigError: an unknown variable, or a given one that is no scalar.
            ModelError: a model without a model of scalars.
            DataError: a missing package of the preprocessing.
            ValueError: an array without a usable affine or of complex numbers, a file or image with
                one, or an image in the Analyze format.
        """
        given, want = dict(given or {}), _names(want)
        scalars = self._scalars
        for name in given:
            choose(name, [v.name for v in scalars.schema.scalars], "scalar")
        volume = scalars.variables.volumes[0].name
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "scan.nii.gz"
            if isinstance(scan, str | Path | SpatialImage) and affine is not None:
                raise ValueError("affine is of voxels alone; a file or an image has its own: correct that one")
            if isinstance(scan, str | Path):
                path = Path(scan).absolute()
            elif isinstance(scan, SpatialImage):
                if isinstance(scan, AnalyzeImage) and not isinstance(scan, nib.Nifti1Pair):
                    raise ValueError("in the Analyze format, which does not tell left from right: convert it to NIfTI")
                nib.save(_unscaled(scan), path)
            else:
                if affine is None:
                    raise ValueError("voxels need their affine, (4, 4), voxel to mm in RAS")
                if np.iscomplexobj(scan):
                    raise ValueError("complex voxels, expected real ones: give their magnitude")
                place = np.asarray(affine, float)
                if place.shape != (4, 4) or not np.isfinite(place).all():
                    raise ValueError(f"an affine of shape {place.shape}, expected (4, 4), of finite numbers")
                nib.save(nib.Nifti1Image(np.asarray(scan, np.float32), place), path)
            columns = {scalars.schema[name].column: value for name, value in given.items()}
            with (Path(folder) / "scans.csv").open("w", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerows([[ID, PATH, *columns], [SUBJECT, path, *columns.values()]])
            source, out = Path(folder) / "scans.csv", Path(folder) / "out"
            request = Request(source, out, self.path, given=[volume, *given], want=want, workers=1)
            ((row,), _) = predict_scans(request, scalars)
        return {name: value for name, value in row.items() if name not in {"key", "subject"}}

    @cached_property
    def _scalars(self) -> ScalarsModel:
        return load_model_of_scalars(self.path, resolve_device(self.device))

    def predict_people(
        self, data: Dataset | str | Path, given: Sequence[str], want: Sequence[str], keys: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """Predict scalars of people of a packed data set, as ``mvhpc predict`` does with its defaults.

        What is known of the quality of the answers is printed on stderr.

        Args:
            data: the data set, or its folder.
            given: names of the known variables.
            want: names of the scalars to predict.
            keys: of the records; all where None.

        Returns:
            A row for each key, with the columns of a table of ``mvhpc predict``.

        Raises:
            ConfigError: a query that the model does not take, data on another grid, or an unknown key.
        """
        dataset = data if isinstance(data, Dataset) else open_dataset(data)
        given, want = _names(given), _names(want)
        wanted = dataset.keys() if keys is None else _names(keys)
        for key in wanted:
            choose(key, dataset.keys(), "key")
        values = {"model": self.path, "data": str(dataset.folder), "out": "", "split": "all", "given": given}
        values |= {"want": want, "compute.device": self.device}
        config = load_config(PredictConfig, "predict", values=values)
        predict = open_predictor(config)
        for note in predict.notes:
            print(f"{', '.join(want)}: warning: {note}", file=sys.stderr)
        return [row for i in range(0, len(wanted), config.batch) for row in predict(wanted[i : i + config.batch])]

    def generate(self, count: int = 1, given: Mapping[str, Value] | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """Draw synthetic people, as ``mvhpc generate`` does with its defaults.

        A given value beyond those of the training's people is named on stderr.

        Args:
            count: how many.
            given: scalars with fixed values, as ``{"age": 70, "sex": "F"}``.
            seed: of the noise; person i of a seed is always the same.

        Returns:
            Variable -> value of each person: volumes (H, W, D) float32 in [0, 1], numbers in their unit, class names.

        Raises:
            ConfigError: a count below one, an unknown variable, or a value that the schema does not allow.
            ModelError: a model of scalars, which draws no volumes.
        """
        values = {"model": self.path, "out": "", "count": count, "seed": seed, "compute.device": self.device}
        config = load_config(GenerateConfig, "generate", values=values)
        fixed = parse_given(self.schema, {name: str(value) for name, value in (given or {}).items()})
        sampler = Sampler.of(config)
        for warning in TrainingPeople.read(sampler.model.meta).beyond(fixed, self.schema):
            print(f"people: warning: {warning}", file=sys.stderr)
        return list(draw_people(sampler, config.count, fixed, config.seed, config.batch))


def load(path: str | Path, device: str = "auto") -> Model:
    """Open a model of scalars, a joint model or a baseline.

    Args:
        path: its run folder, or the ``model`` folder in it.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ModelError: no such model, one of another kind, or a damaged one.
    """
    model = load_model(path, resolve_device(device))
    if not isinstance(model, ScalarsModel | JointModel | BaselineModel):
        raise ModelError(f"{path}: give the run folder of stage scalars or joint, or of a baseline")
    return Model(str(path), device, model.schema)


def _unscaled(image: SpatialImage) -> SpatialImage:
    """An image whose file holds the voxels as they are: nibabel saves integers with a scale on another one, rounded."""
    voxels = np.asanyarray(image.dataobj)
    if voxels.dtype.kind not in "iuf":
        return image  # its file is refused
    header = image.header if isinstance(image, nib.Nifti1Pair) else None
    return nib.Nifti1Image(voxels.astype(np.float32), image.affine, header, dtype=np.float32)


def _names(names: str | Sequence[str]) -> list[str]:
    """Names as a list; one name may be given as it is."""
    return [names] if isinstance(names, str) else list(names)
