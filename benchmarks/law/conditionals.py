"""Every conditional of trained joint models beside those of a law in closed form.

    python -m benchmarks.law.conditionals [--steps 6000 | --exact] [--scalars] [--markdown FILE]

The law: a category of three classes; given the class, a small image (4 x 4 x 4) and two numbers are jointly Gaussian.
The U-Nets of both designs are trained on fresh draws, as the joint stage trains them: that of the early design predicts
all variables, that of the late design the image alone, beside a linear denoiser. Chains of the early design draw the
other scalars given every subset of the variables; chains of both draw the image given every subset of the scalars.
Compared with the exact conditionals are: the error of the mean in units of the exact posterior mean's error (1 is the
best possible), the SD in units of the exact SD, the mean distance of the class probabilities, and C2ST, the accuracy of
a classifier that separates (given, draw) pairs of the model from exact ones (0.5 is chance; Lopez-Paz and Oquab 2017).
With --exact the denoiser of the law itself replaces the networks, which leaves the error of the solvers. All seeds are
fixed.
"""

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from mvhpc import config
from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.diffusion.sampling import Denoiser, sample
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.linear_denoiser import LinearDenoiser
from mvhpc.runtime.randomness import generator
from mvhpc.variables import Categorical, Continuous, Variables, Volume
from shards.progress import progress

SIDE, K, FACTORS = 4, 3, 5
VOXELS = SIDE**3
NUMBERS = ("a", "b")
VARIABLES = Variables(
    [
        Volume("image", (1, SIDE, SIDE, SIDE)),
        *(Continuous(name, -1, 1) for name in NUMBERS),  # so that a number is its own encoding
        Categorical("site", ("x", "y", "z")),
    ]
)
NETWORK = config.DenoiserConfig(
    scalars="early",
    channels=[32, 64],
    attention=[False, True],
    res_blocks=1,
    head_channels=32,
    norm_groups=8,
    embedding=64,
    dropout=0.0,
    checkpointing=False,
)
DIFFUSION = config.DiffusionConfig(
    steps=1000,
    beta_start=0.0015,
    beta_end=0.0195,
    time="independent",
    shared_fraction=0.1,
    clean_fraction=0.4,
    noise_fraction=0.3,
    volume="v",
    continuous="v",
    weights={},
)
SCALARS = (*NUMBERS, "site")
FITTED, COMPONENTS = 1024, 16  # draws that the linear denoiser is fitted to, and its components
SOLVERS: dict[str, dict[str, object]] = {
    "repaint, DDIM, 50 steps": {"conditioning": "repaint", "solver": "ddim", "steps": 50, "stride": 20},
    "clean, DDIM, 50 steps": {"conditioning": "clean", "solver": "ddim", "steps": 50, "stride": 20},
    "clean, DPM-Solver++, 10 steps": {"conditioning": "clean", "solver": "dpm", "steps": 10, "stride": 1000},
}


class Law:
    """x | k ~ N(mean_k, covariance_k) over 64 voxels and two numbers; the numbers are standardised."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(5)
        load = torch.randn(VOXELS + 2, FACTORS, generator=g, dtype=torch.float64) * 0.5
        noise = torch.cat([torch.full((VOXELS,), 0.8), torch.full((2,), 0.5)]).double()
        self.prior = torch.tensor([0.25, 0.45, 0.3], dtype=torch.float64)
        centre = torch.randn(K, FACTORS, generator=g, dtype=torch.float64)
        mean = centre @ load.T  # (K, D)
        covariance = torch.stack([load @ load.T * c + torch.diag(noise**2) for c in (1.0, 0.6, 1.4)])  # (K, D, D)
        middle = self.prior @ mean
        spread = (self.prior @ (covariance.diagonal(dim1=1, dim2=2) + (mean - middle) ** 2)).sqrt()
        self.mean = (mean - middle) / spread
        self.covariance = covariance / spread / spread[:, None]

    def draw(self, n: int, g: torch.Generator) -> dict[str, Tensor]:
        """Draw n people."""
        k = torch.multinomial(self.prior, n, replacement=True, generator=g)
        root = torch.linalg.cholesky(self.covariance)
        x = self.mean[k] + (root[k] @ torch.randn(n, VOXELS + 2, 1, generator=g, dtype=torch.float64))[..., 0]
        x = x.float()
        image = x[:, :VOXELS].reshape(n, 1, SIDE, SIDE, SIDE)
        return {"image": image, "a": x[:, VOXELS, None], "b": x[:, VOXELS + 1, None], "site": k}

    def given(
        self, people: dict[str, Tensor], given: tuple[str, ...], want: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The exact conditional of the class and of further variables.

        Returns:
            Chances of the classes (n, K); mean (n, K, r) and covariance (K, r, r), by class, of the r numbers or voxels
            that are wanted.
        """
        dims = {"image": list(range(VOXELS)), "a": [VOXELS], "b": [VOXELS + 1]}
        seen = [i for name in given if name != "site" for i in dims[name]]
        at = [i for name in want if name != "site" for i in dims[name]]
        n = len(people["site"])
        log, means, covariances = self.prior.log().expand(n, K).clone(), [], []
        x = torch.cat([people["image"].flatten(1), people["a"], people["b"]], 1).double()[:, seen]
        for k in range(K):
            mean, cov = self.mean[k], self.covariance[k]
            gain = cov[at][:, seen] @ torch.linalg.inv(cov[seen][:, seen])  # (r, s)
            if seen:
                log[:, k] += MultivariateNormal(mean[seen], cov[seen][:, seen]).log_prob(x)
            means.append(mean[at] + (x - mean[seen]) @ gain.T)  # (n, r)
            covariances.append(cov[at][:, at] - gain @ cov[seen][:, at])
        chances = F.one_hot(people["site"], K).double() if "site" in given else log.softmax(1)  # (n, K)
        return chances, torch.stack(means, 1), torch.stack(covariances)


