"""The joint model against what it must be measured by, on phantoms whose exact posterior is known.

    python benchmarks/phantom_scoreboard.py [--root runs/scoreboard] [--markdown FILE]

2,000 training phantoms at 32 cubed, one split for all. Rows: the best possible (the phantom's own law), predicting
the mean, 3D DenseNet121 (stage `baseline`, once for each question that gives the image), the paper's procedure (its
design, one shared time, eps, repainting, 3 chains of 50 steps), and ours by 30 chains of 10 steps and by its posterior.
Both joint models have the same widths, autoencoder, epochs and learning rate. Stages that are complete are reused.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import bootstrap
from scipy.stats import t as student
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal
from torch.utils.flop_counter import FlopCounterMode

from mvhpc.config import Sampling, load_config
from mvhpc.diffusion.density import crps, quantile
from mvhpc.evaluation.metrics import mean_over_subjects
from mvhpc.evaluation.tables import Table
from mvhpc.inference.baseline import BaselinePredictor
from mvhpc.inference.chains import Sampler
from mvhpc.pipeline import state
from mvhpc.randomness import generator
from mvhpc.run import execute, record
from mvhpc.stages import STAGES
from mvhpc.variables import Continuous
from shards.anatomy import AGES, best_possible, posterior, read_tables
from shards.anatomy import Posterior as Exact
from shards.files import write_text
from shards.loader import Dataset, open_dataset

QUESTIONS = [  # wanted, given
    ("age", ("image", "sex")),
    ("age", ("image",)),
    ("age", ("sex",)),
    ("age", ()),
    ("sex", ("image", "age")),
    ("sex", ("image",)),
]
PAPER = Sampling(conditioning="repaint", steps=50, stride=20, solver="ddim", guidance=1.0, resample=1)
CLEAN = Sampling(conditioning="clean", steps=10, stride=1000, solver="dpm", guidance=1.0, resample=1)
POSTERIOR = Sampling(conditioning="posterior", steps=50, stride=20, solver="ddim", guidance=1.0, resample=1)
EPOCHS = {"vae": 5, "joint": 40, "densenet": 8}
WIDTHS = {
    "model.channels": [32, 64],
    "model.attention": [False, True],
    "model.res_blocks": 1,
    "model.head_channels": 32,
    "model.norm_groups": 8,
    "model.embedding": 128,
}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answer:
    """What a method says about N people, and what it costs.

    Attributes:
        point: ages (N,), or chances of being M (N,).
        interval: 90 %, (N, 2); None where there is none.
        crps: (N,).
        sd: SD of all that is drawn or said of everybody together: for "nothing given", that of p(age).
        calls, flops, seconds: per person, flops from latents (DenseNet: from voxels).
    """

    point: Floats
    interval: Floats | None = None
    crps: Floats | None = None
    sd: float = math.nan
    calls: int = 0
    flops: float = math.nan
    seconds: float = math.nan


# --- stages -------------------------------------------------------------------------------------------------------


def stages(root: Path, quick: bool) -> None:
    """Make phantoms, pack them, train the autoencoder and all models, each where it is not complete."""
    few = 60 if quick else 2500
    epochs = {name: 1 if quick else n for name, n in EPOCHS.items()}
    joint = WIDTHS | {
        "latents": root / "latents",
        "vae": root / "vae",
        "ema": 0.995,
        "optimizer.lr": 1.0e-3,
        "optimizer.warmup": 50,
        "training.epochs": epochs["joint"],
        "training.batch": 32,
        "training.validate_every": max(1, epochs["joint"] // 6),
        "training.log_every": 50,
        "compute.precision": "auto",
    }
    plan: list[tuple[str, str, dict[str, Any]]] = [
        ("phantom", "demo", {"out": root / "source", "subjects": few}),
        ("pack", "demo", {"source": root / "source", "out": root / "packed", "split": [0.8, 0.06, 0.14]}),
        (
            "vae",
            "demo",
            {
                "data": root / "packed",
                "out": root / "vae",
                "model.channels": [8, 16, 64],  # half of the demo's where voxels are many: half the time
                "model.latent_channels": 8,
                "training.batch": 4,
                "training.epochs": epochs["vae"],
                "training.validate_every": 1,
                "compute.workers": 1,
            },
        ),
        ("encode", "demo", {"data": root / "packed", "vae": root / "vae", "out": root / "latents"}),
        ("joint", "default", joint | {"out": root / "ours"}),
        ("joint", "paper", joint | {"out": root / "paper"}),
    ]
    for part in plan:
        complete(root, *part)
    densenet = {
        "data": root / "packed",
        "training.epochs": epochs["densenet"],
        "compute.precision": "auto",
        "compute.threads": 1,
    }
    questions = [(want, given) for want, given in QUESTIONS if "image" in given]
    with ProcessPoolExecutor(2, get_context("spawn")) as two:  # side by side, a core each: faster than in turn on both
        asked = [
            two.submit(
                complete,
                root,
                "baseline",
                "default",
                densenet | {"want": want, "given": list(given), "out": root / densenet_name(want, given)},
            )
            for want, given in questions
        ]
        for future in asked:
            future.result()


def complete(root: Path, stage: str, preset: str, values: dict[str, Any]) -> None:
    """Run a stage, where its result is not complete."""
    values = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
    values["tracking.uri"] = f"sqlite:///{root / 'mlflow.db'}"
    config: Any = load_config(STAGES[stage].config, stage, preset, (), values)
    if state(stage, config) != "finished":
        start = time.time()
        print(f"{stage} -> {config.out}", flush=True)
        execute(stage, config)
        print(f"{stage} -> {config.out}: {time.time() - start:.0f} s", flush=True)


# --- DenseNet -----------------------------------------------------------------------------------------------------


def densenet_name(want: str, given: Sequence[str]) -> str:
    return f"densenet-{want}-given-{'-'.join(given)}"


def densenet(root: Path, keys: Sequence[str], want: str, given: Sequence[str], batch: int = 32) -> Answer | None:
    """The DenseNet121 of the question; None where no image is given."""
    if "image" not in given:
        return None
    predictor = BaselinePredictor(root / densenet_name(want, given), root / "packed", given, [want], "cpu")
    people = [predictor.inputs(keys[i : i + batch]) for i in range(0, len(keys), batch)]
    start = time.monotonic()
    said = torch.cat([predictor.say(*part) for part in people])
    seconds = (time.monotonic() - start) / len(keys)
    with FlopCounterMode(display=False) as counter:
        predictor.say(*predictor.inputs(keys[:1]))
    point = said.numpy() if want == "age" else said[:, 1].numpy()
    return Answer(point, calls=1, flops=counter.get_total_flops(), seconds=seconds)


# --- joint models -------------------------------------------------------------------------------------------------


def ensemble_crps(draws: Floats, truth: Floats) -> Floats:
    """CRPS (N,) of ensembles (N, M), unbiased for their size (Ferro 2014, eq. 8)."""
    m = draws.shape[1]
    off = np.abs(draws - truth[:, None]).mean(1)
    apart = np.abs(draws[:, :, None] - draws[:, None, :]).sum((1, 2))
    return off - apart / (2 * m * (m - 1))


def interval(draws: Floats) -> Floats:
    """Where one more draw would lie in 90 of 100 cases, (N, 2), from draws (N, M).

    Of many by their ranks, of few by Student's t: plain quantiles of 30 draws hold only 85 %, and the mean of 3 with
    1.645 of their SDs to either side 71 %, however right the draws are.
    """
    m = draws.shape[1]
    if m >= 20:
        return np.quantile(draws, [0.05, 0.95], axis=1, method="weibull").T
    reach = student.ppf(0.95, m - 1) * math.sqrt(1 + 1 / m) * draws.std(1, ddof=1)
    return draws.mean(1)[:, None] + reach[:, None] * np.array([-1, 1])


class Joint:
    """A joint model asked in one way about people whose latents are there.

    Args:
        model: run folder of a joint model.
        dataset: packed volumes.
        sampling: how it is asked.
        samples: chains a person, where it is asked by chains.
        whole: cost is that of running the whole U-Net in every call, as the paper does; ours leaves out what no wanted
            variable needs, which changes no answer.
    """

    def __init__(
        self, model: Path, dataset: Dataset, sampling: Sampling, samples: int = 1, whole: bool = False
    ) -> None:
        self.sampler = Sampler(model, sampling, "cpu", scalars=True)
        self.dataset, self.latents, self.samples = dataset, open_dataset(model.parent / "latents"), samples
        self.exact, self.whole = sampling.conditioning == "posterior", whole

    def given(self, keys: Sequence[str], names: Sequence[str]) -> dict[str, Tensor]:
        """Encoded values of some variables, a row a person."""
        model = self.sampler.model
        scalars, _ = model.variables.encode_scalars([self.dataset.values(key) for key in keys])
        if "image" in names:
            volume = model.variables.volumes[0]
            stored = [torch.from_numpy(self.latents.read(key, "image").astype(np.float32)) for key in keys]
            scalars["image"] = volume.encode(torch.stack(stored))
        return {name: scalars[name] for name in names}

    def answer(self, keys: Sequence[str], want: str, names: Sequence[str], truth: Floats, batch: int = 50) -> Answer:
        """Ask everybody, in batches, from latents; the autoencoder's part is not counted."""
        given = self.given(keys, names)
        ask = self.laws if self.exact else self.chains
        parts = []
        for i in range(0, len(keys), batch):
            rows = {name: value[i : i + batch] for name, value in given.items()}
            parts.append(ask(rows, len(keys[i : i + batch]), want, keys[i:]))
        few = 20  # as the whole U-Net takes its time
        cost = self.cost({name: value[:few] for name, value in given.items()}, min(few, len(keys)), want, keys)
        said = np.concatenate(parts)
        if want == "sex":
            return Answer(said, **cost)
        if self.exact:
            mean, sd, low, high, score = self.described(said, truth)
            return Answer(mean, np.stack([low, high], 1), score, float(np.sqrt(np.mean(sd**2) + mean.var())), **cost)
        return Answer(said.mean(1), interval(said), ensemble_crps(said, truth), float(said.std()), **cost)

    def laws(self, given: dict[str, Tensor], rows: int, want: str, keys: Sequence[str] = ()) -> Floats:
        """Chances of M (rows,), or per person the logits, means and SDs of the density's components."""
        law = self.sampler.posterior(given, rows).laws([want])[want]
        if isinstance(law, Tensor):
            return law[:, 1].numpy()
        parts = law.component_distribution
        return torch.stack([law.mixture_distribution.logits, parts.mean, parts.stddev], 1).numpy()

    def described(self, said: Floats, truth: Floats) -> tuple[Floats, Floats, Floats, Floats, Floats]:
        """Mean, SD, 5 % and 95 % quantiles and CRPS, in years, of the laws that :meth:`laws` found."""
        age = self.sampler.model.variables["age"]
        assert isinstance(age, Continuous)
        logits, means, sds = torch.from_numpy(said).unbind(1)
        law = MixtureSameFamily(Categorical(logits=logits), Normal(means, sds))
        scale, z = (age.high - age.low) / 2, age.encode(truth.tolist())[:, 0].double()
        points = quantile(law, torch.tensor([0.05, 0.95], dtype=torch.float64))
        years = [age.decode(law.mean), law.stddev * scale, *(age.decode(points[:, i]) for i in range(2))]
        return tuple(x.numpy() for x in [*years, crps(law, z) * scale])  # type: ignore[return-value]

    def chains(self, given: dict[str, Tensor], rows: int, want: str, keys: Sequence[str] = ()) -> Floats:
        """Ages (rows, samples) in years, or the share of M (rows,)."""
        n, variable = self.samples, self.sampler.model.variables[want]
        repeated = {name: value.repeat_interleave(n, 0) for name, value in given.items()}
        noise = [generator(0, "scoreboard", key, chain) for key in keys[:rows] for chain in range(n)]
        drawn = self.sampler(repeated, noise, want=[want])[want]
        if isinstance(variable, Continuous):
            return variable.decode(drawn).reshape(rows, n).numpy()
        return drawn.double().reshape(rows, n).mean(1).numpy()

    def cost(self, given: dict[str, Tensor], rows: int, want: str, keys: Sequence[str]) -> dict[str, Any]:
        """Network calls, FLOPs and seconds per person, when ``rows`` people are asked about together."""
        model = self.sampler.model
        calls = self.sampler.calls * (1 if self.exact else self.samples)
        if self.whole:
            self.sampler.model = replace(model, denoiser=Whole(model.denoiser))  # type: ignore[arg-type]
        ask = self.laws if self.exact else self.chains
        with FlopCounterMode(display=False) as counter:
            ask({name: value[:1] for name, value in given.items()}, 1, want, keys)
        start = time.monotonic()
        ask(given, rows, want, keys)
        seconds = (time.monotonic() - start) / rows
        self.sampler.model = model
        return {"calls": calls, "flops": counter.get_total_flops(), "seconds": seconds}


