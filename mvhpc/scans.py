"""From raw scans to predictions: the preprocessing that the model's data had, quality control, answers, pages."""

import contextlib
import csv
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mvhpc.config import ConfigError, load_config
from mvhpc.diffusion.laws import Law, take
from mvhpc.evaluation.paper_tables import digits_of_values
from mvhpc.evaluation.report import TYPICALITY, Answer, Subject, write_pages
from mvhpc.evaluation.tables import MISSING, read_predictions, sidecar, subject_of
from mvhpc.inference.prediction_tables import Row, without_answer, write_predictions
from mvhpc.inference.predictor import PredictConfig, check_query
from mvhpc.inference.sampler import versions
from mvhpc.inference.scalar_inputs import read_inputs
from mvhpc.inference.scalars_predictor import ScalarsPredictor
from mvhpc.inference.scan_pictures import ScanPictures
from mvhpc.inference.selection import Selection
from mvhpc.models.bundle import load_model_of_scalars
from mvhpc.models.known_answer import check_known_answer
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.models.scalar_stack import StackPosterior
from mvhpc.runs.folder import exclusive, identity
from mvhpc.runs.places import without_places
from mvhpc.runtime.devices import one_thread, resolve_device
from mvhpc.variables import Categorical, Continuous
from shards.bids_source import MASK
from shards.errors import DataError, TooManyRejects
from shards.files import atomic_file, rename_aside
from shards.pack import pack
from shards.packing.rejected import read_rejected
from shards.participant_rows import ID, PATH, SESSION, Reject, Table
from shards.participant_rows import Row as Visit
from shards.participants import read_table
from shards.preprocess.recipe import Recipe
from shards.preprocess.run import other_recipe, preprocess, with_template
from shards.progress import Progress
from shards.schema import Schema
from shards.sheets import column_names, read_sheet

POINTS, REACH = 240, 4.0  # of a density's curve; SDs on either side of the mean
OK = "ok"
SCANS, DERIVATIVE, PACKED, TABLE = "scans.csv", "preprocessed", "packed", "predictions.tsv"


@dataclass(frozen=True)
class Request:
    """What is predicted for whom.

    Attributes:
        source: BIDS folder or CSV of raw scans, as ``shards preprocess`` takes it.
        out: folder of the results.
        model: run folder of a model of scalars, or of a joint model that has one.
        labels: of the participants, without ``sub-``; empty for all.
        given: known variables; the model's volumes where empty.
        want: variables to predict; every scalar that is not given where empty.
        workers: processes of the preprocessing; 0 for one per core.
        device: ``auto``, ``cpu`` or ``cuda``.
        entities, rename, files_root: see :func:`shards.participants.read_table`.
        keep_suspect: answer for scans that fail quality control too, and flag them.
        template, weights: files that the recipe names by their SHA-256, see :func:`shards.preprocess.run.preprocess`.
    """

    source: Path
    out: Path
    model: str
    labels: Sequence[str] = ()
    given: Sequence[str] = ()
    want: Sequence[str] = ()
    workers: int = 0
    device: str = "auto"
    entities: Mapping[str, str] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    files_root: Path | None = None
    keep_suspect: bool = False
    template: Path | None = None
    weights: Path | None = None


def predict_scans(request: Request, model: ScalarsModel | None = None) -> tuple[list[Row], list[str]]:
    """Preprocess, check and predict; write ``predictions.tsv``, its description and a page per scan.

    Scans are preprocessed as those that the model was trained on. A scan that cannot be preprocessed or fails quality
    control has a row with its reason and no answers. So has a row of the source that names no usable scan; it has no
    page.

    Args:
        request: what is predicted for whom.
        model: that of ``request.model``, if it is loaded already.

    Returns:
        The rows of the table, in the order of the source, and the predicted variables.

    Raises:
        ConfigError: a query that the model does not take, an unknown participant, or another process works in
            ``request.out``.
        DataError: a source that cannot be read or has no rows, or a missing package.
    """
    model = model or load_model_of_scalars(request.model, resolve_device(request.device))
    check_known_answer(request.model, model)
    given = list(request.given) or [v.name for v in model.variables.volumes]
    want = list(request.want) or [v.name for v in model.variables.scalars if v.name not in given]
    check_query(model.schema, given, want)
    request.out.mkdir(parents=True, exist_ok=True)
    with exclusive(request.out):
        return _predict(request, model, given, want), want


