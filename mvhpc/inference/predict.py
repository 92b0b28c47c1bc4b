"""Stage ``predict``: any scalars of every subject of a packed data set, given any variables.

One row per subject. A wanted number has its mean, SD and quantiles, a category the probabilities of its classes and the
most probable one; where the true number is recorded, the CRPS of the predicted distribution too. From chains these are
estimates: intervals cover as often as they say if the chains are exact; a category has the classes' frequencies and
the most frequent (the paper's majority vote, section 4.2). A baseline takes the one query it was trained for, and
predicts a number alone or class probabilities. Noise is a function of (seed, key, chain), and network calls have one
size (:mod:`mvhpc.inference.groups`), so that no bit of a row depends on the batch, the order or the worker. An
interrupted query continues from the rows on disk.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mvhpc.config import ConfigError
from mvhpc.evaluation.against_mean import compare
from mvhpc.evaluation.figures import predicted_against_true
from mvhpc.evaluation.tables import coverage, label, read_predictions, score, sidecar
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.parquet import write_parquet
from mvhpc.inference.prediction_tables import without_answer, write_predictions
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.rows import ROWS, answer_everybody
from mvhpc.inference.sampler import versions
from mvhpc.inference.scalars_predictor import ScalarsPredictor
from mvhpc.inference.selection import Selection
from mvhpc.models.training_people import TrainingPeople
from mvhpc.runs.folder import Run, identity
from shards.schema import Variable


def run(config: PredictConfig, run: Run) -> dict[str, Any]:
    """Stage ``predict``: write ``config.out`` (TSV), its description (JSON) and its rows in full precision (Parquet).

    With several workers there is a Ray actor per device; the rows are the same. While the query is being answered, its
    rows are in ``rows`` in the run folder. A subject that fails has a row without answers and with the reason.

    Returns:
        For each wanted variable the mean absolute error or accuracy with its 95 % interval; for a number with a
        predicted distribution also the coverage of its 90 % interval and the mean CRPS; the same score of predicting
        the mean or the most frequent class, and the gain over it; how many were answered, left out and failed; and
        subjects per second.

    Raises:
        ConfigError: a query that the model does not take, data on another grid, an empty part, or nobody could be
            answered.
    """
    out = Path(config.out)
    if out.suffix != ".tsv":
        raise ConfigError(f"out={config.out}: predictions are a table, name it with .tsv")
    if out.is_dir():
        raise ConfigError(f"out={config.out} is a folder; name a TSV file")
    predictor = open_predictor(config)
    dataset, schema = predictor.dataset, predictor.schema
    selection = Selection.of(dataset, config.split, config.split_name, predictor.training)
    selection.warnings.extend(predictor.notes)
    part, keys = selection.part, selection.keys
    query, calls = f"{', '.join(config.want)} given {label(config.given)}", predictor.calls
    print(f"{query}: by {predictor.method}, {calls} network call{'s' * (calls > 1)} per subject", file=sys.stderr)
    selection.warn(query)
    description = {
        "given": config.given,
        "want": config.want,
        "part": part,
        "warnings": selection.warnings,
        "split": config.split_name,
        "model": identity(config.model),
        "data": dataset.index.digest,
        **predictor.facts,
        "network_calls": calls,
        "seed": config.seed if config.draws or predictor.facts["samples"] else None,
        "versions": versions(networks=not isinstance(predictor, ScalarsPredictor)),
    }
    rows, failed, rate = answer_everybody(config, predictor, keys, query, description, run)
    unanswered = dict(without_answer(rows.values(), config.want))
    print(f"{query}: {selection.words(unanswered)}", file=sys.stderr)
    description["answered"] = selection.describe(unanswered)
    out.parent.mkdir(parents=True, exist_ok=True)
    table = [rows[key] for key in keys]
    write_parquet(out.with_suffix(".parquet"), table, schema, config.want)
    write_predictions(out, table, schema, description)
    for file in (out, sidecar(out)):
        run.keep(file, "predictions")

    summary: dict[str, Any] = {
        "subjects": len(keys),
        "answered": len(keys) - len(unanswered),
        "left_out": sum(map(len, selection.left_out.values())) + len(unanswered),
        "failed": len(failed),
        "network_calls": calls,
        "system/samples_per_second": rate,
    }
    frame, _ = read_predictions(out)
    for name in config.want:
        variable = schema[name]
        result = score(frame, variable)
        if result is None or not result.n:
            continue
        metric = f"{part}/{name}_{'accuracy' if variable.kind == 'categorical' else 'mae'}"
        summary |= {metric: result.value, f"{metric}_low": result.low, f"{metric}_high": result.high}
        summary |= _beside_constant(frame, variable, predictor.training, metric)
        if held := coverage(frame, name):
            summary |= {f"{part}/{name}_in_90": held.value, f"{part}/{name}_crps": float(frame[f"{name}_crps"].mean())}
        if variable.kind != "categorical":
            with run.figure(f"{name}.png") as path:
                columns = (frame.get(f"{name}{s}") for s in ("_true", "", "_q05", "_q95"))
                true, mean, low, high = (
                    np.full(len(frame), np.nan) if c is None else c.to_numpy(float) for c in columns
                )
                bars = "\nbars: 90 % intervals" if np.isfinite(low).any() else ""
                note = f"given {label(config.given)}, n = {result.n}\nMAE {result.format(2)}{bars}"
                predicted_against_true(true, mean, (low, high), path, name, variable.unit or "", note)
    shutil.rmtree(run.folder / ROWS)
    return summary


def _beside_constant(
    frame: pd.DataFrame, variable: Variable, training: TrainingPeople, metric: str
) -> dict[str, float]:
    """Print and return how a model compares with the mean, or the most frequent class, of its training people."""
    constant = training.constant(variable.name)
    found = None if constant is None else compare(frame, [constant] * len(frame), variable)
    if found is None:
        return {}
    print(found.text(), file=sys.stderr)
    gain = {f"{metric}_gain{end}": value for end, value in zip(("", "_low", "_high"), found.gain.interval)}
    return {f"{metric}_of_mean": found.constant.value, **gain}