class Whole(torch.nn.Module):
    """A denoiser that says everything, whatever is wanted."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, z: dict[str, Tensor], t: dict[str, Tensor], want: Sequence[str]) -> dict[str, Tensor]:
        said: dict[str, Tensor] = self.denoiser(z, t)
        return said


# --- the table ----------------------------------------------------------------------------------------------------


def ideal(root: Path, keys: Sequence[str], want: str, given: Sequence[str], truth: Floats) -> Answer:
    """The phantom's own posterior."""
    source = read_tables(root / "source").set_index("participant_id", drop=False)
    table = source.loc[list(keys)]
    if want == "sex":
        return Answer(best_possible(table, given)["M"].to_numpy())
    exact: Exact = posterior(table if "image" in given else None, None, table["sex"] if "sex" in given else None)
    n = len(keys)
    mass = np.broadcast_to(exact.age_mass, (n, len(exact.ages)))
    below = np.cumsum(mass, 1)
    step = (AGES[1] - AGES[0]) / len(exact.ages)
    score = ((below - (exact.ages >= truth[:, None])) ** 2).sum(1) * step
    low, median, high = (np.broadcast_to(exact.quantile(q), n) for q in (0.05, 0.5, 0.95))
    spread = np.broadcast_to(exact.sd, n)
    return Answer(
        median.copy(), np.stack([low, high], 1), score, float(np.sqrt(np.mean(spread**2) + np.var(exact.mean)))
    )


