"""The model card of an exported model, in Markdown, from its ``model.json``."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from mvhpc.models.training_people import TrainingPeople

KINDS = {
    "scalars": "predicts scalars of a person from voxels or tissue maps, with their distributions",
    "joint": "joint diffusion model: predicts scalars, and draws, translates and fills in volumes",
    "baseline": "a network for a single query, for comparison",
    "autoencoder": "encodes volumes to latents and decodes them",
}
USES = {
    "scalars": "mvhpc predict --bids SCANS --model {0} --out answers",
    "joint": "mvhpc generate --model {0} --count 10 --out synthetic",
    "baseline": "mvhpc predict --model {0} --data PACKED --given {1} --want {2} --out answers.tsv",
    "autoencoder": "mvhpc encode vae={0} data=PACKED out=latents",
}
INTENDED_USE = (
    "Research on groups of people: predicting scalars of a brain scan with an interval, drawing synthetic scans, "
    "filling in missing parts. It is not a medical device, and no answer is a diagnosis."
)
LIMITS = (
    "Scans of another scanner or preprocessing than those of the training get worse answers: see the column `flag`, "
    "and `mvhpc calibrate` with labelled people of the site.",
    "Values, classes and contrasts that the training did not have are extrapolated.",
    "Predictions of numbers are drawn towards the mean of the training.",
    "Errors differ between groups, and are passed on to whatever uses the answers.",
)


def model_card(meta: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> str:
    """The card.

    Args:
        meta: content of ``model.json``.
        recipe: of the preprocessing of the training's scans; None where it is not known.
    """
    return "\n".join(_lines(meta, recipe)) + "\n"


def _lines(meta: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> Iterator[str]:
    kind, schema = meta["kind"], meta.get("schema", {})
    yield f"# mvhpc model: {', '.join(schema) or kind}"
    yield ""
    yield f"Kind `{kind}`: {KINDS[kind]}. Written by mvhpc {version('mvhpc')}."
    if meta.get("given") is not None:
        yield f"It answers one query: {meta['want']} given {', '.join(meta['given']) or 'nothing'}."
    yield from ["", "## Use", "", INTENDED_USE, ""]
    use = USES[kind].format("THIS_FOLDER", ",".join(meta.get("given", [])), meta.get("want"))
    yield from ["```", use, "```", ""]
    if kind != "autoencoder":
        yield "It is a MONAI bundle too (`pip install fire`); any key of `configs/inference.json` can be set:"
        yield from ["", "```", "python -m monai.bundle run --config_file THIS_FOLDER/configs/inference.json"]
        yield from ["```", ""]
        yield "`mvhpc predict` refuses the model where it does not give the answer in `known_answer.json`."
        yield ""
    if schema:
        yield from _variables(schema, (meta.get("training") or {}).get("variables", {}))
    yield from _data(meta, recipe)
    yield from ["## Limits", ""]
    yield from (f"- {text}" for text in LIMITS)
    if figures := _figures(meta):
        yield from ["", "## Figures of the training", "", "| figure | value |", "|---|---:|", *figures]


def _variables(schema: Mapping[str, Any], people: Mapping[str, Any]) -> Iterator[str]:
    yield from ["## Variables", "", "| variable | kind | of the training |", "|---|---|---|"]
    for name, spec in schema.items():
        facts = people.get(name, {})
        known = [f"{facts['people']} people"] if "people" in facts else []
        if "range" in facts:
            known.append(f"{facts['range'][0]:g} to {facts['range'][1]:g} {spec.get('unit') or ''}".rstrip())
            known.append(f"mean {facts['mean']:.4g}")
        known += [f"{text} {count}" for text, count in facts.get("classes", {}).items()]
        known += ["one value alone: not predicted"] * bool(TrainingPeople(variables=people).uniform(name))
        kind = f"{spec['kind']} ({spec['suffix']})" if spec.get("suffix") else spec["kind"]
        yield f"| {name} | {kind} | {', '.join(known) or 'not recorded'} |"
    yield ""


def _data(meta: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> Iterator[str]:
    yield from ["## Data", ""]
    if grid := meta.get("grid"):
        yield f"Volumes of {' x '.join(map(str, grid['shape']))} voxels of {grid['spacing']:g} mm (RAS), in [0, 1]."
    if recipe:
        yield f"Preprocessing (`configs/recipe.json`): {', '.join(recipe['steps'])}."
    else:
        yield "Scans were packed as they were; no recipe of a preprocessing is recorded."
    if site := (meta.get("site") or (meta.get("scalars") or {}).get("site")):
        yield f"Calibrated for the site {site['name']} by {site['people']} people: {', '.join(site['scalars'])}."
    yield "Names of people are not in these files; keyed hashes tell whether a scan was among the training's."
    yield ""


def _figures(meta: Mapping[str, Any]) -> list[str]:
    """Rows of numbers, as training left them."""
    rows = []
    for name, value in (meta.get("extra") or {}).items():
        for key, number in value.items() if isinstance(value, Mapping) else [("", value)]:
            if isinstance(number, int | float):
                rows.append(f"| {' '.join(filter(None, (name, key)))} | {number:.4g} |")
    return rows
