"""Ages and sexes of real people from their scans, by cross-validation, across sites, and after calibration.

    python -m benchmarks.real.answers runs/real --same sub-IXI383,sub-IXI384 \\
        --site ixi=DERIVATIVE --site oasis=DERIVATIVE --site ds002748=DERIVATIVE

Derivatives are those of ``shards preprocess`` with tissue maps, of two sites at least. The first site is
cross-validated in ten folds; trained on the first, and on all but the last, the last is predicted, and again after
calibration by random halves of its people; all sites together are cross-validated in five folds. The yardstick is ridge
regression on the tissue maps, its strength by cross-validation within the training people. Writes ``answers.md`` and
what it is made of to the folder; finished trainings are reused. ``benchmarks.real.tables`` has further yardsticks.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.real.sites import SPACING, packed
from mvhpc.config import load_config
from mvhpc.diffusion.density import quantile
from mvhpc.diffusion.laws import take
from mvhpc.execute import execute, plan
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.scalar_inputs import read_inputs
from mvhpc.models.bundle import load
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.models.scalar_stack import StackPosterior
from mvhpc.models.site_calibration import calibrate_site
from mvhpc.records import channels_of, read_pooled
from mvhpc.training.scalars import ScalarsConfig
from mvhpc.variables import Continuous
from shards.dataset import Dataset

QUERIES = {"age": ["image"], "age2": ["image", "sex"], "sex": ["image"], "sex2": ["image", "age"]}
STRENGTHS = np.logspace(-1, 6, 15)
DRAWS = 10_000  # of a bootstrap
BATCH = 32  # records predicted at a time
Floats = NDArray[np.float64]


def train(data: Dataset, split: str, out: Path, options: argparse.Namespace) -> Path:
    """The run folder of the model of scalars, trained on a split's training and validation part."""
    values: dict[str, Any] = {"data": str(data.folder), "split": split, "out": str(out), "schema": ""}
    execute(plan("scalars", load_config(ScalarsConfig, "scalars", "default", options.overrides, values)))
    return out


def predict(model: Path, data: Dataset, keys: Sequence[str], queries: Sequence[str]) -> pd.DataFrame:
    """Predictions for some records; the columns of each query with its name in front."""
    frames = []
    for query in queries:
        values = {
            "model": str(model),
            "data": str(data.folder),
            "given": QUERIES[query],
            "want": [query[:3]],
            "out": "unused.tsv",
        }
        answer = open_predictor(load_config(PredictConfig, "predict", "default", (), values))
        rows = [row for first in range(0, len(keys), BATCH) for row in answer(keys[first : first + BATCH])]
        frames.append(pd.DataFrame(rows).set_index("key").add_prefix(f"{query}/"))
    return pd.concat(frames, axis=1)


def ridge(old: Dataset, seen: Sequence[str], new: Dataset, keys: Sequence[str]) -> pd.DataFrame:
    """Ages and sexes of records of one data set by ridge regression on the tissue maps of records of another."""

    def read(data: Dataset, of: Sequence[str]) -> Floats:
        arrays = channels_of(data.index, "image")
        return np.stack([read_pooled(data, key, arrays, SPACING).numpy().ravel() for key in of]).astype(float)

    def values(name: str) -> list[Any]:
        return [old.values(key)[name] for key in seen]

    x, target = read(old, seen), read(new, keys)
    age = make_pipeline(StandardScaler(with_std=False), RidgeCV(STRENGTHS)).fit(x, np.array(values("age"), float))
    sex = make_pipeline(StandardScaler(with_std=False), RidgeClassifierCV(STRENGTHS)).fit(x, values("sex"))
    return pd.DataFrame({"ridge/age": age.predict(target), "ridge/sex": sex.predict(target)}, index=list(keys))


def cross_validate(data: Dataset, folds: int, out: Path, options: argparse.Namespace) -> pd.DataFrame:
    """Everybody's predictions by models that were not trained on them."""
    parts = []
    for k in range(1, folds + 1):
        split, folder = f"fold-{k}-of-{folds}", out / f"fold-{k}"
        model = train(data, split, folder / "scalars", options)
        frame = predict(model, data, data.keys("test", split), list(QUERIES))
        seen = [key for part in ("train", "validation") for key in data.keys(part, split)]
        frame = frame.join(ridge(data, seen, data, data.keys("test", split)))
        parts.append(frame)
        print(f"{out.name}: {k} of {folds} folds", file=sys.stderr)
    return pd.concat(parts)


def persons(frame: pd.DataFrame) -> NDArray[Any]:
    """The subject of each row; follow-ups count as one with their first visit."""
    return np.array([key.split("_")[0] for key in frame.index])


