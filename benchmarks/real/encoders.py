"""What other ways to train the encoders of the model of scalars are worth on real people.

    python -m benchmarks.real.encoders PACKED ROOT [--phantoms N] [--rows NAME ...]

PACKED has real people with tissue maps, all in the training part, as ``python -m benchmarks.real.answers`` packs them.
Each of five encoders learns from four fifths of the people; everybody is predicted, given the image, by the encoder
that did not learn from them. Nothing is chosen on these people: the last weights count. Writes ``encoders.md`` to
ROOT; trainings that are complete are reused.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.real.answers import interval, persons
from benchmarks.real.sites import SHAPE, SPACING
from benchmarks.stages import complete
from mvhpc.config import load_config
from mvhpc.diffusion.laws import Law, join, log_score, take
from mvhpc.models.loading import prepare
from mvhpc.models.scalar_stack import build_encoders, encode, law_of, predict, standardized
from mvhpc.runtime.randomness import generator, randn
from mvhpc.training.engines.base import Engine
from mvhpc.training.loop import train
from mvhpc.training.scalars import STANDARDIZED, ScalarsConfig, ScalarsTask
from mvhpc.training.stacking import member_weights
from mvhpc.variables import Categorical, Continuous
from shards.processes import process_pool

WANT, VOLUME = ("age", "sex"), "image"
LABEL_SD = 3.0  # years, of the ages that stand for one age
MIXED = 0.4  # both parameters of the beta distribution of a share
TURN, SIZE, SHIFT, NOISE = 0.1, 0.05, 0.05, 0.02  # SDs: radians, relative, half boxes, of maps in [0, 1]
PHANTOM_EPOCHS = 8


class AsIs(ScalarsTask):
    """The encoders as the model of scalars trains them."""

    def __init__(self, config: ScalarsConfig) -> None:
        super().__init__(config)
        self.validation = 0  # exports the last weights

    @torch.no_grad()
    def export(self, folder: Path, states: dict[str, dict[str, Tensor]], metrics: dict[str, float]) -> None:
        """Write the weights, and what was found about the people whom an encoder or a linear member did not learn."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: x.contiguous() for name, x in states["encoders"].items()}, folder / "encoders.safetensors")
        network = build_encoders(self.variables, self.config.encoder)
        network.load_state_dict(states["encoders"])
        prepare(network, "cpu")
        people, fold = self.people, (~self.in_fold).int().argmax(1)  # (N,)
        known = {name: x & (name == VOLUME) for name, x in people.present.items()}
        encoded = encode(network, self.variables, {VOLUME: people.pooled[VOLUME].float()}, known)
        columns: dict[str, Any] = {"key": people.keys}
        for name in WANT:
            output = predict(network, self.variables, encoded, people.values, known, name)  # (N, R, n)
            category = isinstance(self.variables[name], Categorical)
            laws = {"encoder": law_of(output[torch.arange(len(fold)), fold], category)}
            laws["linear"] = self._linear(name, known, fold)
            for member, law in laws.items():
                columns[f"{name}_{member}"] = self._errors(name, law)
                columns[f"{name}_{member}_score"] = log_score(law, people.values[name])
        pd.DataFrame(columns).to_csv(folder / "people.tsv", sep="\t", index=False)

    def _linear(self, want: str, known: dict[str, Tensor], fold: Tensor) -> Law:
        found, order = [], []
        for k, members in enumerate(self.held_out_linear):
            rows = (fold == k).nonzero()[:, 0]
            scores = members[0].scores({name: x[rows] for name, x in self.features[0].items()})
            values, there = ({n: x[rows] for n, x in of.items()} for of in (self.people.values, known))
            found.append(members[0].law(want, scores, values, there))
            order.append(rows)
        return take(join(found), torch.cat(order).argsort())

    def _errors(self, name: str, law: Law) -> Tensor:
        """Absolute errors in units, or whether a class is right."""
        truth, v = self.people.values[name], self.variables[name]
        if isinstance(law, Tensor):
            return (law.argmax(1) == truth).double()
        assert isinstance(v, Continuous)
        return (v.decode(law.mean[:, None]) - v.decode(truth)).abs()


