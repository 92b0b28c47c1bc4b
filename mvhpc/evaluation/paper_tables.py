"""The tables of a comparison: those of the paper, and what stands behind them. Each has numbers and text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from mvhpc.evaluation.answers import Answers
from mvhpc.evaluation.calibration import BINS, SHARES, calibrated_error, inside, reliability
from mvhpc.evaluation.comparisons import compare_all
from mvhpc.evaluation.metrics import FEWEST, RELIABLE, Estimate, Floats, mean_over_subjects, share_of_subjects
from mvhpc.evaluation.systematic import between_visits, corrected, error_line, group_order, groups_of, slope
from mvhpc.evaluation.tables import Table, label
from shards.schema import Value, Variable

NONE = "–"  # a method cannot answer


@dataclass(frozen=True)
class Result:
    """One table.

    Attributes:
        name: of its files.
        title: above it.
        text: for readers.
        numbers: for programs, one number a cell.
        note: what the cells mean.
    """

    name: str
    title: str
    text: Table
    numbers: pd.DataFrame
    note: str = ""


def digits_of(variable: Variable) -> int:
    """Decimal places of accuracies, or of errors of a number: 2 for a range of ages, more for a narrow range."""
    if variable.kind == "categorical":
        return 3
    span = variable.range[1] - variable.range[0]
    return int(np.clip(4 - np.floor(np.log10(span)), 0, 6)) if np.isfinite(span) else 2


def digits_of_values(variable: Variable) -> int:
    """Decimal places of values of a number: 1 for a range of ages."""
    return max(1, digits_of(variable) - 1)


def measure(variable: Variable) -> str:
    """``age error (years)`` or ``sex accuracy``."""
    unit = f" ({variable.unit})" if variable.unit else ""
    return f"{variable.name} accuracy" if variable.kind == "categorical" else f"{variable.name} error{unit}"


def score_of(answers: Answers) -> Estimate:
    """Mean absolute error or accuracy."""
    mean = share_of_subjects if answers.category else mean_over_subjects
    return mean(answers.scores, answers.subjects)


def score_text(answers: Answers) -> str:
    """``4.50 ± 3.46 [4.10, 4.93]``, or ``0.82 [0.79, 0.84]`` of a category."""
    found = score_of(answers)
    if not found.n:
        return NONE
    digits = digits_of(answers.variable)
    if answers.category:
        return found.format(digits)
    interval = found.format(digits).partition(" ")[2]
    sd = f" ± {_sd(answers.scores):.{digits}f}" if np.isfinite(answers.scores).sum() > 1 else ""
    return f"{found.value:.{digits}f}{sd} {interval}".rstrip()


def numbers_of(answers: Answers) -> dict[str, float | str | int | None]:
    """One row of ``scores``: everything that is one number about the answers to one query."""
    found, category = score_of(answers), answers.category
    name = "accuracy" if category else "error"
    row: dict[str, float | str | int | None] = {
        "method": answers.method,
        "variable": answers.variable.name,
        "given": label(answers.given),
        "people": found.n,
        "visits": int(np.isfinite(answers.scores).sum()),
        name: found.value,
        f"{name}_low": found.low,
        f"{name}_high": found.high,
    }
    if category:
        if answers.has("confidence"):
            row |= calibration_of_category(answers)
        return row
    row |= {"error_sd": _sd(answers.scores), "rmse": _rmse(answers.errors)}
    if answers.has("sd"):
        row["sample_variance"] = float(np.nanmean(answers.column("sd") ** 2))
    return row | (calibration_of_number(answers) if answers.has("pit") else {})


def calibration_of_number(answers: Answers) -> dict[str, float | str | int | None]:
    """Coverage of central intervals, and the CRPS, with intervals over subjects."""
    pit = answers.column("pit")
    found_of = {f"coverage_{share}": share_of_subjects(inside(pit, share), answers.subjects) for share in SHARES}
    found_of["crps"] = mean_over_subjects(answers.column("crps"), answers.subjects)
    row: dict[str, float | str | int | None] = {}
    for name, found in found_of.items():
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return row


def calibration_of_category(answers: Answers) -> dict[str, float | str | int | None]:
    """Expected calibration error, and that of as many people of a calibrated model."""
    known = np.isfinite(answers.scores) & np.isfinite(answers.column("confidence"))
    confidence, right = answers.column("confidence")[known], answers.scores[known]
    if not len(confidence):
        return {}
    return {
        "calibration_error": reliability(confidence, right).error,
        "calibration_error_if_calibrated": calibrated_error(confidence),
    }


def table_1(
    methods: Sequence[str], headline: Sequence[Sequence[Answers]], generation: Mapping[str, pd.DataFrame]
) -> Result:
    """The paper's table 1: methods in rows; generation, then each variable given everything else, in columns.

    Args:
        methods: rows, in order.
        headline: for each variable, the answers given everything else.
        generation: by method, what was measured of its drawn volumes: ``measure``, ``value`` and, where known,
            ``low``, ``high``.
    """
    measures = list(dict.fromkeys(m for frame in generation.values() for m in frame["measure"]))
    found = [of_variable[0] for of_variable in headline if of_variable]
    header = ["method", *measures, *(f"{measure(a.variable)}, given {label(a.given)}" for a in found)]
    by_name = [{a.method: a for a in of_variable} for of_variable in headline if of_variable]
    rows, numbers = [], []
    for method in methods:
        cells: list[str] = [method]
        values: dict[str, object] = {"method": method}
        for name in measures:
            frame = generation.get(method)
            row = None if frame is None else frame[frame["measure"] == name]
            known = row is not None and len(row) > 0
            estimate = _generated(row.iloc[0]) if known and row is not None else None
            cells.append(estimate.format(2) if estimate else NONE)
            values |= {name: estimate.value if estimate else np.nan}
        for of_variable in by_name:
            cells.append(score_text(of_variable[method]) if method in of_variable else NONE)
            if method in of_variable:
                values |= _prefixed(numbers_of(of_variable[method]))
        rows.append(cells)
        numbers.append(values)
    note = "Numbers: mean absolute error ± its SD over visits; brackets: 95 % interval of a bootstrap over people."
    return Result("table-1", "Generation, regression and classification", Table(header, rows), _frame(numbers), note)


def table_2(variable: Variable, givens: Sequence[tuple[str, ...]], answers: Sequence[Answers]) -> Result:
    """The paper's table 2: a variable given every choice of the others.

    Args:
        variable: the wanted one.
        givens: columns.
        answers: of this variable, methods in order.
    """
    cells = {(a.method, a.given): a for a in answers}
    rows = []
    for method in dict.fromkeys(a.method for a in answers):
        own = [cells.get((method, given)) for given in givens]
        rows.append([method, measure(variable), *(score_text(a) if a else NONE for a in own)])
        if any(a is not None and a.has("sd") for a in own):
            variances = [_variance(a) if a else NONE for a in own]
            rows.append([method, "mean sample variance", *variances])
    header = ["method", "", *(f"given {label(given)}" for given in givens)]
    title = f"{variable.name[:1].upper()}{variable.name[1:]}, whatever is given"
    note = "Mean sample variance: of the predicted distributions, squared units, mean over visits."
    numbers = _frame([numbers_of(a) for a in answers])
    return Result(
        f"table-2-{variable.name}",
        title,
        Table(header, rows, 2),
        numbers,
        note if any(a.has("sd") for a in answers) else "",
    )


def comparisons(variable: Variable, givens: Sequence[tuple[str, ...]], answers: Sequence[Answers]) -> Result | None:
    """Every two methods on every query of a variable; None where no two answered one."""
    rows, numbers = [], []
    for given in givens:
        own = [a for a in answers if a.given == given]
        frames = [pd.Series(a.scores, index=a.frame["key"], name=k) for k, a in enumerate(own)]
        subjects = pd.concat([a.frame.set_index("key")["subject"] for a in own]) if own else pd.Series(dtype=str)
        if len(own) < 2:
            continue
        scores = pd.concat(frames, axis=1).sort_index()
        people = subjects[~subjects.index.duplicated()].reindex(scores.index).astype(str).tolist()
        for d in compare_all(scores.to_numpy(float), people):
            first, second = own[d.first].method, own[d.second].method
            digits = digits_of(variable)
            p = NONE if np.isnan(d.p) else f"{d.p:.4f}" if d.p >= 0.0001 else "<0.0001"
            better = _better(d.gap, first, second, variable.kind == "categorical")
            rows.append([label(given), first, second, d.gap.format(digits), p, better, str(d.gap.n)])
            low, high = d.gap.low, d.gap.high
            values = {"given": label(given), "first": first, "second": second, "difference": d.gap.value}
            numbers.append(values | {"low": low, "high": high, "p_adjusted": d.p, "people": d.gap.n})
    if not rows:
        return None
    header = ["given", "first", "second", f"first less second, {measure(variable)}", "p", "better", "people"]
    note = (
        "Paired over the people whom both answered. All intervals of one choice of given variables hold together with "
        "95 %; p is adjusted for their number (max-t bootstrap over people). Of fewer than "
        f"{FEWEST} people there is neither: no difference could be shown."
    )
    name = variable.name
    return Result(f"comparisons-{name}", f"Every two methods: {name}", Table(header, rows, 3), _frame(numbers), note)


def calibration(answers: Sequence[Answers]) -> Result | None:
    """Calibration of every method and query that predicts distributions or probabilities."""
    kept = [a for a in answers if a.has("confidence" if a.category else "pit")]
    numbers, rows = [numbers_of(a) for a in kept], []
    for a, row in zip(kept, numbers):
        cells = [a.method, a.variable.name, label(a.given)]
        cells += [f"{100 * v:.0f} %" if isinstance(v := row.get(f"coverage_{s}"), float) else NONE for s in SHARES]
        digits = digits_of(a.variable)
        for name, places in (("crps", digits), ("calibration_error", 3), ("calibration_error_if_calibrated", 3)):
            value = row.get(name)
            cells.append(f"{value:.{places}f}" if isinstance(value, float) else NONE)
        rows.append(cells)
    if not rows:
        return None
    header = ["method", "variable", "given", *(f"in {s} %" for s in SHARES)]
    header += ["CRPS", "calibration error", "if calibrated"]
    note = (
        "In 50 % to 95 %: how often the truth lies in the central interval of that probability. Calibration error: "
        f"expected calibration error in {BINS} bins; beside it, that of as many people of a calibrated model."
    )
    return Result("calibration", "Calibration", Table(header, rows, 3), _frame(numbers), note)


def by_group(
    headline: Sequence[Sequence[Answers]], schema: Sequence[Variable], values: Callable[[str, str], Value]
) -> Result | None:
    """Error or accuracy, given everything else, in each group of people by each scalar.

    Args:
        headline: for each variable, the answers given everything else.
        schema: the scalars.
        values: (key, name of a scalar) -> recorded value.
    """
    rows, numbers = [], []
    everything = [a for of_variable in headline for a in of_variable]
    keys = sorted({key for a in everything for key in a.frame["key"]})
    group_of = {v.name: dict(zip(keys, groups_of([values(key, v.name) for key in keys], v))) for v in schema}
    for answers in everything:
        for v in schema:
            labels = [group_of[v.name][key] for key in answers.frame["key"]]
            for group in group_order(labels, v):
                chosen = np.array([name == group for name in labels])
                people = [s for s, there in zip(answers.subjects, chosen) if there]
                found = score_of(replace(answers, frame=answers.frame[chosen]))
                if not found.n:
                    continue
                digits = digits_of(answers.variable)
                bias = None if answers.category else mean_over_subjects(answers.errors[chosen], people)
                cells = [answers.method, measure(answers.variable), v.name, group, found.format(digits)]
                rows.append([*cells, bias.format(digits) if bias else NONE, str(found.n)])
                row: dict[str, object] = {"method": answers.method, "variable": answers.variable.name}
                row |= {"by": v.name, "group": group}
                row |= {"score": found.value, "low": found.low, "high": found.high, "people": found.n}
                numbers.append(row | ({"bias": bias.value} if bias else {}))
    if not rows:
        return None
    header = ["method", "measure", "by", "group", "score", "mean signed error", "people"]
    note = (
        "Given everything else. Mean signed error: predicted less true. Intervals of fewer than "
        f"{RELIABLE} people are too narrow."
    )
    return Result("groups", "Error by group", Table(header, rows, 4), _frame(numbers), note)


def dependence(answers: Sequence[Answers], fitted: Mapping[tuple[str, str, tuple[str, ...]], Answers]) -> Result | None:
    """Slope of the error on the true value, before and after the usual correction, fitted on the validation part.

    Args:
        answers: of numbers.
        fitted: (method, variable, given) -> answers about the validation part.
    """
    rows, numbers = [], []
    for a in answers:
        if a.category or a.frame["value"].nunique() < 2:  # the slope of a constant is -1
            continue
        digits, true = digits_of(a.variable), a.column("true")
        bias, raw = mean_over_subjects(a.errors, a.subjects), slope(true, a.errors, a.subjects)
        cells = [a.method, a.variable.name, label(a.given), bias.format(digits), raw.format(2)]
        row = {"method": a.method, "variable": a.variable.name, "given": label(a.given), "bias": bias.value}
        row |= {"slope": raw.value, "slope_low": raw.low, "slope_high": raw.high}
        other = fitted.get((a.method, a.variable.name, a.given))
        line = error_line(other.column("true"), other.errors) if other else None
        if other is not None and line is not None:
            after = slope(true, corrected(true, a.errors, line), a.subjects)
            people = len({s for s, e in zip(other.subjects, other.errors) if np.isfinite(e)})
            cells += [after.format(2), str(people)]
            row |= {"slope_corrected": after.value, "slope_corrected_low": after.low}
            row |= {"slope_corrected_high": after.high, "fitted_on": people}
        else:
            cells += [NONE, NONE]
        rows.append(cells)
        numbers.append(row)
    if not rows:
        return None
    header = ["method", "variable", "given", "mean signed error", "slope", "slope, corrected", "fitted on"]
    note = (
        "Slope of the error on the true value: 0 for an unbiased reading, -1 for a constant. The correction subtracts "
        "the line of the validation part's errors; it uses the true value, so corrected predictions are none and have "
        "no error of their own. Models of scalars have learnt from the validation part, where their slope is flatter."
    )
    return Result("dependence", "Error on the true value", Table(header, rows, 3), _frame(numbers), note)


def retest(answers: Sequence[Answers]) -> Result | None:
    """Differences between visits of one person; None where nobody has two.

    Args:
        answers: given a volume; a method that says the same of everybody is left out.
    """
    rows, numbers = [], []
    for a in answers:
        if a.frame["value"].nunique() < 2:
            continue
        values = _codes(a) if a.category else a.errors
        apart, within = between_visits(a.frame["key"].tolist(), a.subjects, values, a.category)
        if not apart.n:
            continue
        digits = digits_of(a.variable)
        cells = [a.method, a.variable.name, label(a.given), apart.format(digits)]
        rows.append([*cells, NONE if a.category else f"{within:.{digits}f}", str(apart.n)])
        row = {"method": a.method, "variable": a.variable.name, "given": label(a.given), "difference": apart.value}
        row |= {"low": apart.low, "high": apart.high, "people": apart.n}
        numbers.append(row | ({} if a.category else {"within_person_sd": within}))
    if not rows:
        return None
    header = ["method", "variable", "given", "between visits", "SD within a person", "people"]
    note = (
        "Of people with several visits. Numbers: mean absolute difference of the errors of consecutive visits, which "
        "leaves out what a person ages. Categories: how often the answer changes."
    )
    return Result("retest", "Test and retest", Table(header, rows, 3), _frame(numbers), note)


def _codes(answers: Answers) -> Floats:
    """Answered classes as numbers (N,), NaN without an answer."""
    codes = pd.factorize(answers.frame["value"])[0].astype(float)  # -1 where missing
    return np.where(codes < 0, np.nan, codes)


def _better(gap: Estimate, first: str, second: str, larger: bool) -> str:
    """The better of two methods, where the interval of their difference leaves out 0."""
    if not (gap.low > 0 or gap.high < 0):
        return NONE
    return first if (gap.value > 0) == larger else second


def _sd(scores: Floats) -> float:
    """SD of the scores, NaN of fewer than two."""
    return float(np.nanstd(scores)) if np.isfinite(scores).sum() > 1 else float("nan")


def _rmse(errors: Floats) -> float:
    known = errors[np.isfinite(errors)]
    return float(np.sqrt(np.mean(known**2))) if len(known) else float("nan")


def _variance(answers: Answers) -> str:
    if not answers.has("sd"):
        return NONE
    value = float(np.nanmean(answers.column("sd") ** 2))
    return f"{value:.{max(0, digits_of(answers.variable) - 1)}f}"


def _generated(row: "pd.Series[float]") -> Estimate:
    low, high = (float(row.get(name, np.nan)) for name in ("low", "high"))
    return Estimate(float(row["value"]), low, high, 0)


def _prefixed(row: Mapping[str, object]) -> dict[str, object]:
    """A row of numbers with the variable's name before each."""
    kept = {k: v for k, v in row.items() if k not in ("method", "variable", "given")}
    return {f"{row['variable']}_{k}": v for k, v in kept.items()}


def _frame(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    return pd.DataFrame(list(rows))
