"""Any question about every subject of a packed data set: some variables given, others wanted.

One row a subject. A wanted continuous variable gets the mean and standard deviation over the chains; a category gets
the share of the chains in each class and the commonest one (the paper's majority vote, section 4.2). The noise of a
chain comes from (seed, key, chain), so a row does not depend on the batch or the worker that made it.
"""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvhpc.config import ConfigError, PredictConfig, Sampling, choose, to_dict
from mvhpc.evaluation.figures import predicted_against_true
from mvhpc.evaluation.tables import MISSING, label, read_predictions, score, sidecar, subject_of, true_value
from mvhpc.inference.chains import Sampler, set_threads, versions
from mvhpc.models.bundle import JointModel
from mvhpc.randomness import generator
from mvhpc.run import Run, identity
from mvhpc.variables import Volume
from shards.files import whole_file, write_text
from shards.loader import Dataset, open_dataset
from shards.progress import Progress
from shards.schema import Schema

Row = dict[str, float | str | None]


def check_question(schema: Schema, given: Sequence[str], want: Sequence[str]) -> None:
    """Refuse a question that the model cannot be asked.

    Raises:
        ConfigError: an unknown variable (naming the nearest), one both given and wanted or named twice, nothing
            wanted, or a wanted volume.
    """
    names = [variable.name for variable in schema]
    for name in [*given, *want]:
        choose(name, names, "variable")
        if [*given, *want].count(name) > 1:
            where = "both given and wanted" if name in given and name in want else "named twice"
            raise ConfigError(f"{name} is {where}; name each variable once")
    if not want:
        raise ConfigError(f"nothing is wanted; set want to one or more of {', '.join(names)}")
    for name in want:
        if schema[name].kind == "volume":
            raise ConfigError(
                f"{name} is a volume: use `mvhpc generate` to sample volumes (given=name=value,...) "
                "or `mvhpc inpaint` to fill in a part of one"
            )


def check_data(model: JointModel, dataset: Dataset, given: Sequence[str]) -> None:
    """Refuse data that are not as the model saw them.

    Raises:
        ConfigError: latents instead of volumes, a given variable the data lack, or another grid.
    """
    index = dataset.index
    if index.kind != "volumes":
        raise ConfigError(f"{dataset.folder} holds {index.kind}; give the packed volumes they were made from")
    for name in given:
        choose(name, [variable.name for variable in index.schema], f"variable of {dataset.folder}")
    for fact in ("spacing", "shape", "affine"):
        ours, theirs = model.grid[fact], index.grid[fact]
        if np.shape(ours) != np.shape(theirs) or not np.allclose(ours, theirs, atol=1e-4):
            raise ConfigError(
                f"{dataset.folder} has {fact} {theirs}, the model was trained on {ours}; "
                f"pack again with spacing {model.grid['spacing']} and shape {model.grid['shape']}"
            )


