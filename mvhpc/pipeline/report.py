"""`mvhpc report`: what a finished pipeline found, from whom and how, on one HTML page that loads nothing."""

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure

from mvhpc.config import ConfigError, to_dict
from mvhpc.evaluation import comparison_figures
from mvhpc.evaluation.answers import Answers, read_answers
from mvhpc.evaluation.calibration import SHARES
from mvhpc.evaluation.metrics import RELIABLE
from mvhpc.evaluation.page import render
from mvhpc.evaluation.paper_tables import (
    by_group,
    calibration_of_number,
    digits_of,
    digits_of_values,
    measure,
    score_of,
)
from mvhpc.evaluation.tables import Table, label, read_predictions, subject_of
from mvhpc.models.model_card import INTENDED_USE, LIMITS
from mvhpc.pipeline.plan import FINAL, Pipeline, Query
from mvhpc.pipeline.project import FILE, open_project
from mvhpc.pipeline.summary import table_of_results
from mvhpc.runs.folder import read_record
from mvhpc.runs.mlflow_sync import read_state
from mvhpc.runs.places import without_places
from mvhpc.stages import STAGES
from shards.dataset import Dataset, open_dataset
from shards.files import write_text
from shards.index import PARTS
from shards.packing.rejected import REJECTED
from shards.qc.wording import flag_words
from shards.schema import Schema, Variable
from shards.sheets import read_sheet
from shards.web_page import inline, inline_file

COLOURS = {"train": "#14708a", "validation": "#8a8f98", "test": "#c4572e"}
PICTURES = {  # below the pipeline's figures: title and what is seen
    "people": ("Synthetic people", "Drawn from the joint model without anything given (figure B.1 of the paper)."),
    "inpainted-half": (
        "A half filled in",
        "Half of a test scan is given, the other half is drawn (figure B.2 of the paper).",
    ),
    "reconstruction": ("Reconstruction", "Validation scans, and what the autoencoder keeps of them."),
    "drawn-over": ("One person over the range", "The same noise with other values given."),
    "ventricles-over": ("Fluid deep inside the brain", "Real test people beside drawn ones."),
}


@dataclass(frozen=True)
class Section:
    """A heading with a text, a picture and a table, ``plain`` where it has words; each may be empty."""

    title: str
    text: str = ""
    picture: str = ""
    table: Table | None = None
    alt: str = field(default="")
    plain: bool = False


def write_report(root: Path, out: Path) -> None:
    """Write the page of a pipeline.

    Args:
        root: of the project.
        out: HTML file.

    Raises:
        ConfigError: no project there, or one whose stages are not complete.
    """
    if not (root / FILE).is_file():
        raise ConfigError(f"{root}: no project (it has no {FILE}); give the folder of `mvhpc run`, its root")
    pipeline = open_project(root)
    _check_complete(pipeline)
    dataset = open_dataset(pipeline.place("pack", FINAL))
    (results, verdicts), predictions = table_of_results(pipeline), _predictions(pipeline)
    people = len({record.subject for record in dataset.index.records})
    about = f"Preset {pipeline.config.preset}, {people} people"
    if folds := pipeline.config.folds:
        about += f"; results of {folds} folds, which test everybody once; model and pictures of one more training"
    page = render(
        "study.html",
        title=root.resolve().name,
        about=about,
        results=results,
        reliable=RELIABLE,
        verdicts=verdicts,
        pictures=_pictures(pipeline),
        predictions=[s for query, frame in predictions for s in _predicted(query, frame, dataset)],
        data=_data_sheet(dataset, pipeline),
        card=_model_card(pipeline, dataset),
        stages=_stages(pipeline),
        versions=_versions(pipeline),
        shards=_shards(dataset),
        digest=dataset.index.digest,
        project=yaml.safe_dump(without_places(to_dict(pipeline.config)), sort_keys=False),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)


def _steps(pipeline: Pipeline) -> list[tuple[str, Path, Path]]:
    """Name, result and run folder of each stage."""
    return [
        (STAGES[stage].run_name(config), Path(config.out), STAGES[stage].run_folder(config.out))
        for stage, config in pipeline.steps()
    ]


def _check_complete(pipeline: Pipeline) -> None:
    missing = [name for name, _, folder in _steps(pipeline) if read_record(folder).get("status") != "finished"]
    if missing:
        raise ConfigError(
            f"{pipeline.root}: not complete: {', '.join(missing)}; run `mvhpc run --config {pipeline.root / FILE}`"
        )


def _predictions(pipeline: Pipeline) -> list[tuple[Query, pd.DataFrame]]:
    """Each query that is given something, and its predictions over all splits."""
    found = []
    for query in pipeline.config.queries:
        frames = [read_predictions(pipeline.predictions(split, query))[0] for split in pipeline.splits]
        if query.given:
            found.append((query, pd.concat(frames, ignore_index=True)))
    return found


