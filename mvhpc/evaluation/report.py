"""What a finished pipeline has to say: the table of answers, and where to look next."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from mvhpc.config import InpaintConfig, load_config
from mvhpc.evaluation.tables import Table, constant_predictions, label, read_predictions, scoreboard
from mvhpc.inference.chains import Sampler
from mvhpc.inference.inpaint import inpaint_half
from mvhpc.run import run_folder
from shards.files import write_text
from shards.loader import open_dataset
from shards.schema import Schema

if TYPE_CHECKING:
    from mvhpc.pipeline import Pipeline


def ideal_predictions(frame: pd.DataFrame, source: Path, given: Sequence[str], schema: Schema) -> pd.DataFrame:
    """What the phantom's own law answers about the people of ``frame``: posterior median, most probable class.

    Args:
        frame: predictions, for their keys and true values.
        source: a folder of phantoms.
        given: the variables that are known.
        schema: of the predicted variables.
    """
    from shards.anatomy import best_possible

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


def table_of_answers(pipeline: "Pipeline") -> Table:
    """Errors and accuracies of every question over all splits, beside the mean and, for phantoms, the best possible."""
    dataset = open_dataset(pipeline.root / "packed")
    schema = dataset.index.schema
    phantom = (pipeline.source / "derivatives" / "phantom" / "anatomy.tsv").is_file()
    wanted = [v.name for v in schema.scalars if any(v.name in q.want for q in pipeline.config.questions)]
    ours: list[tuple[str, pd.DataFrame]] = []
    best: list[tuple[str, pd.DataFrame]] = []
    means: list[tuple[str, pd.DataFrame]] = []
    for split, folder in pipeline.splits.items():
        for question in pipeline.config.questions:
            frame, _ = read_predictions(pipeline.predictions(folder, question))
            ours.append((label(question.given), frame))
            if phantom and {*question.want, *question.given} <= {"image", "age", "sex"}:  # whose law is known
                ideal = ideal_predictions(frame, pipeline.source, question.given, schema)
                best.append((f"best possible, given {label(question.given)}", ideal))
        means.append(("predicting the mean", constant_predictions(dataset, schema, wanted, split=split)))
    return scoreboard([*ours, *means, *best], schema, wanted)


def collect_figures(pipeline: "Pipeline") -> Path:
    """Reconstructions, synthetic people and an inpainted half of a test volume, side by side in ``figures``."""
    folder = pipeline.root / "figures"
    folder.mkdir(exist_ok=True)
    split, trained = list(pipeline.splits.items())[-1]
    shutil.copy(trained / "vae" / "figures" / "reconstruction.png", folder)
    shutil.copy(run_folder("generate", str(pipeline.root / "synthetic")) / "figures" / "people.png", folder)
    places = dict.fromkeys(("out", "model", "image", "mask"), "")
    sampling = load_config(InpaintConfig, "inpaint", values=places).sampling
    dataset = open_dataset(pipeline.root / "packed")
    volume = dataset.index.schema.volumes[0].name
    key = next(key for key in dataset.keys("test", split) if dataset.has(key, volume))
    inpaint_half(Sampler(trained / "joint", sampling), dataset, key, folder / "inpainted-half.png")
    return folder


def report(pipeline: "Pipeline") -> str:
    """Write ``results.md`` and ``figures`` into the pipeline's folder.

    Returns:
        what to print: the table, and three lines that say what to open next.
    """
    table = table_of_answers(pipeline)
    write_text(pipeline.root / "results.md", table.markdown() + "\n")
    return "\n".join(
        [
            "",
            table.text(),
            "95 % intervals in brackets, by bootstrap over subjects",
            "",
            f"figures    {collect_figures(pipeline)}/ : reconstruction.png, people.png, inpainted-half.png",
            f"dashboard  mvhpc dashboard {pipeline.root}",
            f"ask more   {_next_question(pipeline)}",
        ]
    )


def _next_question(pipeline: "Pipeline") -> str:
    """A command that asks the last model for all scalars given the volumes."""
    schema = open_dataset(pipeline.root / "packed").index.schema
    given, want = (",".join(v.name for v in group) for group in (schema.volumes, schema.scalars))
    model = list(pipeline.splits.values())[-1] / "joint"
    return (
        f"mvhpc predict --model {model} --data {pipeline.root / 'packed'} "
        f"--given {given} --want {want} --out answers.tsv"
    )