def constant(dataset: Dataset, n: int, want: str, truth: Floats) -> Answer:
    """The training people's mean age, or their share of men."""
    seen = [dataset.values(key)[want] for key in dataset.keys("train")]
    if want == "sex":
        return Answer(np.full(n, np.mean([v == "M" for v in seen])))
    ages = np.array(seen, float)
    interval = np.tile(np.quantile(ages, [0.05, 0.95]), (n, 1))
    score = ensemble_crps(np.tile(ages, (n, 1)), truth) if n * len(ages) ** 2 < 1e7 else None
    return Answer(np.full(n, ages.mean()), interval, score, float(ages.std()))


def paired(first: Floats, second: Floats) -> str:
    """Mean difference of two methods' scores of the same people with its 95 % interval."""
    difference = first - second
    result = bootstrap((difference,), np.mean, n_resamples=5000, rng=np.random.default_rng(0), method="percentile")
    low, high = result.confidence_interval
    return f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/scoreboard"))
    parser.add_argument("--people", type=int, default=350, help="test people asked about at most")
    parser.add_argument("--slow", type=int, default=100, help="of them, asked about by chains")
    parser.add_argument("--quick", action="store_true", help="a few people and one epoch, to try the script")
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    options = parser.parse_args()
    root = options.root.resolve()
    stages(root, options.quick)
    begun = time.time()
    dataset = open_dataset(root / "packed")
    keys = dataset.keys("test")[: options.people]
    truth = {
        "age": np.array([dataset.values(key)["age"] for key in keys], float),
        "sex": np.array([dataset.values(key)["sex"] == "M" for key in keys], float),
    }
    methods: dict[str, Callable[[str, Sequence[str], Sequence[str]], Answer | None]] = {
        "best possible": lambda want, given, k: ideal(root, k, want, given, truth[want][: len(k)]),
        "predicting the mean": lambda want, given, k: constant(dataset, len(k), want, truth[want][: len(k)]),
        "DenseNet121": lambda want, given, k: densenet(root, k, want, given),
    }
    joints = {
        "the paper's procedure": Joint(root / "paper", dataset, PAPER, 3, whole=True),
        "ours, 30 chains of 10 steps": Joint(root / "ours", dataset, CLEAN, 30),
        "ours, posterior": Joint(root / "ours", dataset, POSTERIOR),
    }
    for label, joint in joints.items():
        methods[label] = lambda want, given, k, j=joint: j.answer(k, want, given, truth[want][: len(k)])  # type: ignore[misc]

    answers: dict[tuple[str, int], Answer] = {}
    for label, method in methods.items():
        for number, (want, given) in enumerate(QUESTIONS):
            slow = label in joints and not joints[label].exact
            start = time.time()
            said = method(want, given, keys[: options.slow] if slow else keys)
            if said is not None:
                answers[label, number] = said
                print(f"{label}: {want} given {', '.join(given) or 'nothing'}: {time.time() - start:.0f} s", flush=True)
    text = report(answers, list(methods), truth) + minutes(root, time.time() - begun)
    print(text)
    if options.markdown:
        write_text(options.markdown, text)