def _predicted(query: Query, frame: pd.DataFrame, dataset: Dataset) -> list[Section]:
    """Calibration and error by group of each variable of a query."""
    schema = dataset.index.schema
    values = {record.key: record.values for record in dataset.index.records}
    found = []
    for variable in (schema[name] for name in query.want):
        recorded = frame.assign(recorded=frame[f"{variable.name}_true"])
        answers = read_answers("model", variable, query.given, recorded, variable)
        total = score_of(answers)
        if not total.n:
            continue
        rows = [["all", str(total.n), total.format(digits_of(variable))]]
        groups = by_group([[answers]], schema.scalars, lambda key, name: values[key].get(name))
        for _, _, by, group, score, _, people in groups.text.rows if groups else ():
            rows.append([f"{by} {group}", people, score])
        table = Table(["group", "people", measure(variable)], rows)
        title, picture = f"{variable.name} given {label(query.given)}", _calibration_picture(answers)
        found.append(Section(title, _covered(answers), picture, table, f"Calibration of {variable.name}"))
    return found


def _covered(answers: Answers) -> str:
    """How often central intervals hold the truth; nothing without predicted distributions."""
    if not answers.has("pit"):
        return ""
    row = calibration_of_number(answers)
    parts = (f"{100 * float(row[f'coverage_{share}'] or 0):.0f} % in the {share} % interval" for share in SHARES)
    return f"True values: {', '.join(parts)}."


def _calibration_picture(answers: Answers) -> str:
    """The figure of the predicted distributions or probabilities; nothing without them."""
    if not answers.has("confidence" if answers.category else "pit"):
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.png"
        if answers.category:
            comparison_figures.reliability_of_category(answers.variable, [answers], path)
        else:
            colour = comparison_figures.colours([answers.method])
            comparison_figures.calibration_of_number(answers.variable, [answers], colour, path)
        return inline_file(path)


def _pictures(pipeline: Pipeline) -> list[Section]:
    """The pictures of the pipeline, those of the paper first."""
    files = sorted((pipeline.root / "figures").glob("*.png"))
    found = []
    for start, (title, text) in PICTURES.items():
        found += [Section(title, text, inline_file(file), alt=title) for file in files if file.stem.startswith(start)]
    return found


def _data_sheet(dataset: Dataset, pipeline: Pipeline) -> list[Section]:
    """Who is in the data: parts, numbers, classes, missing values, flags, and who was rejected and why."""
    index = dataset.index
    parts = index.split(FINAL).assignment
    scans = Counter(parts.values())
    people = {part: len(found) for part, found in index.subjects(FINAL).items()}
    rows = [["people", *(str(people[part]) for part in PARTS)], ["scans", *(str(scans[part]) for part in PARTS)]]
    for variable in index.schema.scalars:
        by_part = {p: [r.values.get(variable.name) for r in index.records if parts.get(r.key) == p] for p in PARTS}
        rows += _scalar_rows(variable, list(by_part.values()))
    for variable in index.schema.volumes:
        missing = [sum(variable.name not in r.checksums for r in index.records if parts.get(r.key) == p) for p in PARTS]
        rows.append([f"{variable.name}, missing", *map(str, missing)])
    note = f"Parts of the split {FINAL!r}; nobody is in two of them."
    found = [Section("Who", note, table=Table(["", *PARTS], rows))]
    found += [
        Section(f"{v.name[0].upper()}{v.name[1:]}", "", picture, alt=f"Histogram of {v.name}")
        for v in index.schema.scalars
        if v.kind != "categorical" and (picture := _histogram(v, dataset, parts))
    ]
    flags = Counter(flag for record in index.records for flag in record.flags)
    if flags:
        values = {flag: [r.figures[flag] for r in index.records if flag in r.flags] for flag in flags}
        rows = [[name, str(n), flag_words(name, values[name])] for name, n in flags.most_common()]
        table = Table(["limit of quality control", "scans", "what it means"], rows)
        found.append(Section("Flagged, and kept", "", table=table, plain=True))
    sheet = read_sheet(dataset.folder / REJECTED)
    reasons = Counter(_anonymous(cells["reason"], cells["key"]) for _, cells in sheet.rows)
    table = Table(["reason", "rows"], [[reason, str(n)] for reason, n in reasons.most_common()])
    text = f"{len(sheet.rows)} of {index.provenance['rows']} rows of the source were rejected" + (
        f"; {dataset.folder.name}/{REJECTED} names them." if sheet.rows else "."
    )
    return [*found, Section("Rejected", text, table=table if sheet.rows else None)]


def _anonymous(reason: str, key: str) -> str:
    """A reason without the key and the subject that it may name."""
    for name in (key, subject_of(key)):
        reason = reason.replace(name, "SUBJECT") if name else reason
    return reason


