"""Predictions from Python: ``mvhpc.load(MODEL).predict(scan)``."""

import csv
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike

from mvhpc.bids_app import Request, predict_scans
from mvhpc.models.bundle import load as load_model
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.runtime.devices import resolve_device
from shards.participants import ID, PATH
from shards.schema import Value

SUBJECT = "sub-scan"


@dataclass(frozen=True)
class Model:
    """A trained model that answers questions about single scans.

    Attributes:
        path: its run folder.
        scalars: the model.
    """

    path: str
    scalars: ScalarsModel

    def predict(
        self,
        scan: str | Path | ArrayLike,
        given: Mapping[str, Value] | None = None,
        want: Sequence[str] = (),
        affine: ArrayLike | None = None,
    ) -> dict[str, Any]:
        """Predict scalars of one person from a raw scan, preprocessed as the scans that the model was trained on.

        Args:
            scan: a file, or voxels (X, Y, Z) with ``affine``.
            given: known scalars by name, as ``{"sex": "F"}``.
            want: variables to predict; all other scalars where empty.
            affine: (4, 4), voxel to mm in RAS; of an array alone.

        Returns:
            The columns of a table of ``mvhpc predict``: of a number ``NAME`` (mean), ``NAME_sd`` and quantiles
            ``NAME_q05`` to ``NAME_q95`` in its unit; of a category the most probable class and ``NAME_p_CLASS``;
            ``flag``: ``ok``, or what is doubtful. Without an answer a cell is None, and the flag says why.

        Raises:
            ConfigError: an unknown variable.
            DataError: a missing package of the preprocessing.
            ValueError: an array without affine.
        """
        given = dict(given or {})
        volume = self.scalars.variables.volumes[0].name
        with tempfile.TemporaryDirectory() as folder:
            if isinstance(scan, str | Path):
                path = Path(scan).absolute()
            else:
                path = Path(folder) / "scan.nii.gz"
                if affine is None:
                    raise ValueError("voxels need their affine, (4, 4), voxel to mm in RAS")
                nib.save(nib.Nifti1Image(np.asarray(scan, np.float32), np.asarray(affine, float)), path)
            columns = {self.scalars.schema[name].column: value for name, value in given.items()}
            with (Path(folder) / "scans.csv").open("w", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerows([[ID, PATH, *columns], [SUBJECT, path, *columns.values()]])
            source, out = Path(folder) / "scans.csv", Path(folder) / "out"
            request = Request(source, out, self.path, given=[volume, *given], want=want, workers=1)
            ((row,), _) = predict_scans(request, self.scalars)
        return {name: value for name, value in row.items() if name not in {"key", "subject"}}


def load(path: str | Path, device: str = "auto") -> Model:
    """Open a model of scalars.

    Args:
        path: its run folder, or the ``model`` folder in it.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        ModelError: no such model, or a damaged one.
    """
    return Model(str(path), load_model(path, resolve_device(device), kind=ScalarsModel))