def _predict(request: Request, model: ScalarsModel, given: Sequence[str], want: Sequence[str]) -> list[Row]:
    """Write the results; return the rows of the table."""
    out = request.out
    schema = _known_part(model.schema, request, given)
    recipe = Recipe.from_dict(model.meta["recipe"]) if model.meta["recipe"] else None
    files_before = _listed(out / SCANS)
    listed = _list_scans(request, schema, recipe, out / SCANS)
    files = _listed(out / SCANS)
    source = out / SCANS
    visits = [row.key for row in listed if isinstance(row, Visit)]
    reasons: dict[str, str] = {}
    if recipe and visits:
        source = out / DERIVATIVE
        options: dict[str, Any] = {"template": request.template, "weights": request.weights, "device": request.device}
        options |= {"workers": request.workers, "keep_suspect": request.keep_suspect}
        if other_recipe(source, with_template(recipe, request.template)):  # of a model before
            rename_aside([source])
        with contextlib.suppress(TooManyRejects):
            preprocess(out / SCANS, source, recipe, **options)
        reasons |= read_rejected(source)
    rows: dict[str, Row] = {}
    subjects: dict[str, Subject] = {}
    warnings: list[str] = []
    if not reasons.keys() >= set(visits):
        rows, subjects, warnings = _answer(request, model, schema, source, given, want, reasons)
    nobody = [Answer(name, model.schema[name].unit or "") for name in want]
    answered, pages = _complete(listed, rows, subjects, reasons, nobody)
    unanswered = without_answer(answered, want)
    counted = f"{len(answered) - len(unanswered)} of {len(answered)} scans answered"
    about = f"{', '.join(want)} given {', '.join(given)}, by {without_places(request.model)}; {counted}"
    facts = {
        "given": list(given),
        "want": list(want),
        "part": "all",
        "labels": sorted(request.labels) or None,
        "answered": {
            "people": len(answered) - len(unanswered),
            "of": len(answered),
            "left_out": [{"reason": reason, "people": [key]} for key, reason in unanswered],
        },
        "warnings": warnings,
        "model": identity(model.folder),
        "recipe": model.meta["recipe"],
        "versions": versions(networks=False),
    }
    other_scans = any(files.get(key) != file for key, file in files_before.items())
    _set_aside(request, facts, other_scans)
    write_predictions(out / TABLE, answered, model.schema, facts)
    write_pages(out, pages, about)
    return answered


def _set_aside(request: Request, facts: Mapping[str, Any], other_scans: bool) -> None:
    """Rename table and pages of another query in the folder: of other variables, scans or another model."""
    table = request.out / TABLE
    if not table.is_file():
        return
    keys = ("given", "want", "model", "labels")
    keys_before: list[str] = []
    before: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError):  # a table of another program
        frame, before = read_predictions(table)
        keys_before = frame["key"].tolist()
    if other_scans or any(before.get(key) != facts.get(key) for key in keys):
        names = {"index", *keys_before}
        pages = [path for path in request.out.glob("*.html") if path.stem in names]
        rename_aside([path for path in (table, sidecar(table), *pages) if path.is_file()])


def _known_part(schema: Schema, request: Request, given: Sequence[str]) -> Schema:
    """The model's volumes, and those of its scalars that the table of participants has, with all that are given."""
    source = request.source
    table = source / "participants.tsv" if source.is_dir() else source
    columns = read_sheet(table).columns if table.is_file() else []
    wanted = {v.column: v.synonyms for v in schema.scalars}
    named = {*columns, *column_names(columns, wanted, request.rename, table).values()}
    for v in schema.scalars:
        if v.name in given and not table.is_file():
            raise ConfigError(f"{v.name} is given, and there is no {table}: write one, with a column {v.column!r}")
        if v.name in given and v.column not in named:
            raise ConfigError(
                f"{v.name} is given, and {table} has no column {v.column!r}; name the table's by --rename "
                f"COLUMN={v.column}"
            )
    specs = schema.to_dict()
    return Schema.from_dict({v.name: specs[v.name] for v in schema if v.kind == "volume" or v.column in named})


def _listed(path: Path) -> dict[str, str]:
    """Key -> file of the scans of the last query in the folder; empty where there was none."""
    if not path.is_file():
        return {}
    return {"_".join(filter(None, (row[ID], row[SESSION]))): row[PATH] for _, row in read_sheet(path).rows}


