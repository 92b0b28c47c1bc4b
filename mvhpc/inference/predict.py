"""Any question about every subject of a packed data set: some variables given, others wanted.

One row a subject. A wanted number gets its expectation, SD and quantiles, a category the chances of its classes and the
most probable one; where the truth is recorded, the score of the whole distribution (CRPS) too. From chains these are
estimates, such that nine in ten lie in the 90 % interval if the chains are right; a category gets the classes' shares
and the commonest (the paper's majority vote, section 4.2). A baseline answers the one question it was trained for, by a
number alone or by chances.
Noise comes from (seed, key, chain), so a row does not depend on the batch or the worker that made it.
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mvhpc.config import ConfigError
from mvhpc.evaluation.figures import predicted_against_true
from mvhpc.evaluation.tables import coverage, label, read_predictions, score
from mvhpc.inference.predictions import Row, write_predictions
from mvhpc.inference.predictor import PredictConfig, open_predictor
from mvhpc.inference.ray_pool import spread
from mvhpc.inference.sampler import set_threads, versions
from mvhpc.records import subjects
from mvhpc.runs.folder import Run, identity
from shards.progress import Progress

RELIABLE = 20  # people that calibration should rest on


def run(config: PredictConfig, run: Run) -> dict[str, Any]:
    """Stage ``predict``: write ``config.out`` (TSV) and its description (JSON beside it).

    With more than one worker the batches are spread by Ray Data; the rows are the same.

    Returns:
        Per wanted variable the mean absolute error or accuracy with its 95 % interval; for a number with a predicted
        law also how often its 90 % interval holds the truth, and the CRPS; and the throughput.

    Raises:
        ConfigError: a question the model cannot be asked, data on another grid, or nobody to ask about.
    """
    out = Path(config.out)
    if out.suffix != ".tsv":
        raise ConfigError(f"out={config.out}: the answers are a table, name it with .tsv")
    if out.is_dir():
        raise ConfigError(f"out={config.out} is a folder; name the table that is to be written")
    set_threads(config.compute)
    question: dict[str, Any] = {
        "model": str(Path(config.model).resolve()),
        "data": str(Path(config.data).resolve()),
        "given": config.given,
        "want": config.want,
        "samples": config.samples,
        "draws": config.draws,
        "sampling": config.sampling,
        "seed": config.seed,
        "device": config.compute.device,
        "precision": config.compute.precision,
        "compiled": config.compute.compile,
    }
    predictor = open_predictor(**question)
    dataset, schema = predictor.dataset, predictor.schema
    part, keys = config.split, subjects(dataset, config.split, config.split_name)
    asked, calls = f"{', '.join(config.want)} given {label(config.given)}", predictor.calls
    print(f"{asked}: by {predictor.way}, {calls} network call{'s' * (calls > 1)} a subject", file=sys.stderr)
    calibrated = predictor.facts.get("calibrated_on")
    if isinstance(calibrated, int) and calibrated < RELIABLE:
        print(
            f"{asked}: how sure the model may be was measured on {calibrated} people it did not learn from; with "
            f"fewer than {RELIABLE} do not rely on its intervals and probabilities",
            file=sys.stderr,
        )
    batches = [keys[i : i + config.batch] for i in range(0, len(keys), config.batch)]
    start = time.monotonic()
    answers: Iterable[list[Row]]
    if config.compute.workers > 1:
        answers = spread(question, batches, config.compute, run.folder / "logs")
    else:
        answers = map(predictor, batches)
    rows: dict[str, Row] = {}
    with Progress(asked, len(keys), "subject") as bar:
        for answered in answers:
            rows |= {str(row["key"]): row for row in answered}
            bar.update(len(answered))
    seconds = time.monotonic() - start

    description = {
        "given": config.given,
        "want": config.want,
        "part": part,
        "split": config.split_name,
        "model": identity(config.model),
        "data": dataset.index.digest,
        "schema": schema.to_dict(),
        **predictor.facts,
        "network_calls": calls,
        "seed": config.seed,
        "versions": versions(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(out, [rows[key] for key in keys], description)

    summary: dict[str, Any] = {
        "subjects": len(keys),
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
        if held := coverage(frame, name):
            summary |= {f"{part}/{name}_in_90": held.value, f"{part}/{name}_crps": float(frame[f"{name}_crps"].mean())}
        if variable.kind != "categorical":
            with run.figure(f"{name}.png") as path:
                true, predicted, sd = (frame[f"{name}{s}"].to_numpy(float) for s in ("_true", "", "_sd"))
                bars = "; bars: one SD" if np.isfinite(sd).any() else ""
                note = f"given {label(config.given)}\nMAE {result.format(2)}{bars}"
                predicted_against_true(true, predicted, sd, path, name, variable.unit or "", note)
    return summary