def interval(values: Floats, subjects: NDArray[Any]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by bootstrap over subjects."""
    means = pd.Series(values).groupby(subjects).mean().to_numpy()
    draws = np.random.default_rng(0).integers(len(means), size=(DRAWS, len(means)))
    low, high = np.quantile(means[draws].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def errors(frame: pd.DataFrame, column: str) -> Floats:
    """Absolute errors of ages, or hits of sexes."""
    truth = frame["age/age_true" if "age" in column.rsplit("/")[-1] else "sex/sex_true"]
    if "age" in column.rsplit("/")[-1]:
        return np.asarray((frame[column].astype(float) - truth.astype(float)).abs(), float)
    return np.asarray(frame[column] == truth, float)


def covered(frame: pd.DataFrame, query: str) -> Floats:
    """Whether the 90 % interval holds the age."""
    low, high, truth = (frame[f"{query}/age_{c}"].astype(float) for c in ("q05", "q95", "true"))
    return np.asarray((low <= truth) & (truth <= high), float)


def flagged(frame: pd.DataFrame) -> float:
    """The share of scans that are unlike those of the training."""
    return float(frame["age/flag"].str.contains("unlike").mean())


@dataclass(frozen=True)
class Calibrated:
    """Means over random halves of a site's people, one half used for calibration and the other predicted."""

    error: float
    coverage: float


def calibrate_halves(model: Path, data: Dataset, halves: int = 20) -> Calibrated:
    """Predict half of a site's people after calibration by the other half."""
    found = load(model, kind=ScalarsModel)
    age = found.variables["age"]
    assert isinstance(age, Continuous)
    keys = data.keys()
    with torch.inference_mode():
        pooled, values, known = read_inputs(found, data, keys, ["image"])
        law = StackPosterior(found.stack, pooled, values, known).laws(["age"])["age"]
    ages = [float(data.values(key)["age"] or 0) for key in keys]
    truth = age.encode(ages)
    measured = []
    for half in range(halves):
        order = torch.from_numpy(np.random.default_rng(half).permutation(len(keys)))
        first, second = order[: len(keys) // 2], order[len(keys) // 2 :]
        calibration = calibrate_site(take(law, first), truth[first])
        after = calibration.apply(take(law, second), torch.ones(len(second), dtype=torch.bool))
        assert not isinstance(after, torch.Tensor)
        ends = quantile(after, torch.tensor([0.05, 0.95], dtype=torch.float64))
        y = truth[second, 0].double()
        error = (age.decode(after.mean) - age.decode(y)).abs().mean()
        measured.append((float(error), float(((ends[:, 0] <= y) & (y <= ends[:, 1])).double().mean())))
    error, coverage = np.mean(measured, 0)
    return Calibrated(float(error), float(coverage))


def table(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    """Rows of ages and sexes by method, for each set of people."""
    lines = [
        "| people | method | age error, years | 90 % interval holds | sex accuracy | scans flagged |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, frame in frames.items():
        who = persons(frame)
        for method, age, sex in (
            ("model, given image", "age/age", "sex/sex"),
            ("model, given image and the other scalar", "age2/age", "sex2/sex"),
            ("ridge", "ridge/age", "ridge/sex"),
        ):
            a, b = interval(errors(frame, age), who), interval(errors(frame, sex), who)
            own = age.startswith("age")
            holds = f"{100 * covered(frame, age[:-4]).mean():.0f} %" if own else ""
            flags = f"{100 * flagged(frame):.1f} %" if age == "age/age" else ""
            cells = f"{a[0]:.2f} [{a[1]:.2f}, {a[2]:.2f}] | {holds} | {b[0]:.3f} [{b[1]:.3f}, {b[2]:.3f}] | {flags}"
            lines.append(f"| {name} ({len(set(who))}) | {method} | {cells} |")
    return lines


def differences(frame: pd.DataFrame) -> list[str]:
    """The model's scores less those of ridge regression, on the same people."""
    lines = []
    for want, what in (("age", "age error"), ("sex", "sex accuracy")):
        difference = errors(frame, f"{want}/{want}") - errors(frame, f"ridge/{want}")
        mean, low, high = interval(difference, persons(frame))
        lines.append(f"- {what} less that of ridge: {mean:+.2f} [{low:+.2f}, {high:+.2f}]")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--site", action="append", required=True, metavar="NAME=DERIVATIVE")
    parser.add_argument("--same", action="append", default=[], metavar="A,B", help="subjects that are one person")
    parser.add_argument("--skip-together", action="store_true", help="leave out the folds of all sites together")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the stage scalars")
    return parser.parse_intermixed_args()


def main() -> None:
    options = parse()
    sites = {name: Path(path) for name, _, path in (text.partition("=") for text in options.site)}
    same = [text.split(",") for text in options.same]
    names = list(sites)
    first, last = names[0], names[-1]
    data = packed({first: sites[first]}, same, 10, options.out / first)
    own = cross_validate(data, 10, options.out / f"{first}-folds", options)
    frames = {f"{first}, 10 folds": own}
    new = packed({last: sites[last]}, same, 0, options.out / last)
    calibrated = {}
    for known in ([first], names[:-1]) if len(names) > 2 else ([first],):
        name = "+".join(known)
        old = packed({n: sites[n] for n in known}, same, 0, options.out / name) if len(known) > 1 else data
        model = train(old, "default", options.out / f"{name}-all", options)
        frame = predict(model, new, new.keys(), list(QUERIES))
        frames[f"{name} to {last}"] = frame.join(ridge(old, old.keys(), new, new.keys()))
        calibrated[name] = calibrate_halves(model, new)
    if not options.skip_together:
        everybody = packed(sites, same, 5, options.out / "together")
        frame = cross_validate(everybody, 5, options.out / "together-folds", options)
        where = np.array([everybody.values(key)["site"] for key in frame.index])
        frames |= {f"{site} of all together, 5 folds": frame[where == site] for site in names}
    for name, frame in frames.items():
        frame.to_csv(options.out / f"{name.replace(' ', '-').replace(',', '')}.tsv", sep="\t")
    lines = [*table(frames), "", f"{first}, 10 folds, the same people:", "", *differences(own), ""]
    lines += [f"Calibrated with half of {last}'s people, the other half predicted, means of 20 random halves:", ""]
    lines += [
        f"- trained on {name}: age error {c.error:.2f} years, 90 % interval holds {100 * c.coverage:.0f} %"
        for name, c in calibrated.items()
    ]
    (options.out / "answers.md").write_text("\n".join(lines) + "\n")
    (options.out / "settings.json").write_text(json.dumps({"overrides": options.overrides}, indent=1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
