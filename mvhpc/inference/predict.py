"""Stage ``predict``: any scalars of every subject of a packed data set, given any variables.

One row per subject. A wanted number has its mean, SD and quantiles, a category the probabilities of its classes and the
most probable one; where the true number is recorded, the CRPS of the predicted distribution too. From chains these are
estimates: intervals cover as often as they say if the chains are exact; a category has the classes' frequencies and
the most frequent (the paper's majority vote, section 4.2). A baseline takes the one query it was trained for, and
predicts a number alone or class probabilities. Noise is a function of (seed, key, chain), so a row does not depend on
the batch or the worker.
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mvhpc.config import ConfigError
from mvhpc.evaluation.against_mean import compare
from mvhpc.evaluation.figures import predicted_against_true
from mvhpc.evaluation.tables import coverage, label, read_predictions, score, sidecar
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.prediction_tables import Row, without_answer, write_predictions
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.ray_pool import map_batches
from mvhpc.inference.sampler import set_threads, versions
from mvhpc.inference.scalars_predictor import ScalarsPredictor
from mvhpc.inference.selection import Selection
from mvhpc.models.training_people import TrainingPeople
from mvhpc.runs.folder import Run, identity
from shards.progress import Progress
from shards.schema import Variable

RELIABLE = 20  # held-out people, the fewest for calibration


def run(config: PredictConfig, run: Run) -> dict[str, Any]:
    """Stage ``predict``: write ``config.out`` (TSV) and its description (JSON beside it).

    With several workers Ray Data distributes the batches; the rows are the same.

    Returns:
        For each wanted variable the mean absolute error or accuracy with its 95 % interval; for a number with a
        predicted distribution also the coverage of its 90 % interval and the mean CRPS; the same score of predicting
        the mean or the most frequent class, and the gain over it; how many were answered and left out; and subjects per
        second.

    Raises:
        ConfigError: a query that the model does not take, data on another grid, or an empty part.
    """
    out = Path(config.out)
    if out.suffix != ".tsv":
        raise ConfigError(f"out={config.out}: predictions are a table, name it with .tsv")
    if out.is_dir():
        raise ConfigError(f"out={config.out} is a folder; name a TSV file")
    set_threads(config.compute)
    predictor = open_predictor(config)
    dataset, schema = predictor.dataset, predictor.schema
    selection = Selection.of(dataset, config.split, config.split_name, predictor.training)
    part, keys = selection.part, selection.keys
    query, calls = f"{', '.join(config.want)} given {label(config.given)}", predictor.calls
    print(f"{query}: by {predictor.method}, {calls} network call{'s' * (calls > 1)} per subject", file=sys.stderr)
    calibrated = predictor.facts.get("calibrated_on")
    if isinstance(calibrated, int) and calibrated < RELIABLE:
        print(
            f"{query}: calibrated on {calibrated} held-out people; with fewer than {RELIABLE} do not rely on its "
            "intervals and probabilities",
            file=sys.stderr,
        )
    selection.warn(query)
    batches = [keys[i : i + config.batch] for i in range(0, len(keys), config.batch)]
    start = time.monotonic()
    predictions: Iterable[list[Row]]
    if config.compute.workers > 1:
        predictions = map_batches(config, batches, run.folder / "logs")
    else:
        predictions = map(predictor, batches)
    rows: dict[str, Row] = {}
    with Progress(query, len(keys), "subject") as bar:
        for predicted in predictions:
            rows |= {str(row["key"]): row for row in predicted}
            bar.update(len(predicted))
    seconds = time.monotonic() - start
    unanswered = without_answer(rows.values(), config.want)
    print(f"{query}: {selection.words(unanswered)}", file=sys.stderr)

    description = {
        "given": config.given,
        "want": config.want,
        "part": part,
        "answered": selection.describe(unanswered),
        "warnings": selection.warnings,
        "split": config.split_name,
        "model": identity(config.model),
        "data": dataset.index.digest,
        **predictor.facts,
        "network_calls": calls,
        "seed": config.seed if config.draws or predictor.facts["samples"] else None,
        "versions": versions(networks=not isinstance(predictor, ScalarsPredictor)),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(out, [rows[key] for key in keys], schema, description)
    for table in (out, sidecar(out)):
        run.keep(table, "predictions")

    summary: dict[str, Any] = {
        "subjects": len(keys),
        "answered": len(keys) - len(unanswered),
        "left_out": sum(map(len, selection.left_out.values())) + len(unanswered),
        "network_calls": calls,
        "system/samples_per_second": len(keys) / seconds,
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