def minutes(root: Path, asking: float) -> str:
    """What every stage took, the baselines two at a time, and asking everybody everything."""
    marks = sorted(root.glob("*/stage.json"), key=lambda path: path.stat().st_mtime)
    took = {path.parent.name.removesuffix(".run"): record(path.parent)["seconds"] for path in marks}
    return "\nMinutes: " + ", ".join(f"{name} {s / 60:.1f}" for name, s in {**took, "asking": asking}.items()) + ".\n"


def scores(answer: Answer, want: str, truth: Floats) -> Floats:
    """Absolute errors in years, or hits, per person."""
    n = len(answer.point)
    if want == "sex":
        return ((answer.point >= 0.5) == (truth[:n] == 1)).astype(float)
    return np.abs(answer.point - truth[:n])


def report(answers: dict[tuple[str, int], Answer], labels: Sequence[str], truth: dict[str, Floats]) -> str:
    """Three tables in Markdown: errors, whole distributions, costs; and paired differences."""
    names = [f"{want} given {', '.join(given) or 'nothing'}" for want, given in QUESTIONS]
    errors, laws, costs = [], [], []
    for label in labels:
        found = [answers.get((label, number)) for number in range(len(QUESTIONS))]
        cells = []
        for said, (want, _) in zip(found, QUESTIONS):
            cells.append(mean_over_subjects(scores(said, want, truth[want])).format(2) if said else "-")
        errors.append([label, *cells])
        cells = []
        for said in found[:4]:
            inside = ""
            if said and said.interval is not None:
                low, high = said.interval.T
                t = truth["age"][: len(low)]
                inside = f"{100 * np.mean((low <= t) & (t <= high)):.0f} %"
            score = f"{said.crps.mean():.2f}" if said and said.crps is not None else ""
            cells.append(", ".join(x for x in (inside, score) if x) or "-")
        nothing = found[3]
        laws.append([label, *cells, f"{nothing.sd:.1f}" if nothing else "-"])
        asked = found[0]
        if asked and asked.calls:
            costs.append([label, str(asked.calls), f"{asked.flops / 1e9:.3g}", f"{1000 * asked.seconds:.3g}"])
    tables = [
        Table(["error in years, or accuracy", *names], errors),
        Table(["90 % interval holds, CRPS in years", *names[:4], "SD of p(age)"], laws),
        Table(["per person, age given image and sex", "network calls", "GFLOP", "ms"], costs),
    ]
    lines = [table.markdown() + "\n" for table in tables]
    lines.append("Ours by its posterior less DenseNet121, paired over people:\n")
    for number, (want, _) in enumerate(QUESTIONS):
        if ("DenseNet121", number) in answers:
            mine, theirs = (
                scores(answers[label, number], want, truth[want]) for label in ("ours, posterior", "DenseNet121")
            )
            lines.append(f"- {names[number]}: {paired(mine, theirs)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
