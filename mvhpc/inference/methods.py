"""The rows of a comparison: trained models, and predictions that need none, as answers to queries."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from mvhpc.config import ConfigError, fingerprint
from mvhpc.evaluation.answers import Answers, read_answers
from mvhpc.evaluation.comparison import Query
from mvhpc.evaluation.tables import label, subject_of
from mvhpc.inference.answers import answers, threads_of
from mvhpc.inference.linear_floor import LinearFloor
from mvhpc.inference.open_predictor import open_predictor
from mvhpc.inference.prediction_tables import Row
from mvhpc.inference.predictor import PredictConfig
from mvhpc.models.baseline import TITLES
from mvhpc.models.bundle import AutoencoderModel, BaselineModel, JointModel, load
from mvhpc.models.model_folder import model_folder
from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import true_value
from mvhpc.runs.folder import identity
from mvhpc.runtime.devices import processor, resolve_device, resolve_precision
from shards.dataset import Dataset
from shards.errors import IntegrityError
from shards.files import write_bytes
from shards.progress import Progress
from shards.schema import Schema

MEAN, LINEAR = "predicting the mean", "linear reading"


@dataclass(frozen=True)
class Method:
    """A trained model in a comparison.

    Attributes:
        name: its row.
        path: its run folder.
        schema: its variables.
        query: the only one that it answers; None for a model that answers any.
        split: the split that it was trained with.
        training: from whom it learnt.
    """

    name: str
    path: str
    schema: Schema
    query: Query | None
    split: str
    training: TrainingPeople

    @classmethod
    def open(cls, path: str, name: str = "") -> "Method":
        """The model of a run folder.

        Args:
            path: run folder, or its ``model`` folder.
            name: its row; empty: what it is.

        Raises:
            ConfigError: an autoencoder.
            ModelError: no model there, or a damaged one.
        """
        model = load(path)
        if isinstance(model, AutoencoderModel):
            raise ConfigError(f"runs: {path} is an autoencoder, which predicts nothing; name models that do")
        query = (model.want, in_order(model.schema, model.given)) if isinstance(model, BaselineModel) else None
        folder = model_folder(path).absolute()
        settings = (folder.parent if folder.name == "model" else folder) / "config.yaml"
        split = OmegaConf.select(OmegaConf.load(settings), "split") if settings.is_file() else None
        training = TrainingPeople.read(model.meta)
        return cls(name or title(model), path, model.schema, query, split or "default", training)

    def answers(self, query: Query) -> bool:
        """Whether it takes a query."""
        want, given = query
        if self.query is not None:
            return want == self.query[0] and set(given) == set(self.query[1])
        names = [v.name for v in self.schema]
        return all(name in names for name in (want, *given))


def title(model: object) -> str:
    """What a model is, for its row."""
    if isinstance(model, BaselineModel):
        loss = "CE" if model.schema[model.want].kind == "categorical" else "MSE"
        return f"{TITLES[model.name]} ({loss})"
    if isinstance(model, JointModel):
        if not model.schema.scalars:
            return "LDM (volume alone)"
        shared = model.meta["diffusion"]["time"] == "shared"
        return "joint model, the paper's procedure" if shared and model.scalars is None else "joint model"
    return "model of scalars"


def open_methods(runs: Sequence[str], names: Sequence[str]) -> list[Method]:
    """The models of a comparison. Models of one name are one row: those of the folds of a cross-validation.

    Args:
        runs: run folders.
        names: their rows, one each; none: what they are, with the folder where two are the same.

    Raises:
        ConfigError: no runs, two models of one name and split, or an autoencoder.
    """
    if not runs:
        raise ConfigError("runs: name the run folders to compare")
    found = [Method.open(path, name) for path, name in zip(runs, names or [""] * len(runs))]
    same = [[m.path for m in found if (m.name, m.split, m.query) == (n.name, n.split, n.query)] for n in found]
    if names and any(len(paths) > 1 for paths in same):
        several = next(paths for paths in same if len(paths) > 1)
        raise ConfigError(f"names: {' and '.join(several)} have one name and one split; name them differently")
    return [replace(m, name=f"{m.name}, {m.path}") if len(paths) > 1 else m for m, paths in zip(found, same)]


def in_order(schema: Schema, names: Sequence[str]) -> tuple[str, ...]:
    """Names in the order of a schema."""
    return tuple(v.name for v in schema if v.name in names)


def queries_of(schema: Schema, methods: Sequence[Method]) -> list[Query]:
    """The queries of a comparison: of each scalar, given everything else, the volumes, the other scalars and nothing.

    Those that only baselines were trained for are added. Scalars that no method predicts are left out.
    """
    found: list[Query] = []
    volumes = [v.name for v in schema.volumes]
    for wanted in schema.scalars:
        others = [v.name for v in schema.scalars if v.name != wanted.name]
        givens = [in_order(schema, names) for names in ([*volumes, *others], volumes, others, [])]
        own = [in_order(schema, m.query[1]) for m in methods if m.query and m.query[0] == wanted.name]
        queries = [(wanted.name, given) for given in dict.fromkeys([*givens[:2], *own, *givens[2:]])]
        if any(method.answers(query) for method in methods for query in queries):
            found += queries
    return found


def answer_query(
    method: Method, config: PredictConfig, query: Query, dataset: Dataset, keys: Sequence[str], folder: Path
) -> Answers:
    """The answers of a model to one query, kept in ``folder`` for the next comparison of the same model, on the same
    kind of processor and in the same precision.

    Args:
        method: the model; it takes the query.
        config: of predictions; data, query and model are set here.
        query: wanted and given variables.
        dataset: packed data.
        keys: of the records.
        folder: of answers.

    Raises:
        ConfigError: the data do not fit the model.
        IntegrityError: somebody has no answer, as of a damaged volume; with the record.
    """
    want, given = query
    settings = replace(config, model=method.path, data=str(dataset.folder), given=list(given), want=[want])
    decides = [identity(method.path), dataset.index.digest, list(keys), list(given), want]
    device = resolve_device(config.compute.device)
    precision = f"{resolve_precision(config.compute.precision, device)}"
    chains = [config.samples, config.seed, config.sampling, precision, processor(device)]
    name = f"{want}-given-{'-'.join(given) or 'nothing'}-{fingerprint(decides, *chains)}.jsonl"
    path = folder / name
    if path.is_file():
        frame = pd.read_json(path, orient="records", lines=True, dtype=False, convert_dates=False)
    else:
        frame = pd.DataFrame(_rows(method, settings, keys))
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, frame.to_json(orient="records", lines=True, double_precision=15).encode())
    variable = dataset.index.schema[want]
    frame["recorded"] = [true_value(dataset, key, variable) for key in frame["key"]]
    return read_answers(method.name, variable, given, frame, method.schema[want])


def _rows(method: Method, config: PredictConfig, keys: Sequence[str]) -> list[Row]:
    """The rows of ``mvhpc predict``, of everybody: methods are compared on the same people."""
    predictor, rows = open_predictor(config), []
    threads = threads_of(resolve_device(config.compute.device), config.compute.threads)
    query = f"{method.name}: {config.want[0]} given {label(config.given)}"
    with Progress(query, len(keys), "visit") as bar:
        for found in answers(predictor, keys, threads):
            for key, reason in found.failed.items():
                raise IntegrityError(f"{query}: {key} has no answer ({reason}); mend it, or compare without this model")
            rows += found.rows
            bar.update(len(found.rows))
    return rows


def read_reference(
    name: str, dataset: Dataset, query: Query, keys: Sequence[str], rows: Sequence[Mapping[str, object]]
) -> Answers:
    """Answers of a method that is no trained model.

    Args:
        name: of the method.
        dataset: packed data.
        query: wanted and given variables.
        keys: of the records.
        rows: the cells of each, as of ``mvhpc predict``.
    """
    variable = dataset.index.schema[query[0]]
    frame = pd.DataFrame([{"key": key, "subject": subject_of(key), **row} for key, row in zip(keys, rows)])
    frame["recorded"] = [true_value(dataset, key, variable) for key in keys]
    return read_answers(name, variable, query[1], frame, variable)


def linear_answers(floor: LinearFloor, queries: Sequence[Query], keys: Sequence[str]) -> Iterator[Answers]:
    """The answers of the linear floor to the queries about variables that it has."""
    known = [v.name for v in floor.schema]
    for want, given in queries:
        if all(name in known for name in (want, *given)):
            yield read_reference(LINEAR, floor.dataset, (want, given), keys, floor.answer(keys, given, want))


def mean_answers(
    methods: Sequence[Method], dataset: Dataset, queries: Sequence[Query], keys: Sequence[str]
) -> Iterator[Answers]:
    """The mean, or the most frequent class, of the people whom the first model that knows it learnt from."""
    schema = dataset.index.schema
    for want, given in queries:
        kind = schema[want].kind
        known = [m for m in methods if want in m.schema and m.schema[want].kind == kind]
        constant = next((c for m in known if (c := m.training.constant(want)) is not None), None)
        if constant is not None:
            yield read_reference(MEAN, dataset, (want, given), keys, [{want: constant}] * len(keys))