def _list_scans(request: Request, schema: Schema, recipe: Recipe | None, path: Path) -> list[Visit | Reject]:
    """Write the scans to a CSV for the preprocessing; return all rows.

    The keys of visits are unique and safe as names of files. A rejected row may have any key, also that of a visit.
    """
    volumes = schema.volumes
    if len(volumes) != 1:
        raise ConfigError(f"{request.model} has {len(volumes)} volumes; preprocessing takes T1-weighted scans alone")
    image, specs = volumes[0].name, schema.to_dict()
    masks = []
    if recipe and "brain" in recipe.steps and recipe.brain == MASK:  # masks lie beside the scans, or in a column
        masks, specs[MASK] = [MASK], {"kind": "volume", "suffix": MASK}
        specs[image] |= {"column": PATH}
    choice: dict[str, Any] = {"entities": request.entities, "rename": request.rename, "files_root": request.files_root}
    table = read_table(request.source, Schema.from_dict(specs), **choice)
    if any(isinstance(row, Reject) for row in table.rows):
        needed = {name: spec for name, spec in specs.items() if spec["kind"] == "volume" or name in request.given}
        table = _forgive(table, read_table(request.source, Schema.from_dict(needed), **choice), schema)
    for note in table.notes:
        print(f"note: {note}", file=sys.stderr)
    if not table.rows:
        raise DataError(f"{request.source}: the table has no rows")
    wanted = {label.removeprefix("sub-") for label in request.labels}
    labels = [subject_of(row.key).removeprefix("sub-") for row in table.rows]
    if unknown := sorted(wanted.difference(labels)):
        raise ConfigError(f"{request.source}: no participant {', '.join(unknown)}")
    rows = [row for row, label in zip(table.rows, labels, strict=True) if not wanted or label in wanted]
    with atomic_file(path) as part, part.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([ID, SESSION, PATH, *masks, *(v.column for v in schema.scalars)])
        for row in rows:
            if isinstance(row, Visit):
                session = row.key[len(row.subject) + 1 :]
                files = [row.files[name].absolute() if name in row.files else MISSING for name in (image, *masks)]
                values = (MISSING if row.values[v.name] is None else row.values[v.name] for v in schema.scalars)
                writer.writerow([row.subject, session, *files, *values])
    return rows


def _forgive(table: Table, needed: Table, schema: Schema) -> Table:
    """``table`` with nobody rejected for a value that is not given; these people have no true values, which is noted.

    Args:
        table: with all scalars of ``schema``.
        needed: the same rows with the given ones alone.
        schema: of ``table``.
    """
    rows, reasons = [], []
    for row, other in zip(table.rows, needed.rows, strict=True):
        if isinstance(row, Reject) and isinstance(other, Visit):
            reasons.append(f"{row.key}: {row.reason}")
            row = replace(other, values={**dict.fromkeys(v.name for v in schema.scalars), **other.values})
        elif isinstance(other, Reject):
            row = other  # for a reason that counts
        rows.append(row)
    notes = [f"the true values of {len(reasons)} rows cannot be read, the first of {reasons[0]}"] if reasons else []
    return replace(table, rows=rows, notes=[*table.notes, *notes])


def _answer(
    request: Request,
    model: ScalarsModel,
    schema: Schema,
    source: Path,
    given: Sequence[str],
    want: Sequence[str],
    reasons: dict[str, str],
) -> tuple[dict[str, Row], dict[str, Subject], list[str]]:
    """Rows and pages by key, and warnings; the reasons of scans that fail quality control are added."""
    packed = request.out / PACKED
    shutil.rmtree(packed, ignore_errors=True)
    options: dict[str, Any] = {"schema": schema, "spacing": model.grid["spacing"], "shape": model.grid["shape"]}
    options |= {"workers": request.workers, "keep_suspect": request.keep_suspect}
    try:
        pack(source, packed, **options, max_rejects="100%", fractions=(0, 0, 1))
    except TooManyRejects:
        return {}, {}, []
    finally:
        for key, reason in read_rejected(packed):
            reasons.setdefault(key, reason)  # a scan without a result of the preprocessing has that reason
    overrides = {"out": str(request.out / TABLE), "model": request.model, "data": str(packed), "split": "all"}
    overrides |= {"given": ",".join(given), "want": ",".join(want)}
    config = load_config(PredictConfig, "predict", "default", (), overrides)
    predictor = ScalarsPredictor(config, model)
    selection = Selection.of(predictor.dataset, "all", "default", predictor.training)
    selection.warnings.extend(predictor.notes)
    selection.warn(", ".join(want))
    keys, rows, pages = selection.keys, {}, {}
    pictures = ScanPictures(source, Recipe.from_dict(model.meta["recipe"]) if model.meta["recipe"] else None)
    with Progress(", ".join(want), len(keys), "scan") as bar:
        for first in range(0, len(keys), config.batch):
            part = keys[first : first + config.batch]
            inputs = read_inputs(model, predictor.dataset, part, given)
            with torch.inference_mode(), one_thread():
                laws = StackPosterior(model.stack, *inputs).laws(want)
            for place, (key, row) in enumerate(zip(part, predictor(part), strict=True)):
                answers = [_variable_answer(model, row, name, laws[name], place) for name in want]
                answers = [replace(answer, note=model.stack.no_better(answer.name, given)) for answer in answers]
                rows[key], pages[key] = row, _page(predictor, row, answers, pictures)
            bar.update(len(part))
    return rows, pages, selection.warnings


