"""A comparison of methods: their answers, and the tables, figures and page that are made of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from mvhpc.evaluation import comparison_figures as figures
from mvhpc.evaluation import paper_tables
from mvhpc.evaluation.answers import Answers
from mvhpc.evaluation.paper_tables import Result
from mvhpc.evaluation.systematic import group_order
from mvhpc.evaluation.tables import escape_markdown
from shards.files import write_text
from shards.schema import Schema, Value, Variable

Query = tuple[str, tuple[str, ...]]  # wanted variable, given ones in the schema's order
Key = tuple[str, str, tuple[str, ...]]  # method, wanted variable, given ones


@dataclass
class Comparison:
    """The answers of all methods.

    Attributes:
        schema: of the data.
        methods: rows, in order.
        queries: columns, in order; of each wanted variable the first gives everything else.
        found: answers about the evaluated people.
        fitted: answers about the validation part, for the correction of slopes.
        notes: for readers.
    """

    schema: Schema
    methods: list[str]
    queries: list[Query]
    found: dict[Key, Answers] = field(default_factory=dict)
    fitted: dict[Key, Answers] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def add(into: dict[Key, Answers], answers: Answers) -> None:
        """Take answers, as further rows where the method has some to this query already."""
        key = (answers.method, answers.variable.name, answers.given)
        if key in into:
            answers = replace(answers, frame=pd.concat([into[key].frame, answers.frame], ignore_index=True))
        into[key] = answers

    @property
    def variables(self) -> list[Variable]:
        """The wanted variables that somebody answers, in order."""
        names = dict.fromkeys(want for want, _ in self.queries)
        return [self.schema[name] for name in names if self.of(name)]

    def givens(self, want: str) -> list[tuple[str, ...]]:
        """The choices of given variables for a wanted one, everything else first."""
        return [given for w, given in self.queries if w == want]

    def of(self, want: str, given: tuple[str, ...] | None = None) -> list[Answers]:
        """The answers about a variable, methods and queries in order; to one query where it is named."""
        order = [(m, w, g) for m in self.methods for w, g in self.queries if w == want and given in (None, g)]
        return [self.found[key] for key in order if key in self.found]

    def headline(self, want: str) -> list[Answers]:
        """The answers about a variable given everything else."""
        return self.of(want, self.givens(want)[0])

    def table(self) -> pd.DataFrame:
        """Every answer to every query, one row for each visit."""
        parts = []
        for (method, want, given), answers in self.found.items():
            frame = answers.frame.drop(columns="subject")
            for place, (name, value) in enumerate(
                {"method": method, "variable": want, "given": ",".join(given)}.items()
            ):
                frame.insert(place, name, value or "n/a")
            parts.append(frame)
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def make_tables(
    comparison: Comparison, generation: Mapping[str, pd.DataFrame], values: Callable[[str, str], Value]
) -> Iterator[Result]:
    """All tables, the paper's first.

    Args:
        comparison: the answers.
        generation: by method, what was measured of its drawn volumes, see :func:`.paper_tables.table_1`.
        values: (key, name of a scalar) -> recorded value.
    """
    variables = comparison.variables
    headline = [comparison.headline(v.name) for v in variables]
    volumes = {v.name for v in comparison.schema.volumes}
    everything = [a for v in variables for a in comparison.of(v.name)]
    yield paper_tables.table_1(comparison.methods, headline, generation)
    for v in variables:
        yield paper_tables.table_2(v, comparison.givens(v.name), comparison.of(v.name))
    others = [paper_tables.comparisons(v, comparison.givens(v.name), comparison.of(v.name)) for v in variables]
    others += [
        paper_tables.calibration(everything),
        paper_tables.by_group(headline, comparison.schema.scalars, values),
        paper_tables.dependence(everything, comparison.fitted),
        paper_tables.retest([a for a in everything if volumes & {*a.given}]),
    ]
    yield from (result for result in others if result is not None)


def draw_figures(comparison: Comparison, results: Sequence[Result], folder: Path) -> list[str]:
    """Draw all figures to ``folder``; their names, in order."""
    folder.mkdir()
    wanted: dict[str, Callable[[Path], None]] = {}
    colour = figures.colours(comparison.methods)
    groups = next((result.numbers for result in results if result.name == "groups"), None)
    for v in comparison.variables:
        name, first = v.name, comparison.headline(v.name)
        wanted[f"scores-{name}"] = partial(figures.scores, v, comparison.of(name), colour)
        laws = [a for a in first if a.has("confidence" if a.category else "pit")]
        if laws and v.kind == "categorical":
            wanted[f"reliability-{name}"] = partial(figures.reliability_of_category, v, laws)
        elif laws:
            wanted[f"calibration-{name}"] = partial(figures.calibration_of_number, v, laws, colour)
        if v.kind != "categorical" and any(np.isfinite(a.scores).any() for a in first):
            wanted[f"predicted-{name}"] = partial(figures.against_truth, v, first)
        if groups is not None and (groups["variable"] == name).any():
            own = groups[groups["variable"] == name]
            orders = {
                by: group_order(own[own["by"] == by]["group"].tolist(), comparison.schema[by])
                for by in dict.fromkeys(own["by"])
            }
            wanted[f"groups-{name}"] = partial(figures.groups, own, v, orders, colour)
    with matplotlib.rc_context({"text.parse_math": False}):  # names may have dollar signs
        for name, figure in wanted.items():
            figure(folder / f"{name}.png")
    return list(wanted)


def write_result(folder: Path, result: Result) -> None:
    """``NAME.tsv`` with the numbers, ``NAME.md`` and ``NAME.tex`` for readers."""
    folder.mkdir(exist_ok=True)
    result.numbers.to_csv(folder / f"{result.name}.tsv", sep="\t", index=False, na_rep="n/a", float_format="%.6g")
    write_text(folder / f"{result.name}.md", f"{result.text.markdown()}\n")
    write_text(folder / f"{result.name}.tex", f"{result.text.latex()}\n")


def page(results: Sequence[Result], drawn: Sequence[str], notes: Sequence[str]) -> str:
    """``results.md``: all tables and figures."""
    lines = ["# Comparison of models", "", *(f"- {escape_markdown(note)}" for note in notes), ""]
    for result in results:
        lines += [f"## {result.title}", "", result.text.markdown(), "", result.note, ""]
    return "\n".join([*lines, "## Figures", "", *(f"![{name}](figures/{name}.png)\n" for name in drawn)])
