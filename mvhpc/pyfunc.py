"""Opens a model that MLflow stored: ``mlflow.pyfunc.load_model("models:/demo-joint@best").predict(table)``."""

from pathlib import Path
from typing import Any

import pandas as pd

from mvhpc.api import Model, load
from mvhpc.config import ConfigError, choose
from mvhpc.inference.model_signature import FLAG, SCAN, answers


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
            N rows with the columns of :func:`mvhpc.inference.model_signature.answers`; what is given has no answers. A
            row without a scan, or with everything given, has none at all, and ``flag`` says why.

        Raises:
            KeyError: no column ``scan``.
            ConfigError: a column that is no scalar of the model, or two columns of one name.
        """
        if twice := sorted(map(str, model_input.columns[model_input.columns.duplicated()])):
            raise ConfigError(f"{', '.join(twice)}: more than one column of that name; leave one")
        for name in model_input.columns.drop(SCAN):
            choose(str(name), [v.name for v in self.model.schema.scalars], "scalar")
        rows = [
            self._row({str(name): cell for name, cell in cells.items()}) for cells in model_input.to_dict("records")
        ]
        return pd.DataFrame(rows, index=model_input.index).reindex(columns=list(answers(self.model.schema)))

    def _row(self, cells: dict[str, Any]) -> dict[str, Any]:
        """The answers about one scan, whose cells may be empty."""
        known = {name: value for name, value in cells.items() if not pd.isna(value)}
        if SCAN not in known:
            return {FLAG: "no scan"}
        scan = known.pop(SCAN)
        if len(known) == len(self.model.schema.scalars):
            return {FLAG: "nothing to predict: every scalar is given"}
        return self.model.predict(scan, known)


def _load_pyfunc(data_path: str) -> PyfuncModel:
    """Called by MLflow with the stored folder."""
    return PyfuncModel(load(Path(data_path)))