class LabelDistribution(AsIs):
    """Each age stands for a normal distribution of ages, from which every step draws."""

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """As :meth:`ScalarsTask.step`, of drawn ages."""
        age = self.variables["age"]
        assert isinstance(age, Continuous)
        noise = randn([generator(self.config.training.seed, "label", step, i) for i in indices], (1,))  # (B, 1)
        drawn = batch["values"]["age"] + noise * LABEL_SD * 2 / (age.high - age.low)
        return super().step(batch | {"values": batch["values"] | {"age": drawn}}, engines, step, indices)


class Mixup(AsIs):
    """Volumes and labels are mixed with those of another person (Zhang et al. 2018) whom the same encoders learn."""

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """As :meth:`ScalarsTask.step`, of mixed people; a class is that of either, by its share."""
        fold = (~batch["in_fold"]).int().argmax(1)  # (B,)
        partner = torch.arange(len(fold))
        for k in fold.unique():
            rows = (fold == k).nonzero()[:, 0]
            partner[rows] = rows.roll(1)
        random = np.random.default_rng([self.config.training.seed, step])
        share = torch.from_numpy(random.beta(MIXED, MIXED, len(fold))).float()
        own = torch.from_numpy(random.random(len(fold))).float() < share

        def mix(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return torch.where(own, x, x[partner])
            part = share.reshape(-1, *[1] * (x.ndim - 1))
            return part * x.float() + (1 - part) * x[partner].float()

        mixed = {part: {name: mix(x) for name, x in batch[part].items()} for part in ("pooled", "values")}
        present = {name: x & x[partner] for name, x in batch["present"].items()}
        return super().step(batch | mixed | {"present": present}, engines, step, indices)


class Movements(AsIs):
    """Volumes are turned, scaled, shifted and made noisy."""

    def step(
        self, batch: dict[str, Any], engines: dict[str, Engine], step: int, indices: list[int]
    ) -> dict[str, Tensor]:
        """As :meth:`ScalarsTask.step`, of moved volumes."""
        x = batch["pooled"][VOLUME].float()  # (B, C, h, w, d)
        draws = randn([generator(self.config.training.seed, "move", step, i) for i in indices], (9,))
        turn, size, shift = draws[:, :3] * TURN, 1 + draws[:, 3:6] * SIZE, draws[:, 6:] * SHIFT
        skew = torch.zeros(len(x), 3, 3)
        for (i, j), angle in zip([(0, 1), (0, 2), (1, 2)], turn.T):
            skew[:, i, j], skew[:, j, i] = angle, -angle
        affine = torch.cat([torch.matrix_exp(skew) * size[:, None], shift[..., None]], 2)  # (B, 3, 4)
        grid = F.affine_grid(affine, list(x.shape), align_corners=False)
        moved = F.grid_sample(x, grid, align_corners=False)
        seeds = [generator(self.config.training.seed, "noise", step, i) for i in indices]
        moved = moved + randn(seeds, x.shape[1:]) * NOISE
        return super().step(batch | {"pooled": {VOLUME: moved}}, engines, step, indices)


class Pretrained(AsIs):
    """The encoders begin with weights that have learnt phantoms."""

    weights = Path()

    def __init__(self, config: ScalarsConfig) -> None:
        super().__init__(config)
        learnt, network = load_file(self.weights), self.networks["encoders"]
        members = {name.split(".")[1] for name in learnt if name.startswith("encoders.")}

        def source(name: str) -> str:
            part, member, *rest = name.split(".")
            return ".".join([part, str(int(member) % len(members)), *rest])

        network.load_state_dict({name: learnt[source(name)] for name in network.state_dict()})
        pooled = {name: x[:STANDARDIZED].float() for name, x in self.people.pooled.items()}
        network.standardize_features(standardized(self.variables, pooled))  # type: ignore[operator]


VARIANTS: dict[str, type[AsIs]] = {
    "as they are": AsIs,
    "label distribution": LabelDistribution,
    "mixup": Mixup,
    "movements and noise": Movements,
    "pretrained on phantoms": Pretrained,
}


def learn_phantoms(root: Path, count: int) -> Path:
    """Weights of two encoders that have learnt ``count`` phantoms, in the template's space with tissue maps."""
    complete(root, "phantom", "default", {"subjects": count, "shape": list(SHAPE), "out": root / "phantoms"})
    maps = {"source": root / "phantoms", "out": root / "maps", "spacing": SPACING}
    complete(root, "preprocess", "default", maps | {"steps": ["registration", "tissue"], "workers": 2})
    box = {"source": root / "maps", "out": root / "packed", "spacing": SPACING, "shape": list(SHAPE), "workers": 2}
    complete(root, "pack", "default", box | {"max_rejects": "20%"})  # the registration of some phantoms fails
    values = {"encoder.ensemble_members": 2, "training.epochs": PHANTOM_EPOCHS, "compute.threads": 2}
    train_variant(AsIs, root / "packed", root / "phantom-encoders", values)
    return root / "phantom-encoders" / "model" / "encoders.safetensors"


def train_variant(task: type[AsIs], data: Path, out: Path, values: dict[str, Any], weights: Path | None = None) -> None:
    """Train the encoders in one way, unless that was done."""
    if weights:
        Pretrained.weights = weights
    places = {"data": str(data), "out": str(out)}
    config = load_config(ScalarsConfig, "scalars", "small", (), places | values)
    torch.set_num_threads(config.compute.threads)
    train(task(config), config, out)


def row(name: str, people: pd.DataFrame, plain: pd.DataFrame) -> str:
    """A row of the table."""
    who = persons(people.set_index("key"))
    cells = [name]
    for want, digits in (("age", 2), ("sex", 3)):
        value = people[f"{want}_encoder"].to_numpy(float)
        difference = interval(value - plain[f"{want}_encoder"].to_numpy(float), who)
        scores = people[[f"{want}_linear_score", f"{want}_encoder_score"]].to_numpy(float)
        weight = member_weights(torch.from_numpy(scores)[None])[-1]
        cells += ["{:.{n}f} [{:.{n}f}, {:.{n}f}]".format(*interval(value, who), n=digits)]
        cells += ["" if people is plain else "{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*difference, n=digits)]
        cells += [f"{scores[:, 1].mean() - scores[:, 0].mean():+.2f}", f"{weight:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, help="folder of the packed people")
    parser.add_argument("root", type=Path, help="folder for what is made")
    parser.add_argument("--phantoms", type=int, default=2000, metavar="N", help="phantoms to learn first")
    parser.add_argument("--rows", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="ways to train")
    options = parser.parse_args()
    root, data = options.root.resolve(), options.packed.resolve()
    root.mkdir(parents=True, exist_ok=True)
    weights = learn_phantoms(root, options.phantoms) if "pretrained on phantoms" in options.rows else None
    folders = {name: root / name.replace(" ", "-") for name in options.rows}
    with process_pool(2) as two:
        jobs = [
            two.submit(train_variant, VARIANTS[name], data, out, {"compute.threads": 1}, weights)
            for name, out in folders.items()
        ]
        for job in jobs:
            job.result()
    found = {name: pd.read_csv(out / "model" / "people.tsv", sep="\t") for name, out in folders.items()}
    table(found, root / "encoders.md")


def table(found: dict[str, pd.DataFrame], out: Path) -> None:
    """Write and print the table of all ways and of the linear member; all are compared with the first."""
    plain = next(iter(found.values()))
    columns = [f"{want}_encoder{end}" for want in WANT for end in ("", "_score")]
    linear = plain.assign(**{name: plain[name.replace("encoder", "linear")] for name in columns})
    heads: Sequence[str] = ("age error, years", "less the first", "log score less linear", "weight")
    heads = ["", *heads, "sex accuracy", *heads[1:]]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    text = (
        "\n".join([*lines, *(row(name, people, plain) for name, people in (found | {"linear member": linear}).items())])
        + "\n"
    )
    out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
