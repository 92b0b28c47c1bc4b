"""Any question about every subject of a packed data set: some variables given, others wanted.

One row a subject. A wanted number gets its expectation, SD and quantiles, a category the chances of its classes and the
most probable one; where the truth is recorded, the score of the whole distribution (CRPS) too. From chains these are
estimates, such that nine in ten lie in the 90 % interval if the chains are right; a category gets the classes' shares
and the commonest (the paper's majority vote, section 4.2). A baseline answers the one question it was trained for, by a
number alone or by chances.
Noise comes from (seed, key, chain), so a row does not depend on the batch or the worker that made it.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import MixtureSameFamily

from mvhpc.config import ConfigError, PredictConfig, Sampling, at_least, to_dict
from mvhpc.diffusion.density import crps, quantile
from mvhpc.diffusion.joint import Batch
from mvhpc.evaluation import ensembles
from mvhpc.evaluation.figures import predicted_against_true
from mvhpc.evaluation.tables import coverage, label, read_predictions, score, subject_of
from mvhpc.inference.answers import Row, chances, write_predictions
from mvhpc.inference.baseline import BaselinePredictor
from mvhpc.inference.chains import Sampler, set_threads, versions
from mvhpc.inference.subjects import check_data, check_names, read_given, subjects
from mvhpc.models.bundle import model_kind
from mvhpc.people import true_value
from mvhpc.randomness import generator, rand
from mvhpc.run import Run, identity
from mvhpc.variables import Categorical, Continuous
from shards.loader import open_dataset
from shards.progress import Progress
from shards.schema import Schema

QUANTILES = (5, 25, 50, 75, 95)  # %, of what is said of a number
RELIABLE = 20  # people that calibration should rest on


def check_question(schema: Schema, given: Sequence[str], want: Sequence[str]) -> None:
    """Refuse a question that the model cannot be asked.

    Raises:
        ConfigError: as :func:`~mvhpc.inference.subjects.check_names`; nothing wanted, or a wanted volume.
    """
    check_names(schema, given, want)
    if not want:
        raise ConfigError(f"nothing is wanted; set want to one or more of {', '.join(v.name for v in schema)}")
    for name in want:
        if schema[name].kind == "volume":
            raise ConfigError(
                f"{name} is a volume: use `mvhpc translate` to draw it for every subject, `mvhpc generate` to sample "
                "people (given=name=value,...) or `mvhpc inpaint` to fill in a part of one"
            )


class Predictor:
    """Answers one question about any subjects of one data set by a joint model.

    Args:
        model: run folder of a joint model, or its ``model`` folder.
        data: packed volumes.
        given: names of the variables that are known. One that a subject lacks is unknown for this subject.
        want: names of the scalars to predict.
        samples: chains per subject.
        draws: joint draws per subject from a posterior; 0 for none.
        sampling: how a conditional is sampled.
        seed: of the noise.
        device: auto | cpu | cuda.
        precision: auto | float32 | bfloat16, of the denoiser.
        compiled: the denoiser through torch.compile, where it is asked by chains.

    Attributes:
        dataset, schema: of the data; of the model.
        way: how the answers come about.
        calls: network calls a subject.
        facts: what the description of a table says of that.

    Raises:
        ConfigError: a question the model cannot be asked, or data on another grid.
        ModelError: no model there, or a damaged one.
    """

    def __init__(
        self,
        model: str | Path,
        data: str | Path,
        given: Sequence[str],
        want: Sequence[str],
        samples: int,
        draws: int,
        sampling: Sampling,
        seed: int,
        device: str = "auto",
        precision: str = "float32",
        compiled: bool = False,
    ) -> None:
        at_least(1, {"samples": samples})
        self.sampler = Sampler(model, sampling, device, precision, scalars=True, compiled=compiled)
        self.exact = self.sampler.sampling.conditioning == "posterior"
        if draws and not self.exact:
            raise ConfigError(f"draws={draws}: joint draws come from a posterior, which this model or sampling has not")
        self.model, self.dataset = self.sampler.model, open_dataset(data)
        self.schema, self.way = self.model.schema, self.sampler.sampling.conditioning
        check_question(self.schema, given, want)
        check_data(self.model.grid, self.schema, self.dataset, given, want)
        self.given, self.want = list(given), list(want)
        self.samples, self.draws, self.seed = samples, draws, seed
        self.calls = self.sampler.calls * (1 if self.exact else samples)
        self.calls *= 2 if sampling.guidance != 1 and given else 1  # with and without what is given
        self.facts = {"samples": None if self.exact else samples, "sampling": to_dict(self.sampler.sampling)}
        if self.exact:
            self.facts["calibrated_on"] = self.model.meta["extra"].get("calibrated on")

    @torch.inference_mode()
    def __call__(self, keys: Sequence[str]) -> list[Row]:
        """The answers about some subjects, one row each, in order; with ``draws`` under that key, values by variable.

        Raises:
            IntegrityError: a damaged volume, named.
        """
        given, present = read_given(self.sampler, self.dataset, keys, self.given)
        answers = (self._laws if self.exact else self._chains)(keys, given, present)
        rows: list[Row] = []
        for i, key in enumerate(keys):
            lacking = [name for name in self.given if not present[name][i]]
            row: Row = {"key": key, "subject": subject_of(key)}
            for name in self.want:
                true = true_value(self.dataset, key, self.schema[name])
                row |= answers[name][i] | {f"{name}_true": true}
            rows.append(row | {"not_given": ",".join(lacking) or None})
        return rows

    def _laws(self, keys: Sequence[str], given: Batch, present: Batch) -> dict[str, list[Row]]:
        """The posterior's answers, by wanted variable a row a subject; joint draws go with the first."""
        posterior = self.sampler.posterior(given, len(keys), present)
        rows: dict[str, list[Row]] = {}
        for name, law in posterior.laws(self.want).items():
            variable = self.model.variables[name]
            if isinstance(variable, Categorical):
                assert isinstance(law, Tensor)
                rows[name] = [chances(name, dict(zip(variable.classes, p))) for p in law.tolist()]
            else:
                assert isinstance(variable, Continuous) and isinstance(law, MixtureSameFamily)
                rows[name] = self._law(variable, law, keys)
        if self.draws:
            noise = [generator(self.seed, "predict", key, "draws") for key in keys]
            uniform = rand(noise, (self.draws, len(self.want)), self.sampler.device).double()
            drawn = posterior.draw(self.want, uniform.clamp(1e-7, 1 - 1e-7))
            values = {name: self._decode(name, drawn[name], len(keys)) for name in self.want}
            for i, row in enumerate(rows[self.want[0]]):
                row["draws"] = {name: x[i] for name, x in values.items()}
        return rows

    def _law(self, variable: Continuous, law: MixtureSameFamily, keys: Sequence[str]) -> list[Row]:
        name, scale = variable.name, (variable.high - variable.low) / 2
        shares = torch.tensor(QUANTILES, dtype=torch.float64) / 100
        points = quantile(law, shares.to(self.sampler.device))  # (B, 5)
        columns = {name: variable.decode(law.mean), f"{name}_sd": law.stddev * scale}
        columns |= {f"{name}_q{q:02d}": variable.snap(variable.decode(points[:, i])) for i, q in enumerate(QUANTILES)}
        truth = [true_value(self.dataset, key, self.schema[name]) for key in keys]
        encoded = variable.encode(truth).to(self.sampler.device)[:, 0].double()  # 0 where missing
        columns[f"{name}_crps"] = crps(law, encoded) * scale
        rows: list[Row] = [dict(zip(columns, cells)) for cells in zip(*(c.tolist() for c in columns.values()))]
        return [row if x is not None else row | {f"{name}_crps": None} for row, x in zip(rows, truth)]

    def _chains(self, keys: Sequence[str], given: Batch, present: Batch) -> dict[str, list[Row]]:
        """What chains say, by wanted variable a row a subject."""
        n = self.samples
        drawn = self.sampler(
            {name: value.repeat_interleave(n, 0) for name, value in given.items()},
            [generator(self.seed, "predict", key, chain) for key in keys for chain in range(n)],
            {name: there.repeat_interleave(n) for name, there in present.items()},
            want=self.want,
        )
        rows: dict[str, list[Row]] = {}
        for name in self.want:
            variable, chains = self.model.variables[name], self._decode(name, drawn[name], len(keys))
            if isinstance(variable, Categorical):
                rows[name] = [chances(name, {c: x.count(c) / n for c in variable.classes}) for x in chains]
            else:
                assert isinstance(variable, Continuous)
                rows[name] = self._ensemble(variable, np.array(chains), keys)
        return rows

    def _ensemble(self, variable: Continuous, chains: NDArray[np.float64], keys: Sequence[str]) -> list[Row]:
        """What chains (B, samples) say of a number; of one there is no spread."""
        name, means = variable.name, chains.mean(1).tolist()
        if self.samples < 2:
            return [{name: mean, f"{name}_sd": None} for mean in means]
        truth = np.array([true_value(self.dataset, key, self.schema[name]) for key in keys], float)  # NaN where missing
        points = variable.snap(torch.from_numpy(ensembles.quantiles(chains, [q / 100 for q in QUANTILES])))  # (B, 5)
        scores = [None if np.isnan(x) else x for x in ensembles.crps(chains, truth).tolist()]
        columns = {name: means, f"{name}_sd": chains.std(1, ddof=1).tolist()}
        columns |= {f"{name}_q{q:02d}": points[:, i].tolist() for i, q in enumerate(QUANTILES)}
        columns[f"{name}_crps"] = scores
        return [dict(zip(columns, cells)) for cells in zip(*columns.values())]

    def _decode(self, name: str, drawn: Tensor, subjects: int) -> list[list[Any]]:
        """Values in the variable's unit, or classes: subjects x draws."""
        variable = self.model.variables[name]
        if isinstance(variable, Continuous):
            flat: list[Any] = variable.snap(variable.decode(drawn)).tolist()
        else:
            flat = list(variable.decode(drawn))
        n = len(flat) // subjects
        return [flat[i * n : (i + 1) * n] for i in range(subjects)]


