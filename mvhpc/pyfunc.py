"""Opens a model that MLflow stored: ``mlflow.pyfunc.load_model("models:/demo-joint@best").predict(table)``."""

from pathlib import Path
from typing import Any

import pandas as pd

from mvhpc.api import Model, load
from mvhpc.inference.model_signature import SCAN, answers


class PyfuncModel:
    """Predicts scalars from raw scans, in the form that MLflow calls.

    Args:
        model: a trained model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Predict every scalar that is not given, scan by scan.

        Args:
            model_input: N rows. ``scan`` is the path of a NIfTI file; further columns are known scalars, empty where
                they are not known.
            params: none are taken.

        Returns:
            N rows with the columns of :func:`mvhpc.inference.model_signature.answers`; what is given has no answers.

        Raises:
            KeyError: no column ``scan``.
            ConfigError: a column that is no scalar of the model.
        """
        rows = []
        for cells in model_input.to_dict("records"):
            given = {str(name): value for name, value in cells.items() if name != SCAN and not pd.isna(value)}
            rows.append(self.model.predict(cells[SCAN], given))
        return pd.DataFrame(rows, index=model_input.index).reindex(columns=list(answers(self.model.schema)))


def _load_pyfunc(data_path: str) -> PyfuncModel:
    """Called by MLflow with the stored folder."""
    return PyfuncModel(load(Path(data_path)))
