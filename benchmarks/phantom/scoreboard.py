"""The model of scalars beside other methods, on phantoms whose exact posterior is known.

    python -m benchmarks.phantom.scoreboard [--root runs/scoreboard] [--markdown FILE]

2,000 training phantoms at 32 cubed, one split for all. Rows: the best possible (the exact posterior), predicting
the mean, 3D DenseNet121 (stage `baseline`, once for each query that gives the image), the paper's procedure (its
design, one shared time, eps, repainting, 3 chains of 50 steps) and ours (stage `scalars`, once for all queries). Stages
that are complete are reused.
"""

import argparse
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap

from benchmarks.phantom.models import METHODS, QUERIES, stages
from benchmarks.phantom.predictions import Floats, Paper, Prediction, constant, densenet, ideal, ours
from mvhpc.config import Sampling
from mvhpc.evaluation.metrics import mean_over_subjects
from mvhpc.evaluation.tables import Table
from mvhpc.runs.folder import read_record
from shards.dataset import open_dataset
from shards.files import write_text

PAPER = Sampling(conditioning="repaint", steps=50, stride=20, solver="ddim", guidance=1.0)
OURS, SLOW, DENSENET = "ours", "the paper's procedure", "DenseNet121"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/scoreboard"))
    parser.add_argument("--slow", type=int, default=200, help="test people that chains are drawn for")
    parser.add_argument("--quick", action="store_true", help="60 people and one epoch, to try the script")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="rows to make")
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    options = parser.parse_args()
    root, started = options.root.resolve(), time.monotonic()
    stages(root, options.quick, options.methods)
    begun = time.monotonic()
    dataset = open_dataset(root / "packed")
    keys = dataset.keys("test")
    truth = {
        "age": np.array([dataset.values(key)["age"] for key in keys], float),
        "sex": np.array([dataset.values(key)["sex"] == "M" for key in keys], float),
    }
    paper = functools.cache(lambda: Paper(root, PAPER, 3))
    every: dict[str, tuple[str, Callable[[str, Sequence[str], Sequence[str]], Prediction | None]]] = {
        "ideal": ("best possible", lambda want, given, k: ideal(root, k, want, given, truth[want][: len(k)])),
        "mean": ("predicting the mean", lambda want, given, k: constant(dataset, len(k), want, truth[want][: len(k)])),
        "densenet": (DENSENET, lambda want, given, k: densenet(root, k, want, given)),
        "paper": (SLOW, lambda want, given, k: paper().predict(k, want, given, truth[want][: len(k)])),
        "ours": (OURS, lambda want, given, k: ours(root, k, want, given, truth[want])),
    }
    methods = dict(every[name] for name in METHODS if name in options.methods)

    predictions: dict[tuple[str, int], Prediction] = {}
    for label, method in methods.items():
        for number, (want, given) in enumerate(QUERIES):
            start = time.monotonic()
            predicted = method(want, given, keys[: options.slow] if label == SLOW else keys)
            took = time.monotonic() - start
            if predicted is not None:
                predictions[label, number] = predicted
                print(f"{label}: {want} given {', '.join(given) or 'nothing'}: {took:.0f} s", flush=True)
    text = report(predictions, list(methods), truth) + minutes(root, begun - started, time.monotonic() - begun)
    print(text)
    if options.markdown:
        write_text(options.markdown, text)


def minutes(root: Path, making: float, predicting: float) -> str:
    """Minutes of every stage (models two at a time), of all predictions, and of this invocation."""
    marks = sorted(root.glob("*/stage.json"), key=lambda path: path.stat().st_mtime)
    took = {path.parent.name.removesuffix(".run"): read_record(path.parent)["seconds"] for path in marks}
    parts = ", ".join(f"{name} {s / 60:.1f}" for name, s in {**took, "predictions": predicting}.items())
    return f"\nMinutes: {parts}; this invocation {(making + predicting) / 60:.0f}.\n"


def scores(predicted: Prediction, want: str, truth: Floats) -> Floats:
    """Absolute errors in years, or hits, per person."""
    n = len(predicted.point)
    if want == "sex":
        return ((predicted.point >= 0.5) == (truth[:n] == 1)).astype(float)
    return np.abs(predicted.point - truth[:n])


def report(predictions: dict[tuple[str, int], Prediction], labels: Sequence[str], truth: dict[str, Floats]) -> str:
    """Three tables in Markdown: errors, distributions, costs; and paired differences."""
    names = [f"{want} given {', '.join(given) or 'nothing'}" for want, given in QUERIES]
    errors, densities, costs = [], [], []
    for label in labels:
        found = [predictions.get((label, number)) for number in range(len(QUERIES))]
        cells = []
        for predicted, (want, _) in zip(found, QUERIES):
            cells.append(mean_over_subjects(scores(predicted, want, truth[want])).format(2) if predicted else "-")
        errors.append([label, *cells])
        cells = []
        for predicted in found[:4]:
            inside = ""
            if predicted and predicted.interval is not None:
                low, high = predicted.interval.T
                t = truth["age"][: len(low)]
                inside = f"{100 * np.mean((low <= t) & (t <= high)):.0f} %"
            score = f"{predicted.crps.mean():.2f}" if predicted and predicted.crps is not None else ""
            cells.append(", ".join(x for x in (inside, score) if x) or "-")
        nothing = found[3]
        densities.append([label, *cells, f"{nothing.sd:.1f}" if nothing else "-"])
        first = found[0]
        if first and first.calls:
            costs.append([label, str(first.calls), f"{first.flops / 1e9:.3g}", f"{1000 * first.seconds:.3g}"])
    tables = [
        Table(["error in years, or accuracy", *names], errors),
        Table(["90 % interval holds, CRPS in years", *names[:4], "SD of p(age)"], densities),
        Table(["per person, age given image and sex", "network calls", "GFLOP", "ms"], costs),
    ]
    lines = [table.markdown() + "\n" for table in tables]
    if {OURS, DENSENET} <= {*labels}:
        lines.append("Ours less DenseNet121, paired over people:\n")
    for number, (want, _) in enumerate(QUERIES):
        if (DENSENET, number) in predictions and (OURS, number) in predictions:
            mine, theirs = (scores(predictions[label, number], want, truth[want]) for label in (OURS, DENSENET))
            lines.append(f"- {names[number]}: {paired(mine, theirs)}")
    return "\n".join(lines) + "\n"


def paired(first: Floats, second: Floats) -> str:
    """Mean difference of two methods' scores of the same people with its 95 % interval."""
    difference = first - second
    result = bootstrap((difference,), np.mean, n_resamples=5000, rng=np.random.default_rng(0), method="percentile")
    low, high = result.confidence_interval
    return f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    main()
