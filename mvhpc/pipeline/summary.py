"""Results of a finished pipeline: the table, figures and further commands."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mvhpc.config import load_config
from mvhpc.evaluation.against_mean import compare
from mvhpc.evaluation.tables import (
    NOTHING,
    Table,
    constant_predictions,
    escape_markdown,
    label,
    read_predictions,
    scoreboard,
)
from mvhpc.inference.inpaint import InpaintConfig, inpaint_half
from mvhpc.inference.pictures import draw_over_number, fluid_of_dataset, fluid_of_tree, fluid_over_number
from mvhpc.inference.sampler import Sampler
from mvhpc.pipeline.plan import FINAL, RESULTS, Pipeline
from mvhpc.stages import STAGES
from shards.dataset import open_dataset
from shards.files import write_text
from shards.phantom.anatomy import best_possible
from shards.schema import Schema


def ideal_predictions(frame: pd.DataFrame, source: Path, given: Sequence[str], schema: Schema) -> pd.DataFrame:
    """Predictions of the phantoms' own law for the subjects of ``frame``: posterior median, most probable class.

    Args:
        frame: predictions, for their keys and true values.
        source: a folder of phantoms.
        given: known variables.
        schema: of the predicted variables.
    """
    ideal = best_possible(source, given).reindex(frame["subject"])
    answer = frame[["key", "subject"]].copy()
    for variable in schema.scalars:
        if variable.name not in frame:
            continue
        if variable.kind == "categorical":
            chances = ideal[list(variable.classes)].to_numpy()
            answer[variable.name] = [variable.classes[i] for i in chances.argmax(1)]
        else:
            answer[variable.name] = ideal[f"{variable.name}_median"].to_numpy()
        answer[f"{variable.name}_true"] = frame[f"{variable.name}_true"].to_numpy()
    return answer


def table_of_results(pipeline: Pipeline) -> tuple[Table, list[str]]:
    """Errors and accuracies of every query over all splits, of the mean and, for phantoms, the best possible ones.

    Returns:
        The table; of each query that gives something, whether it is better than predicting the mean; and why a query
        has no score.
    """
    dataset = open_dataset(pipeline.place("pack", FINAL))
    schema = dataset.index.schema
    phantom = (pipeline.source / "derivatives" / "phantom" / "anatomy.tsv").is_file()
    wanted = [v.name for v in schema.scalars if any(v.name in q.want for q in pipeline.config.queries)]
    ours: list[tuple[str, pd.DataFrame]] = []
    best: list[tuple[str, pd.DataFrame]] = []
    means: list[tuple[str, pd.DataFrame]] = []
    beside: dict[str, list[pd.DataFrame]] = {}  # label -> predictions, with those of the mean as NAME_mean
    for split in pipeline.splits:
        mean = constant_predictions(dataset, schema, wanted, split=split)
        means.append(("predicting the mean", mean))
        for query in pipeline.config.queries:
            frame, _ = read_predictions(pipeline.predictions(split, query))
            ours.append((label(query.given), frame))
            names = {name: f"{name}_mean" for name in query.want}
            both = frame.merge(mean[["key", *names]].rename(columns=names), on="key", how="left")
            beside.setdefault(label(query.given), []).append(both)
            if phantom and {*query.want, *query.given} <= {"image", "age", "sex"}:  # the law of these is known
                ideal = ideal_predictions(frame, pipeline.source, query.given, schema)
                best.append((f"best possible, given {label(query.given)}", ideal))
    verdicts = []
    for given, frames in beside.items():
        for name in wanted:
            if own := [frame for frame in frames if name in frame]:
                frame = pd.concat(own, ignore_index=True)
                found = compare(frame, frame[f"{name}_mean"].tolist(), schema[name])
                if found is None:
                    verdicts.append(f"{name} given {given}: no score, as {_why_no_score(frame, name)}")
                elif given != NOTHING:
                    verdicts.append(f"{name} given {given}: {found.verdict()}")
    return scoreboard([*ours, *means, *best], schema, wanted), verdicts


def _why_no_score(frame: pd.DataFrame, name: str) -> str:
    """Why nobody has both an answer and a recorded value: what the flags of all who were not answered have in common.

    Args:
        frame: predictions over all splits.
        name: of the wanted variable.
    """
    known = frame[frame[f"{name}_true"].notna()]
    if known.empty:
        return f"nobody of the test part has a recorded {name}"
    flags = [str(flag).split("; ") for flag in known["flag"]]
    common = [flag for flag in flags[0] if all(flag in other for other in flags)]
    own = [flag for flag in common if flag.startswith(f"{name} ")] or common
    return "; ".join(own) or "nobody is answered; the column flag of the table of predictions says why"


def collect_figures(pipeline: Pipeline) -> Path:
    """Collect reconstructions, synthetic people, an inpainted half and the effect of the first number in ``figures``.

    Without a validation part there are no reconstructions, without a volume in the test part no inpainting, without a
    number no picture of its effect. Pictures that take chains are drawn again only for another model.
    """
    folder = pipeline.root / "figures"
    folder.mkdir(exist_ok=True)
    synthetic = STAGES["generate"].run_folder(pipeline.place("generate", FINAL))
    for picture in (
        pipeline.place("vae", FINAL) / "figures" / "reconstruction.png",
        synthetic / "figures" / "people.png",
    ):
        if picture.is_file():
            shutil.copy(picture, folder)
    dataset = open_dataset(pipeline.place("pack", FINAL))
    volume = dataset.index.schema.volumes[0]
    places = dict.fromkeys(("out", "model", "image", "mask"), "")
    places["model"] = str(pipeline.place("joint", FINAL))
    sampler = Sampler.of(load_config(InpaintConfig, "inpaint", values=places))
    trained = (Path(places["model"]) / "model" / "model.json").stat().st_mtime
    key = next((key for key in dataset.keys("test", FINAL) if dataset.has(key, volume.name)), None)
    half = folder / "inpainted-half.png"
    if key is not None and _older(half, trained):
        _say(half)
        inpaint_half(sampler, dataset, key, half)
    number = next((v for v in dataset.index.schema.scalars if v.kind != "categorical"), None)
    if number is None:
        return folder
    ages = folder / f"drawn-over-{number.name}.png"
    if _older(ages, trained):
        _say(ages)
        draw_over_number(sampler, dataset, FINAL, ages)
    tree = Path(pipeline.place("generate", FINAL))
    if volume.suffix == "T1w" and tree.is_dir():
        fluid = folder / f"ventricles-over-{number.name}.png"
        _say(fluid)
        real = fluid_of_dataset(dataset, dataset.keys("test", FINAL), volume.name, number.name)
        drawn = fluid_of_tree(tree, number, volume, dataset.index.grid["spacing"])
        label = f"{number.name} ({number.unit})" if number.unit else number.name
        fluid_over_number(real, drawn, fluid, label)
    return folder


def _say(picture: Path) -> None:
    print(f"picture: {picture}", file=sys.stderr)


def _older(path: Path, time: float) -> bool:
    """Whether a file is not there, or was written before ``time``."""
    return not path.is_file() or path.stat().st_mtime < time


def summarize(pipeline: Pipeline) -> str:
    """Write ``results.md`` and ``figures`` to the pipeline's folder.

    Returns:
        Text to print: the table, the folder of figures and two further commands.
    """
    (table, verdicts), folder = table_of_results(pipeline), collect_figures(pipeline)
    lines = "".join(f"- {escape_markdown(verdict)}\n" for verdict in verdicts)
    write_text(pipeline.root / RESULTS, f"{table.markdown()}\n\n{lines}")
    return "\n".join(
        [
            "",
            table.text(),
            "95 % intervals in brackets, by bootstrap over subjects",
            "",
            *verdicts,
            "",
            f"figures    {folder}/ : {', '.join(sorted(path.name for path in folder.glob('*.png')))}",
            f"dashboard  mvhpc dashboard {pipeline.root}",
            f"predict    {_next_query(pipeline)}",
        ]
    )


def _next_query(pipeline: Pipeline) -> str:
    """A command that predicts all scalars given the volumes by the model to keep."""
    schema = open_dataset(pipeline.place("pack", FINAL)).index.schema
    given, want = (",".join(v.name for v in group) for group in (schema.volumes, schema.scalars))
    model, data = pipeline.place("joint", FINAL), pipeline.place("pack", FINAL)
    return f"mvhpc predict --model {model} --data {data} --given {given} --want {want} --out predictions.tsv"
