"""What a finished pipeline has to say: the table of answers, and where to look next."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from mvhpc.evaluation.tables import Table, constant_predictions, label, read_predictions, scoreboard
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
            if phantom:
                ideal = ideal_predictions(frame, pipeline.source, question.given, schema)
                best.append((f"best possible, given {label(question.given)}", ideal))
        means.append(("predicting the mean", constant_predictions(dataset, schema, wanted, split=split)))
    return scoreboard([*ours, *means, *best], schema, wanted)


def report(pipeline: "Pipeline") -> str:
    """Write ``results.md`` into the pipeline's folder.

    Returns:
        what to print: the table and the places of figures, table and dashboard.
    """
    table = table_of_answers(pipeline)
    write_text(pipeline.root / "results.md", table.markdown() + "\n")
    return "\n".join(
        [
            "",
            f"{table.text()}",
            "95 % intervals in brackets, by bootstrap over subjects",
            "",
            f"figures    {pipeline.root}/*/figures and {pipeline.root}/*.run/figures",
            f"dashboard  mvhpc dashboard {pipeline.root}",
            f"ask more   mvhpc predict --model {pipeline.root}/joint --data {pipeline.root}/packed --given image "
            f"--want {','.join(v for v in table.header[1:2])}",
        ]
    )
