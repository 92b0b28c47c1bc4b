"""What answers a query about the subjects of a data set: a joint model (posterior or chains), or a baseline."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributions import MixtureSameFamily

from mvhpc.config import Compute, ConfigError, Sampling, Tracking, at_least, to_dict
from mvhpc.diffusion.density import crps, quantile
from mvhpc.diffusion.joint import Batch
from mvhpc.evaluation import ensembles
from mvhpc.evaluation.tables import subject_of
from mvhpc.inference.baseline_predictor import BaselinePredictor
from mvhpc.inference.predictions import Row, chances
from mvhpc.inference.sampler import Sampler, read_given
from mvhpc.models.bundle import model_kind
from mvhpc.records import check_data, check_names, true_value
from mvhpc.runtime.randomness import generator, rand
from mvhpc.variables import Categorical, Continuous
from shards.dataset import open_dataset
from shards.schema import Schema

QUANTILES = (5, 25, 50, 75, 95)  # %, of what is said of a number


@dataclass
class PredictConfig:
    """`mvhpc predict`: any variables given, any wanted."""

    out: str  # a TSV file
    model: str
    data: str
    split: str  # train | validation | test | all
    split_name: str  # which recorded split
    given: list[str]
    want: list[str]
    samples: int  # chains per subject, where the answer comes from chains
    draws: int  # joint draws of all that is wanted per subject, from a posterior, into NAME.draws.tsv
    batch: int
    seed: int
    sampling: Sampling
    compute: Compute
    tracking: Tracking

    def __post_init__(self) -> None:
        at_least(1, {"samples": self.samples, "batch": self.batch})
        at_least(0, {"draws": self.draws})


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