class Trained:
    """The U-Net of a design, trained on fresh draws as the joint stage trains it, with averaged weights.

    Args:
        law: to draw from.
        diffusion: the forward processes.
        design: early | late; the late one has a linear denoiser beside it.
        steps: of training.
        batch: draws of a step.
    """

    def __init__(self, law: Law, diffusion: JointDiffusion, design: str, steps: int, batch: int = 128) -> None:
        torch.manual_seed(0)
        late = design == "late"
        self.network = JointDenoiser(VARIABLES, replace(NETWORK, scalars=design), diffusion.masked_level)
        self.linear: LinearDenoiser | None = None
        if late:
            known = {name: torch.ones(FITTED, dtype=torch.bool) for name in VARIABLES.names}
            some = law.draw(FITTED, torch.Generator().manual_seed(6))
            self.linear = LinearDenoiser.fit(diffusion, some, known, COMPONENTS)
        optimizer = torch.optim.AdamW(self.network.parameters(), 1e-3, betas=(0.9, 0.99))
        warmup = max(0.05, 2 / steps)  # share of the steps, at least two
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=warmup)
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
        averaged = torch.optim.swa_utils.AveragedModel(self.network, multi_avg_fn=average)
        g = torch.Generator().manual_seed(1)
        for step in progress(range(steps), f"training, {design}", unit="step"):
            generators = [generator(0, "law", step, i) for i in range(batch)]
            levels = diffusion.draw_times(generators, volumes_move=late)
            noised = diffusion.noise(law.draw(batch, g), {}, levels, generators)
            loss = diffusion.total(diffusion.losses(self(noised.z, noised.t), noised)).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            averaged.update_parameters(self.network)
        self.network.load_state_dict(averaged.module.state_dict())
        self.network.eval()

    def __call__(self, z: dict[str, Tensor], t: dict[str, Tensor], want: list[str] | None = None) -> dict[str, Tensor]:
        outputs = self.network(z, t, want)
        return outputs if self.linear is None else self.linear.added_to(outputs, z, t)


