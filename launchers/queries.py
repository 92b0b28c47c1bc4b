"""The variables of a query are checked at submission, as far as the model or the data are there by then."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from launchers.plan import Step
from mvhpc.runtime.importing import resolve
from mvhpc.stages import STAGES
from shards.index import Index
from shards.schema import Schema


def check_queries(steps: Sequence[Step]) -> None:
    """Check each query as its stage does.

    Raises:
        ConfigError: as the stage raises.
    """
    made = {Path(step.config.out).resolve() for step in steps if not step.finished}
    learnt_from = {step.config.data for step in steps if STAGES[step.stage].trains and hasattr(step.config, "data")}
    for step in steps:
        check = STAGES[step.stage].check
        schema = _schema(step, made, learnt_from) if check and not step.finished else None
        if schema is not None:
            resolve(check)(schema, step.config)


def _schema(step: Step, made: set[Path], learnt_from: set[str]) -> Schema | None:
    """The variables of a step's model, else of the data that it learns from; None where these are yet to be made."""
    model = step.config.model if "model" in STAGES[step.stage].inputs else ""
    data = getattr(step.config, "data", "")
    if model and Path(model).resolve() not in made:
        from mvhpc.models.model_folder import ModelError, model_folder, read_any_manifest  # imports torch

        with contextlib.suppress(ModelError):  # its training has not ended yet
            found = read_any_manifest(model_folder(model)).get("schema")
            return Schema.from_dict(found) if found else None
        return None
    if model and data not in learnt_from:
        return None
    there = (Path(data) / "index.json").is_file() and Path(data).resolve() not in made
    return Index.load(data).schema if there else None
