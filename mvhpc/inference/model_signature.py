"""What a trained model takes and answers, as MLflow describes it: a table of scans in, a table of answers out."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mvhpc.inference.prediction_columns import QUANTILES
from mvhpc.models.model_folder import read_any_manifest
from shards.schema import Schema

SCAN, FLAG = "scan", "flag"
LOADER = "mvhpc.pyfunc"
NEEDED = ("mvhpc", "torch", "monai")
TEXT, NUMBER = "string", "double"  # MLflow's types


def describe_model(folder: Path) -> dict[str, Any]:
    """Loader, signature, input example and requirements of a model that predicts scalars from one raw scan.

    Args:
        folder: a ``model`` folder.

    Returns:
        The keys ``loader``, ``signature``, ``example`` and ``requirements`` of
        :func:`mvhpc.runs.mlflow_store.log_model`; nothing for a model that does not predict scalars from one volume.

    Raises:
        ModelError: a damaged ``model.json``.
    """
    meta = read_any_manifest(folder)
    if meta["kind"] != "scalars" and not any(name.startswith("scalars-") for name in meta["networks"]):
        return {}
    schema = Schema.from_dict(meta["schema"])
    if len(schema.volumes) != 1 or not schema.scalars:
        return {}
    given = {v.name: TEXT if v.kind == "categorical" else NUMBER for v in schema.scalars}
    inputs = [{"type": TEXT, "name": SCAN, "required": True}]
    inputs += [{"type": kind, "name": name, "required": False} for name, kind in given.items()]
    outputs = [{"type": kind, "name": name, "required": False} for name, kind in answers(schema).items()]
    return {
        "loader": LOADER,
        "signature": {"inputs": json.dumps(inputs), "outputs": json.dumps(outputs)},
        "example": {SCAN: "sub-01/anat/sub-01_T1w.nii.gz"},
        "requirements": [f"{package}=={version(package)}" for package in NEEDED],
    }


def answers(schema: Schema) -> dict[str, str]:
    """The columns of the answers about every scalar, in order, and MLflow's type of each."""
    found: dict[str, str] = {}
    for v in schema.scalars:
        if v.kind == "categorical":
            found |= {v.name: TEXT, **{f"{v.name}_p_{c}": NUMBER for c in v.classes}}
        else:
            found |= dict.fromkeys([v.name, f"{v.name}_sd", *(f"{v.name}_q{q:02d}" for q in QUANTILES)], NUMBER)
    return found | {FLAG: TEXT}