class Exact:
    """The denoiser of the law itself: E[x_0 | z_t] as v, and the class probabilities, at any levels."""

    def __init__(self, law: Law, diffusion: JointDiffusion) -> None:
        self.law, self.diffusion = law, diffusion

    def __call__(self, z: dict[str, Tensor], t: dict[str, Tensor], want: list[str]) -> dict[str, Tensor]:
        law = self.law
        level = {name: int(levels.unique()) for name, levels in t.items()}  # the same in all rows
        abar = self.diffusion.gaussian.abar
        share = torch.cat([abar[level["image"]].repeat(VOXELS), *(abar[level[name]][None] for name in NUMBERS)])
        a, b = share.sqrt(), (1 - share).sqrt()  # (D,)
        x = torch.cat([z["image"].flatten(1), *(z[name] for name in NUMBERS)], 1).double()  # (n, D)
        noisy = a[:, None] * law.covariance * a + torch.diag(b**2 + 1e-9)  # (K, D, D)
        off = x[:, None] - a * law.mean  # (n, K, D)
        seen = self.diffusion.categorical.marginal(F.one_hot(z["site"], K), level["site"]).clamp(min=1e-300)
        logits = MultivariateNormal(torch.zeros(len(a)).double(), noisy).log_prob(off) + law.prior.log() + seen.log()
        gain = law.covariance * a @ torch.linalg.inv(noisy)
        x0 = law.mean + torch.einsum("kij,nkj->nki", gain, off)
        x0 = (logits.softmax(1)[..., None] * x0).sum(1)  # (n, D)
        v = (a * (x - a * x0) / b.clamp(min=1e-6) - b * x0).float()
        predicted = {
            "image": v[:, :VOXELS].reshape(z["image"].shape),
            "a": v[:, VOXELS, None],
            "b": v[:, VOXELS + 1, None],
        }
        return {name: {**predicted, "site": logits}[name] for name in want}


@dataclass(frozen=True)
class Prediction:
    """Predictions for n people of r numbers (or voxels) and of the class.

    Attributes:
        draws: joint draws (n, samples, r).
        classes: those of the class (n, samples); None where it is not wanted.
    """

    draws: Tensor
    classes: Tensor | None


def predict(
    denoiser: Denoiser,
    diffusion: JointDiffusion,
    people: Mapping[str, Tensor],
    given: tuple[str, ...],
    want: tuple[str, ...],
    solver: Mapping[str, object],
    samples: int,
) -> Prediction:
    """Draw ``want`` given ``given`` by chains."""
    n = len(people["site"])
    fixed = {name: people[name].repeat_interleave(samples, 0) for name in given}
    generators = [generator(0, "answer", i, j) for i in range(n) for j in range(samples)]
    drawn = sample(denoiser, diffusion, fixed, generators, want=want, **solver)  # type: ignore[arg-type]
    parts = [drawn[name].reshape(n, samples, -1).double() for name in want if name != "site"]
    draws = torch.cat([torch.empty(n, samples, 0, dtype=torch.float64), *parts], 2)  # (n, samples, r)
    return Prediction(draws, drawn["site"].reshape(n, samples) if "site" in want else None)


def c2st(predicted: Prediction, exact: tuple[Tensor, Tensor, Tensor]) -> float:
    """Held-out accuracy of a classifier that separates pairs (given, joint draw) of the model from exact ones.

    The given values are represented by the exact means and probabilities, the draws by their difference from that mean.
    """
    chances, means, covariances = exact
    g = torch.Generator().manual_seed(4)
    n, samples, r = predicted.draws.shape
    centre = (chances[..., None] * means).sum(1)  # (n, r)
    k = torch.multinomial(chances, samples, replacement=True, generator=g)  # (n, samples)
    noise = torch.randn(n, samples, r, 1, generator=g, dtype=torch.float64)
    drawn = means[torch.arange(n)[:, None], k] + (torch.linalg.cholesky(covariances)[k] @ noise)[..., 0]
    context = torch.cat([centre, chances], 1)[:, None].expand(-1, samples, -1)

    def table(draws: Tensor, classes: Tensor | None) -> Tensor:
        parts = [context, draws - centre[:, None]]
        if classes is not None:
            parts.append(F.one_hot(classes, K).double())
        return torch.cat(parts, 2).flatten(0, 1)  # (n x samples, features)

    model = table(predicted.draws, predicted.classes)
    x = torch.cat([model, table(drawn, None if predicted.classes is None else k)]).numpy()
    x = (x - x.mean(0)) / (x.std(0) + 1e-9)
    y = np.repeat([0, 1], len(model))
    people = np.tile(np.repeat(np.arange(n), samples), 2)
    classifier = MLPClassifier((32, 32), early_stopping=True, max_iter=100, random_state=0)
    folds = StratifiedGroupKFold(3, shuffle=True, random_state=0)
    return float(cross_val_score(classifier, x, y, groups=people, cv=folds).mean())


def queries(scalars: bool) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """(wanted, given): all scalars that are not given, given every subset; the image given every subset of them, unless
    ``scalars`` alone are wanted."""
    subsets = [given for size in range(4) for given in combinations(VARIABLES.names, size)]
    numbers = [(tuple(name for name in SCALARS if name not in given), given) for given in subsets]
    images = [(("image",), given) for given in subsets if "image" not in given]
    return [*((want, given) for want, given in numbers if want), *(() if scalars else images)]