def open_predictor(**question: Any) -> Predictor | BaselinePredictor:
    """Whoever answers by this model.

    Args:
        question: the arguments of :class:`Predictor`.

    Raises:
        ConfigError: as :class:`Predictor`; joint draws of a baseline, or another question than the one it answers.
        ModelError: no model there, or a damaged one.
    """
    if model_kind(question["model"]) != "baseline":
        return Predictor(**question)
    if draws := question["draws"]:
        raise ConfigError(f"draws={draws}: joint draws come from a posterior, which a baseline has not; take 0")
    return BaselinePredictor(**{k: question[k] for k in ("model", "data", "given", "want", "device", "precision")})


def run(config: PredictConfig, run: Run) -> dict[str, Any]:
    """Stage ``predict``: write ``config.out`` (TSV) and its description (JSON beside it).

    With more than one worker the batches are spread by Ray Data; the rows are the same.

    Returns:
        Per wanted variable the mean absolute error or accuracy with its 95 % interval; for a number with a predicted
        law also how often its 90 % interval holds the truth, and the CRPS; and the throughput.

    Raises:
        ConfigError: a question the model cannot be asked, data on another grid, or nobody to ask about.
    """
    out = Path(config.out)
    if out.suffix != ".tsv":
        raise ConfigError(f"out={config.out}: the answers are a table, name it with .tsv")
    if out.is_dir():
        raise ConfigError(f"out={config.out} is a folder; name the table that is to be written")
    set_threads(config.compute)
    question: dict[str, Any] = {
        "model": str(Path(config.model).resolve()),
        "data": str(Path(config.data).resolve()),
        "given": config.given,
        "want": config.want,
        "samples": config.samples,
        "draws": config.draws,
        "sampling": config.sampling,
        "seed": config.seed,
        "device": config.compute.device,
        "precision": config.compute.precision,
        "compiled": config.compute.compile,
    }
    predictor = open_predictor(**question)
    dataset, schema = predictor.dataset, predictor.schema
    part, keys = config.split, subjects(dataset, config.split, config.split_name)
    asked, calls = f"{', '.join(config.want)} given {label(config.given)}", predictor.calls
    print(f"{asked}: by {predictor.way}, {calls} network call{'s' * (calls > 1)} a subject", file=sys.stderr)
    calibrated = predictor.facts.get("calibrated_on")
    if isinstance(calibrated, int) and calibrated < RELIABLE:
        print(
            f"{asked}: how sure the model may be was measured on {calibrated} people it did not learn from; with "
            f"fewer than {RELIABLE} do not rely on its intervals and probabilities",
            file=sys.stderr,
        )
    batches = [keys[i : i + config.batch] for i in range(0, len(keys), config.batch)]
    start = time.monotonic()
    answers: Iterable[list[Row]]
    if config.compute.workers > 1:
        from mvhpc.inference.batch import spread

        answers = spread(question, batches, config.compute, run.folder / "logs")
    else:
        answers = map(predictor, batches)
    rows: dict[str, Row] = {}
    with Progress(asked, len(keys), "subject") as bar:
        for answered in answers:
            rows |= {str(row["key"]): row for row in answered}
            bar.update(len(answered))
    seconds = time.monotonic() - start

    description = {
        "given": config.given,
        "want": config.want,
        "part": part,
        "split": config.split_name,
        "model": identity(config.model),
        "data": dataset.index.digest,
        "schema": schema.to_dict(),
        **predictor.facts,
        "network_calls": calls,
        "seed": config.seed,
        "versions": versions(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(out, [rows[key] for key in keys], description)

    summary: dict[str, Any] = {
        "subjects": len(keys),
        "network_calls": calls,
        "system/samples_per_second": len(keys) / seconds,
    }
    frame, _ = read_predictions(out)
    for name in config.want:
        variable = schema[name]
        result = score(frame, variable)
        if result is None or not result.n:
            continue
        metric = f"{part}/{name}_{'accuracy' if variable.kind == 'categorical' else 'mae'}"
        summary |= {metric: result.value, f"{metric}_low": result.low, f"{metric}_high": result.high}
        if held := coverage(frame, name):
            summary |= {f"{part}/{name}_in_90": held.value, f"{part}/{name}_crps": float(frame[f"{name}_crps"].mean())}
        if variable.kind != "categorical":
            with run.figure(f"{name}.png") as path:
                true, predicted, sd = (frame[f"{name}{s}"].to_numpy(float) for s in ("_true", "", "_sd"))
                bars = "; bars: one SD" if np.isfinite(sd).any() else ""
                note = f"given {label(config.given)}\nMAE {result.format(2)}{bars}"
                predicted_against_true(true, predicted, sd, path, name, variable.unit or "", note)
    return summary