def _scalar_rows(variable: Variable, parts: Sequence[Sequence[Any]]) -> list[list[str]]:
    """Rows of the data sheet about one scalar; values by part."""
    known = [[v for v in values if v is not None] for values in parts]
    missing = [f"{variable.name}, missing", *(str(len(v) - len(k)) for v, k in zip(parts, known))]
    if variable.kind == "categorical":
        return [*([f"{variable.name} {c}", *(str(k.count(c)) for k in known)] for c in variable.classes), missing]
    unit = f" ({variable.unit})" if variable.unit else ""
    digits = digits_of_values(variable)
    cells = [f"{np.mean(k):.{digits}f}, {_ends([min(k), max(k)], digits)}" if k else "-" for k in known]
    return [[f"{variable.name}{unit}: mean, range", *cells], missing]


def _ends(ends: Sequence[float], digits: int) -> str:
    """``22.9 to 77.9``, or ``22 to 77`` of whole numbers."""
    places = 0 if all(end == int(end) for end in ends) else digits
    return " to ".join(f"{end:.{places}f}" for end in ends)


def _histogram(variable: Variable, dataset: Dataset, parts: Mapping[str, str]) -> str:
    """Histogram of a number, a colour for each part; nothing where nobody has it."""
    records = dataset.index.records
    values = [
        [float(x) for r in records if parts.get(r.key) == p and (x := r.values.get(variable.name)) is not None]
        for p in PARTS
    ]
    if not any(values):
        return ""
    figure = Figure(figsize=(6.5, 2.4), layout="constrained")
    ax = figure.subplots()
    ax.hist(values, bins=20, stacked=True, label=PARTS, color=[COLOURS[p] for p in PARTS])
    ax.set(xlabel=f"{variable.name} ({variable.unit})" if variable.unit else variable.name, ylabel="scans")
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    return inline(figure, "svg")


def _model_card(pipeline: Pipeline, dataset: Dataset) -> list[tuple[str, str]]:
    """What the model is for, what it knows and does not know: (heading, text)."""
    meta = json.loads((pipeline.place("joint", FINAL) / "model" / "model.json").read_text())
    schema, training, grid = Schema.from_dict(meta["schema"]), meta.get("training") or {}, meta["grid"]
    names = [f"{v.name} ({v.kind})" for v in schema]
    known = training.get("variables", {})
    ranges = [
        f"{name} {_ends(facts['range'], digits_of_values(schema[name]))} {schema[name].unit or ''}".rstrip()
        for name, facts in known.items()
        if "range" in facts
    ]
    classes = [
        f"{name} " + ", ".join(f"{c} ({n})" for c, n in facts["classes"].items())
        for name, facts in known.items()
        if "classes" in facts
    ]
    return [
        ("Intended use", INTENDED_USE),
        ("Variables", ", ".join(names)),
        ("Learnt from", f"{len(training.get('names', ()))} people of the training and validation part"),
        ("Knows", "; ".join([*ranges, *classes]) or "not recorded"),
        ("Calibrated on", _calibrated(pipeline)),
        (
            "Scans",
            f"{' x '.join(map(str, grid['shape']))} voxels of {grid['spacing']:g} mm; {_preprocessing(dataset)}",
        ),
        ("Limits", " ".join(LIMITS)),
    ]


def _preprocessing(dataset: Dataset) -> str:
    recipe = dataset.index.provenance.get("recipe")
    return f"preprocessed by {', '.join(recipe['steps'])}" if recipe else "packed as they came, without preprocessing"


def _calibrated(pipeline: Pipeline) -> str:
    """On how many people the answers were calibrated, and for which site."""
    for stage in ("scalars", "joint"):
        path = pipeline.place(stage, FINAL) / "model" / "model.json"
        meta = json.loads(path.read_text()) if path.is_file() else {}
        if people := meta.get("extra", {}).get("calibrated on"):
            site = meta.get("site")
            return f"{people} held-out people" + (f", and for the site {site['name']}" if site else "")
    return "nothing: the intervals are those of the sampler"


def _stages(pipeline: Pipeline) -> Table:
    """Each stage with its identity and duration."""
    rows = []
    for name, _, folder in _steps(pipeline):
        record = read_record(folder)
        rows.append([name, record["fingerprint"], f"{record['seconds']:.0f}", _inputs(record)])
    return Table(["stage", "fingerprint", "seconds", "inputs"], rows)


def _inputs(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in record["inputs"].items()) or "none"


def _versions(pipeline: Pipeline) -> Table:
    """Versions of packages and the commit; several where stages were run by several of them."""
    found: dict[str, dict[str, None]] = {}
    for _, _, folder in _steps(pipeline):
        for name, value in read_state(folder).get("tags", {}).items():
            if name.startswith("version.") or name == "mlflow.source.git.commit":
                found.setdefault(name.removeprefix("version.").replace("mlflow.source.git.commit", "commit"), {})[
                    value
                ] = None
    return Table(["package", "version"], [[name, ", ".join(values)] for name, values in sorted(found.items())])


def _shards(dataset: Dataset) -> Table:
    """Every file of the packed data with its size and hash."""
    rows = [[path, f"{file['bytes']:,}", file["sha256"]] for path, file in sorted(dataset.index.files.items())]
    return Table(["file", "bytes", "SHA-256"], rows)