def measure(predicted: Prediction, exact: tuple[Tensor, Tensor, Tensor], several: bool) -> list[list[float]]:
    """Error over best, SD over exact, distance of probabilities, C2ST; of each number, or of all voxels together."""
    chances, means, covariances = exact
    centre = (chances[..., None] * means).sum(1)  # (n, r)
    variance = covariances.diagonal(dim1=1, dim2=2) + (means - centre[:, None]) ** 2  # (n, K, r)
    best = (chances[..., None] * variance).sum(1).mean(0)  # (r,)
    # E (ours - truth)^2 = E (ours - exact mean)^2 + E variance: without the chance of the sampled truth
    mean = predicted.draws.mean(1, keepdim=True)
    off = (mean[:, 0] - centre).square().mean(0)
    spread = (predicted.draws - mean).square().sum(1).mean(0) / (predicted.draws.shape[1] - 1)
    if several:
        best, off, spread = (x.mean(0, keepdim=True) for x in (best, off, spread))
    far = []
    if predicted.classes is not None:
        far = [float((F.one_hot(predicted.classes, K).double().mean(1) - chances).abs().mean())]
    return [(1 + off / best).sqrt().tolist(), (spread / best).sqrt().tolist(), far, [c2st(predicted, exact)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="of training")
    parser.add_argument("--exact", action="store_true", help="the denoiser of the law itself in place of the networks")
    parser.add_argument("--scalars", action="store_true", help="leave out drawing the image")
    parser.add_argument("--people", type=int, default=100, help="to predict for")
    parser.add_argument("--samples", type=int, default=30, help="chains per query")
    parser.add_argument("--markdown", type=Path, help="write the tables there too")
    options = parser.parse_args()
    law = Law()
    diffusion = JointDiffusion(VARIABLES, DIFFUSION)
    denoisers: dict[str, Denoiser] = {}
    if options.exact:
        denoisers["exact"] = Exact(law, diffusion)
    else:
        designs = ["early"] if options.scalars else ["early", "late"]
        denoisers |= {design: Trained(law, diffusion, design, options.steps) for design in designs}
    methods = {  # the U-Net of the late design predicts no scalars, which repainting would need
        f"{name}, {label}": (name, solver)
        for name in denoisers
        for label, solver in SOLVERS.items()
        if name != "late" or solver["conditioning"] == "clean"
    }
    lines = ["| given | wanted | method | error / best | SD / exact | chances off | C2ST | s |"]
    lines += ["|---|---|---|---:|---:|---:|---:|---:|"]
    print("\n".join(lines))
    found: dict[tuple[bool, str], list[list[float]]] = {}
    people = law.draw(options.people, torch.Generator().manual_seed(2))
    for want, given in queries(options.scalars):
        exact, image = law.given(people, given, want), want == ("image",)
        for label, (name, solver) in methods.items():
            if name == "late" and not image:
                continue
            start = time.time()
            predicted = predict(denoisers[name], diffusion, people, given, want, solver, options.samples)
            seconds = time.time() - start
            error, ratio, far, accuracy = measure(predicted, exact, image)
            columns = found.setdefault((image, label), [[], [], [], []])
            for column, values in zip(columns, (error, [abs(r - 1) for r in ratio], far, accuracy)):
                column += values
            cells = [", ".join(f"{x:.3f}" for x in v) for v in (error, ratio, far, accuracy)]
            names = ", ".join(given) or "nothing", ", ".join(want)
            lines.append(f"| {' | '.join([*names, label, *cells, f'{seconds:.1f}'])} |")
            print(lines[-1], flush=True)
    summary = []
    for image in sorted({of_image for of_image, _ in found}):
        summary += [f"| {'the image' if image else 'scalars'} | error / best: mean, worst | SD off: mean, worst "
                    "| chances off | C2ST |", "|---|---:|---:|---:|---:|"]  # fmt: skip
        for (of_image, label), columns in found.items():
            if of_image == image:
                cells = [f"{sum(c) / len(c):.3f}, {max(c):.3f}" if c else "" for c in columns]
                summary.append(f"| {label} | {' | '.join(cells)} |")
        summary.append("")
    print("\n" + "\n".join(summary))
    if options.markdown:
        options.markdown.write_text("\n".join([*summary, *lines]) + "\n")


if __name__ == "__main__":
    main()