def _page(predictor: ScalarsPredictor, row: Row, answers: Sequence[Answer], pictures: ScanPictures) -> Subject:
    """What the page of one scan shows."""
    flags = [flag for flag in str(row["flag"]).split("; ") if flag != OK]
    record = predictor.dataset.record(row["key"])
    figures = {name.partition(".")[2]: value for name, value in record.figures.items()}
    if row["typicality"] is not None:
        figures = {TYPICALITY: row["typicality"], **figures}
    volume, mask = pictures.read(predictor, row["key"])
    contrast = predictor.schema.volumes[0].suffix
    return Subject(row["key"], answers, flags, volume, mask, pictures.template, figures, contrast)


def _variable_answer(model: ScalarsModel, row: Row, name: str, law: Law, place: int) -> Answer:
    """The answer about one variable of the person at ``place`` of a batch."""
    variable, unit = model.variables[name], model.schema[name].unit or ""
    if row[name] is None:
        return Answer(name, unit)
    if isinstance(variable, Categorical):
        return Answer(name, unit, probabilities={c: row[f"{name}_p_{c}"] for c in variable.classes})
    assert isinstance(variable, Continuous)
    mean, sd = row[name], row[f"{name}_sd"]
    least, most = model.schema[name].range
    ends = max(least, mean - REACH * sd), min(most, mean + REACH * sd)
    x = torch.linspace(*ends, POINTS, dtype=torch.float64)
    z = (2 * x - variable.low - variable.high) / (variable.high - variable.low)
    own = take(law, torch.tensor([place]))
    assert not isinstance(own, torch.Tensor)
    density = own.log_prob(z).exp() * 2 / (variable.high - variable.low)
    interval = (row[f"{name}_q05"], row[f"{name}_q95"])
    digits = digits_of_values(model.schema[name])
    return Answer(name, unit, mean, interval, (x.numpy(), density.numpy()), digits=digits)


def _complete(
    listed: Sequence[Visit | Reject],
    rows: Mapping[str, Row],
    subjects: Mapping[str, Subject],
    reasons: Mapping[str, str],
    nobody: Sequence[Answer],
) -> tuple[list[Row], list[Subject]]:
    """The rows of the table, of one set of columns, and the pages, of all rows of the source.

    Args:
        listed: the rows of the source.
        rows, subjects: of the visits that were answered, by key.
        reasons: of the other visits, by key.
        nobody: the answers to the query about somebody who has none; cells without an answer are empty.
    """
    names = [answer.name for answer in nobody]
    columns = next(iter(rows.values()), dict.fromkeys(["key", "subject", *names, "not_given", "flag"]))
    table, pages = [], []
    for row in listed:
        if isinstance(row, Visit) and row.key in rows:
            table.append(rows[row.key])
            pages.append(subjects[row.key])
            continue
        key = " ".join(row.key.split())  # of a cell of the source, where it is no label
        reason = row.reason if isinstance(row, Reject) else reasons[key]
        reason = reason if key else f"line {row.line}: {reason}"
        table.append({**dict.fromkeys(columns), "key": key, "subject": subject_of(key), "flag": reason})
        pages.append(Subject(key, nobody, [reason], page=isinstance(row, Visit)))
    return table, pages
