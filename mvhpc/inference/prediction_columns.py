"""What the columns of a table of predictions mean, for its BIDS sidecar."""

from collections.abc import Sequence
from typing import Any

from shards.schema import Schema, Variable

QUANTILES = (5, 25, 50, 75, 95)  # %, of a predicted number
NONE = "n/a"  # unit of what has none
IDS = {
    "participant_id": {"Description": "participant", "Units": NONE},
    "session_id": {"Description": "session; n/a where the participant has no sessions", "Units": NONE},
}
OTHERS = {
    "draw": {"Description": "number of the joint draw", "Units": NONE},
    "typicality": {
        "Description": "p-value of the scan's distance from held-out people of the training, 0 to 1",
        "Units": NONE,
    },
    "not_given": {"Description": "given variables that the participant lacks, which are unknown then", "Units": NONE},
    "flag": {"Description": "ok, or what is doubtful about the scan or its answers", "Units": NONE},
}


def describe_columns(schema: Schema, want: Sequence[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Description and unit of each column, and of a category its levels.

    Args:
        schema: of the model.
        want: the predicted variables.
        columns: of the table, in order.

    Raises:
        KeyError: a column without description.
    """
    known: dict[str, dict[str, Any]] = {**IDS, **OTHERS}
    for name in want:
        known |= _of_category(schema[name]) if schema[name].kind == "categorical" else _of_number(schema[name])
    return {column: known[column] for column in columns}


def describe_draws(schema: Schema, want: Sequence[str]) -> dict[str, dict[str, Any]]:
    """As :func:`describe_columns`, of the table of joint draws."""
    found: dict[str, dict[str, Any]] = {**IDS, "draw": OTHERS["draw"]}
    for name in want:
        text = f"{name}, drawn jointly with the other columns of the row"
        found[name] = {"Description": text, "Units": schema[name].unit or NONE}
        if schema[name].kind == "categorical":
            found[name]["Levels"] = {c: c for c in schema[name].classes}
    return found


def _of_category(v: Variable) -> dict[str, dict[str, Any]]:
    levels = {"Levels": {c: c for c in v.classes}, "Units": NONE}
    found: dict[str, dict[str, Any]] = {v.name: {"Description": f"most probable {v.name}", **levels}}
    for c in v.classes:
        found[f"{v.name}_p_{c}"] = {"Description": f"probability that {v.name} is {c}, 0 to 1", "Units": NONE}
    return found | {f"{v.name}_true": {"Description": f"recorded {v.name}", **levels}}


def _of_number(v: Variable) -> dict[str, dict[str, Any]]:
    law = f"the predicted distribution of {v.name}"
    texts = {v.name: f"mean of {law}", f"{v.name}_sd": f"standard deviation of {law}"}
    texts |= {f"{v.name}_q{q:02d}": f"{q} % quantile of {law}" for q in QUANTILES}
    texts[f"{v.name}_crps"] = f"continuous ranked probability score of {law}, for the recorded value"
    below = f"probability that {law} gives to less than the recorded value, 0 to 1"
    texts[f"{v.name}_true"] = f"recorded {v.name}"
    found = {column: {"Description": text, "Units": v.unit or NONE} for column, text in texts.items()}
    return found | {f"{v.name}_pit": {"Description": below, "Units": NONE}}