class Predictor:
    """Answers one question about any subjects of one data set.

    Args:
        model: run folder of a joint model, or its ``model`` folder.
        data: packed volumes.
        given: names of the variables that are known. One that a subject lacks is unknown for this subject.
        want: names of the scalars to predict.
        samples: chains per subject.
        sampling: how a conditional is sampled.
        seed: of the noise.
        device: auto | cpu | cuda.
        precision: float32 | bfloat16, of the denoiser.

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
        sampling: Sampling,
        seed: int,
        device: str = "auto",
        precision: str = "float32",
    ) -> None:
        if samples < 1:
            raise ConfigError(f"samples={samples}: at least one chain is needed")
        self.sampler = Sampler(model, sampling, device, precision)
        self.model, self.dataset = self.sampler.model, open_dataset(data)
        check_question(self.model.schema, given, want)
        check_data(self.model, self.dataset, given)
        self.given, self.want = list(given), list(want)
        self.samples, self.seed = samples, seed

    @torch.inference_mode()
    def __call__(self, keys: Sequence[str]) -> list[Row]:
        """The answers about some subjects, one row each, in order.

        Raises:
            IntegrityError: a damaged volume, named.
        """
        noise = [generator(self.seed, "predict", key, chain) for key in keys for chain in range(self.samples)]
        given, present = self._given(keys)
        drawn = self.sampler(
            {name: value.repeat_interleave(self.samples, 0) for name, value in given.items()},
            noise,
            {name: there.repeat_interleave(self.samples) for name, there in present.items()},
        )
        chains = {name: self._decode(name, drawn[name], len(keys)) for name in self.want}
        rows = []
        for i, key in enumerate(keys):
            lacking = [name for name in self.given if not present[name][i]]
            rows.append(self._row(key, {name: chains[name][i] for name in self.want}, lacking))
        return rows

    def _given(self, keys: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Clean encoded values by variable, a row a subject, and which subjects have one: (B,) bool."""
        schema, variables = self.model.schema, self.model.variables
        rows = [{v.name: true_value(self.dataset, key, v) for v in schema.scalars} for key in keys]
        given, present = variables.encode_scalars(rows)
        for volume in variables.volumes:
            if volume.name in self.given:
                latents = [self._latent(key, volume) for key in keys]
                absent = torch.zeros(1, *volume.shape, device=self.sampler.device)
                given[volume.name] = torch.cat([absent if z is None else z for z in latents])  # (B, C, h, w, d)
                present[volume.name] = torch.tensor([z is not None for z in latents])
        return {name: given[name] for name in self.given}, {name: present[name] for name in self.given}

    def _latent(self, key: str, variable: Volume) -> Tensor | None:
        """The latent (1, C, h, w, d) of one volume; encoded alone, so that it is the same in any batch."""
        if not self.dataset.has(key, variable.name):
            return None
        voxels = torch.from_numpy(self.dataset.read(key, variable.name).astype(np.float32))  # (H, W, D)
        return self.model.encode(variable.name, voxels[None, None].to(self.sampler.device))

    def _decode(self, name: str, drawn: Tensor, subjects: int) -> list[list[Any]]:
        """Values in the variable's unit, or classes: subjects x chains."""
        values = self.model.variables[name].decode(drawn)
        flat = values.tolist() if isinstance(values, Tensor) else values
        return [flat[i * self.samples : (i + 1) * self.samples] for i in range(subjects)]

    def _row(self, key: str, chains: dict[str, list[Any]], lacking: Sequence[str]) -> Row:
        row: Row = {"key": key, "subject": subject_of(key)}
        for name, values in chains.items():
            variable = self.model.schema[name]
            if variable.kind == "categorical":
                share = {c: values.count(c) / len(values) for c in variable.classes}
                row[name] = max(share, key=share.__getitem__)
                row |= {f"{name}_p_{c}": p for c, p in share.items()}
            else:
                row[name] = float(np.mean(values))
                row[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
            row[f"{name}_true"] = true_value(self.dataset, key, variable)
        row["not_given"] = ",".join(lacking) or None
        return row


def write_predictions(path: Path, rows: Sequence[Row], description: dict[str, Any]) -> None:
    """Write rows as TSV (missing values as n/a) and, beside it, ``description`` as JSON; each whole, the TSV last."""

    def cell(value: float | str | None) -> str:
        return MISSING if value is None else value if isinstance(value, str) else f"{value:.6g}"

    write_text(sidecar(path), json.dumps(description, indent=1))
    with whole_file(path) as part:
        lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
        part.write_text("".join("\t".join(line) + "\n" for line in lines))


def run(config: PredictConfig, run: Run) -> dict[str, Any]:
    """Stage ``predict``: write ``config.out`` (TSV) and its description (JSON beside it).

    With more than one worker the batches are spread by Ray Data; the rows are the same.

    Returns:
        Per wanted variable the mean absolute error or accuracy with its 95 % interval, and the throughput.

    Raises:
        ConfigError: a question the model cannot be asked, data on another grid, or nobody to ask about.
    """
    out = Path(config.out)
    if out.suffix != ".tsv":
        raise ConfigError(f"out={config.out}: the answers are a table, name it with .tsv")
    set_threads(config.compute)
    question: dict[str, Any] = {
        "model": str(Path(config.model).resolve()),
        "data": str(Path(config.data).resolve()),
        "given": config.given,
        "want": config.want,
        "samples": config.samples,
        "sampling": config.sampling,
        "seed": config.seed,
        "device": config.compute.device,
        "precision": config.compute.precision,
    }
    predictor = Predictor(**question)
    dataset, schema = predictor.dataset, predictor.model.schema
    part = choose(config.split, ["train", "validation", "test", "all"], "part")
    choose(config.split_name, list(dataset.index.splits), "split")
    keys = dataset.keys(None if part == "all" else part, config.split_name)
    if not keys:
        raise ConfigError(f"{config.data}: the {part} part of split {config.split_name!r} is empty")

    batches = [keys[i : i + config.batch] for i in range(0, len(keys), config.batch)]
    start = time.monotonic()
    answers: Iterable[list[Row]]
    if config.compute.workers > 1:
        from mvhpc.inference.batch import spread

        answers = spread(question, batches, config.compute, run.folder / "logs")
    else:
        answers = map(predictor, batches)
    rows: dict[str, Row] = {}
    with Progress(f"{', '.join(config.want)} given {label(config.given)}", len(keys), "subject") as bar:
        for answered in answers:
            rows |= {str(row["key"]): row for row in answered}
            bar.update(len(answered))
    seconds = time.monotonic() - start

    calls = config.samples * predictor.sampler.calls
    description = {
        "given": config.given,
        "want": config.want,
        "part": part,
        "split": config.split_name,
        "model": identity(config.model),
        "data": dataset.index.digest,
        "schema": schema.to_dict(),
        "samples": config.samples,
        "sampling": to_dict(config.sampling),
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
        if variable.kind == "continuous":
            with run.figure(f"{name}.png") as path:
                note = f"given {label(config.given)}: MAE {result.format(2)}"
                true, predicted, sd = (frame[f"{name}{s}"].to_numpy(float) for s in ("_true", "", "_sd"))
                predicted_against_true(true, predicted, sd, path, name, variable.unit or "", note)
    return summary
