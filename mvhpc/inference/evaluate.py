"""Stage ``evaluate``: any trained models side by side on the people of one packed data set.

Every model is asked every query that it takes: each scalar given everything else, the volumes, the other scalars, and
nothing (the paper's tables 1 and 2). Beside them stand a linear reading of the same volumes, fitted to the training
part, and predicting the mean. Models of one name are one row: the folds of a cross-validation, each asked about the
test part of its own split.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from mvhpc.config import ConfigError, Device, Sampling, Tracking, at_least, flatten, load_config, to_dict
from mvhpc.evaluation.comparison import Comparison, Query, draw_figures, make_tables, page, write_result
from mvhpc.evaluation.metrics import RELIABLE
from mvhpc.inference.linear_floor import LinearFloor
from mvhpc.inference.methods import (
    LINEAR,
    MEAN,
    Method,
    answer_query,
    linear_answers,
    mean_answers,
    open_methods,
    queries_of,
)
from mvhpc.inference.prediction_tables import DESCRIPTION, derivative
from mvhpc.inference.predictor import PredictConfig
from mvhpc.inference.sampler import set_threads
from mvhpc.inference.selection import few
from mvhpc.records import choose_part, subjects, true_value
from mvhpc.runs.folder import ANY_SPLIT, Run, identity
from shards.dataset import Dataset, open_dataset
from shards.files import atomic_folder, write_text

GENERATION = "generation.json"  # in a result of `mvhpc evaluate-generation`
MEAN_OF_PLANES = "mean"


@dataclass
class EvaluateConfig:
    """`mvhpc evaluate`: tables and figures of several models."""

    out: str  # a folder
    runs: list[str]  # run folders
    names: list[str]  # their rows; empty: what they are
    generation: list[str]  # results of evaluate-generation of these models
    data: str
    split: str  # train | validation | test | all | auto
    split_name: str  # which recorded split; auto: that of each model
    samples: int  # chains per subject, for models whose U-Net predicts scalars
    seed: int
    sampling: Sampling
    compute: Device
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"samples": self.samples})
        choose_part(self.split, auto=True)
        if twice := [path for path in self.runs if self.runs.count(path) > 1]:
            raise ConfigError(f"runs: {twice[0]} is named twice")
        if self.names and len(self.names) != len(self.runs):
            raise ConfigError(f"names: {len(self.names)} names of {len(self.runs)} runs; give one for each, or none")

    def predictions(self) -> PredictConfig:
        """The configuration of predictions, but for model and query."""
        own = {"data": self.data, "samples": self.samples, "seed": self.seed}
        nested = flatten({"sampling": to_dict(self.sampling), "compute": to_dict(self.compute)})
        unset = {"out": "", "model": "", "given": [], "want": []}
        return load_config(PredictConfig, "predict", values={**unset, **own, **nested})


def run(config: EvaluateConfig, run: Run) -> dict[str, Any]:
    """Stage ``evaluate``: write tables (TSV, Markdown, LaTeX), figures and ``results.md`` to ``config.out``.

    Returns:
        How many people, methods and queries there are.

    Raises:
        ConfigError: no runs, a run that predicts nothing, an unknown part or split, an empty part, a row that would
            answer twice about a visit, or data that do not fit a model.
        IntegrityError: somebody has no answer, as of a damaged volume; with the record.
    """
    set_threads(config.predictions().compute)
    dataset = open_dataset(config.data)
    methods = open_methods(config.runs, config.names)
    comparison = compare(config, dataset, methods, run.folder / "answers")
    schema = dataset.index.schema
    generation = read_generation(config.generation, methods)
    results = list(make_tables(comparison, generation, lambda key, name: true_value(dataset, key, schema[name])))
    with atomic_folder(Path(config.out)) as folder:
        for result in results:
            write_result(folder / "tables", result)
        everything = comparison.table()
        everything.to_csv(folder / "answers.tsv", sep="\t", index=False, na_rep="n/a", float_format="%.6g")
        drawn = draw_figures(comparison, results, folder / "figures")
        write_text(folder / "results.md", page(results, drawn, comparison.notes))
        models = [{"run": Path(m.path).name, "method": m.name, "model": identity(m.path)} for m in methods]
        made = derivative("Comparison of models", models=models, data=dataset.index.digest, seed=config.seed)
        write_text(folder / DESCRIPTION, json.dumps(made, indent=1))
    for note in comparison.notes:
        print(f"evaluate: {note}", file=sys.stderr)
    print(f"\n{results[0].text.text()}\n{results[0].note}\n", file=sys.stderr)
    people = {s for a in comparison.found.values() for s in a.subjects}
    return {"people": len(people), "methods": len(comparison.methods), "queries": len(comparison.queries)}


def compare(config: EvaluateConfig, dataset: Dataset, methods: Sequence[Method], folder: Path) -> Comparison:
    """Answer every query by every method that it takes.

    Args:
        config: of the stage.
        dataset: packed data.
        methods: trained models.
        folder: where answers are kept for the next comparison.
    """
    queries = queries_of(dataset.index.schema, methods)
    own = any(m.training.recorded and m.training.data == dataset.index.digest for m in methods)
    part = config.split if config.split != "auto" else "test" if own else "all"
    comparison = Comparison(dataset.index.schema, [*dict.fromkeys(m.name for m in methods), LINEAR, MEAN], queries)
    settings = config.predictions()
    by_split: dict[str, list[Method]] = {}
    for method in methods:
        known = method.split if method.split in dataset.index.splits else "default"
        by_split.setdefault(known if config.split_name == ANY_SPLIT else config.split_name, []).append(method)
    keys_of = {split: subjects(dataset, part, split) for split in by_split}
    _check_once(by_split, keys_of, queries)
    held_out = own and part == "test"
    sloped = [q for q in queries if q[1] and dataset.index.schema[q[0]].kind != "categorical"]
    for split, members in by_split.items():
        keys = keys_of[split]
        others = dataset.keys("validation", split) if held_out else []
        for method in members:
            comparison.notes += _learnt(method, dataset, keys)
            for query in filter(method.answers, queries):
                comparison.add(comparison.found, answer_query(method, settings, query, dataset, keys, folder))
            for query in filter(method.answers, sloped if others else ()):
                comparison.add(comparison.fitted, answer_query(method, settings, query, dataset, others, folder))
        if train := dataset.keys("train", split) if held_out else []:
            print(f"{LINEAR}: fitting to {len(train)} visits", file=sys.stderr)
            floor = LinearFloor(dataset, train)
            for answers in linear_answers(floor, queries, keys):
                comparison.add(comparison.found, answers)
            for answers in linear_answers(floor, sloped, others) if others else ():
                comparison.add(comparison.fitted, answers)
        for answers in mean_answers(members, dataset, queries, keys):
            comparison.add(comparison.found, answers)
    answering = {m.name for m in methods} | {method for method, *_ in comparison.found}
    comparison.methods = [name for name in comparison.methods if name in answering]
    splits = [name for name in dataset.index.splits if name in by_split]
    comparison.notes.insert(0, _people(comparison, dataset, part, splits))
    comparison.notes += _few_people(comparison)
    if not held_out:
        comparison.notes.append(
            f"no {LINEAR}, and no correction of slopes: these are fitted to the training and validation part of the "
            "data that the models were trained on, and other people are evaluated here"
        )
    return comparison


def _check_once(
    by_split: Mapping[str, Sequence[Method]], keys_of: Mapping[str, Sequence[str]], queries: Sequence[Query]
) -> None:
    """Refuse a comparison in which one row would answer twice about a visit.

    Raises:
        ConfigError: two models of one row and one split, or two splits whose parts share people.
    """
    for members in by_split.values():
        for first, second in combinations(members, 2):
            if first.name == second.name and any(first.answers(q) and second.answers(q) for q in queries):
                raise ConfigError(
                    f"runs: {first.path} and {second.path} would be folds of the row {first.name!r}, but both are "
                    "asked about the same people; give each a row of its own with --names"
                )
    for one, other in combinations(keys_of, 2):
        if shared := sorted({*keys_of[one]} & {*keys_of[other]}):
            raise ConfigError(
                f"runs: they were trained with the splits {one} and {other}, and {len(shared)} visits "
                f"({few(shared)}) are asked about in both; compare runs of one split, or name one: split_name={one}"
            )


def _few_people(comparison: Comparison) -> list[str]:
    """A warning for each number of people that is too small, with the variables that so many have."""
    found: dict[int, list[str]] = {}
    for want in dict.fromkeys(want for want, _ in comparison.queries):
        people = {s for a in comparison.of(want) for s in a.subjects}
        found.setdefault(len(people), []).append(want)
    return [
        f"warning: {' and '.join(names)} {'is' if len(names) == 1 else 'are'} known of {n} people; bootstrap intervals "
        f"of fewer than {RELIABLE} are too narrow"
        if n
        else f"warning: nobody has a known {' or '.join(names)}: the answers have no score"
        for n, names in found.items()
        if n < RELIABLE
    ]


def _people(comparison: Comparison, dataset: Dataset, part: str, splits: Sequence[str]) -> str:
    frames = [a.frame for a in comparison.found.values()]
    keys = {key for frame in frames for key in frame["key"]}
    people = {subject for frame in frames for subject in frame["subject"]}
    of = f"{'split' if len(splits) == 1 else 'splits'} {', '.join(splits)}"
    return f"{len(people)} people, {len(keys)} visits in all, the {part} part of the {of} of {dataset.folder.name}"


def _learnt(method: Method, dataset: Dataset, keys: Sequence[str]) -> list[str]:
    """A warning where a model learnt from people whom it is asked about."""
    learnt = method.training.learnt(dataset.index)
    known = [key for key in keys if key in learnt]
    if not method.training.recorded:
        return [f"warning: {method.name} does not say from whom it learnt, so some of these people may be among them"]
    if not known:
        return []
    return [
        f"warning: {method.name} learnt from {len(known)} of these {len(keys)} visits ({few(known)}): its scores look "
        "better than those of new people"
    ]


def read_generation(folders: Sequence[str], methods: Sequence[Method]) -> dict[str, pd.DataFrame]:
    """By row, the FID of its model: ``measure``, ``value``, ``low`` and ``high``.

    Args:
        folders: results of ``mvhpc evaluate-generation``.
        methods: trained models.

    Raises:
        ConfigError: no such result, one of another model, or two of one row.
    """
    names = {identity(method.path): method.name for method in methods}
    found: dict[str, pd.DataFrame] = {}
    for path in (Path(folder) / GENERATION for folder in folders):
        try:
            content = json.loads(path.read_text())
            recipe, rows = content["recipe"], content["rows"]
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{path}: no result of `mvhpc evaluate-generation`") from error
        name = names.get(recipe["Model"])
        if name is None:
            raise ConfigError(f"{path}: its volumes were drawn by a model that is not among the runs")
        if name in found:
            raise ConfigError(f"{path}: a second result of the row {name!r}; leave one out")
        row = next(r for r in rows if r["label"] == recipe["Distance"] and r["plane"] in ("", MEAN_OF_PLANES))
        found[name] = pd.DataFrame([{"measure": row["label"], **row["drawn"]}])
    return found
