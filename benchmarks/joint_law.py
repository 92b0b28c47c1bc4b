"""How close a trained joint model comes to every conditional of a law that is known in closed form.

    python benchmarks/joint_law.py [--steps 3000]

The law: a category of three classes; given the class a small image (4 x 4 x 4) and two numbers are jointly Gaussian.
Our network learns it from fresh draws, then answers, for every subset of given variables, what the other scalars are,
by each way of conditioning. Printed, beside the exact answers: the error of the mean in units of the exact posterior
mean's own error (1 is the best possible), the spread in units of the exact SD, and the distance of the mean chances of
the classes. Everything is drawn from fixed seeds.
"""

import argparse
import time
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import MultivariateNormal

from mvhpc import config
from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.diffusion.sampling import sample
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.randomness import generator
from mvhpc.variables import Categorical, Continuous, Variables, Volume
from shards.progress import progress

SIDE, K, FACTORS = 4, 3, 5
VOXELS = SIDE**3
NUMBERS = ("a", "b")
VARIABLES = Variables(
    [
        Volume("image", (1, SIDE, SIDE, SIDE)),
        *(Continuous(name, -1, 1) for name in NUMBERS),  # [-1, 1] is [-1, 1]: numbers are their own encoding
        Categorical("site", ("x", "y", "z")),
    ]
)
NETWORK = config.Denoiser([32, 64], [False, True], 1, 32, 8, 128, 0.0, False)
DIFFUSION = config.Diffusion(1000, 0.0015, 0.0195, "independent", 0.1, 0.4, 0.3, "v", "v", {})
METHODS = {
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
        """n people."""
        k = torch.multinomial(self.prior, n, replacement=True, generator=g)
        root = torch.linalg.cholesky(self.covariance)
        x = self.mean[k] + (root[k] @ torch.randn(n, VOXELS + 2, 1, generator=g, dtype=torch.float64))[..., 0]
        x = x.float()
        image = x[:, :VOXELS].reshape(n, 1, SIDE, SIDE, SIDE)
        return {"image": image, "a": x[:, VOXELS, None], "b": x[:, VOXELS + 1, None], "site": k}

    def posterior(self, people: dict[str, Tensor], given: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and SD (n,) of each number not given; of ``site``, the chances (n, K) and nothing."""
        dims = {"image": list(range(VOXELS)), "a": [VOXELS], "b": [VOXELS + 1]}
        seen = [i for name in given if name != "site" for i in dims[name]]
        rest = [name for name in NUMBERS if name not in given]
        n = len(people["site"])
        log, means, variances = self.prior.log().expand(n, K).clone(), [], []
        x = torch.cat([people["image"].flatten(1), people["a"], people["b"]], 1).double()[:, seen]
        at = [dims[name][0] for name in rest]
        for k in range(K):
            mean, cov = self.mean[k], self.covariance[k]
            gain = cov[at][:, seen] @ torch.linalg.inv(cov[seen][:, seen])  # (r, s)
            if seen:
                log[:, k] += MultivariateNormal(mean[seen], cov[seen][:, seen]).log_prob(x)
            means.append(mean[at] + (x - mean[seen]) @ gain.T)  # (n, r)
            variances.append((cov[at][:, at] - gain @ cov[seen][:, at]).diagonal().expand(n, -1))
        chances = F.one_hot(people["site"], K).double() if "site" in given else log.softmax(1)  # (n, K)
        mean, variance = torch.stack(means, 1), torch.stack(variances, 1)  # (n, K, r)
        centre = (chances[..., None] * mean).sum(1)
        spread = (chances[..., None] * (variance + (mean - centre[:, None]) ** 2)).sum(1).sqrt()
        exact = {name: (centre[:, i], spread[:, i]) for i, name in enumerate(rest)}
        return exact if "site" in given else exact | {"site": (chances, chances)}


def learn(law: Law, steps: int, batch: int = 128) -> tuple[JointDenoiser, JointDiffusion]:
    """A network trained on fresh draws, averaged over its last weights."""
    torch.manual_seed(0)
    network, diffusion = JointDenoiser(VARIABLES, NETWORK), JointDiffusion(VARIABLES, DIFFUSION)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)
    averaged = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    g = torch.Generator().manual_seed(1)
    for step in progress(range(steps), "training", unit="step"):
        generators = [generator(0, "law", step, i) for i in range(batch)]
        noised = diffusion.noise(law.draw(batch, g), {}, diffusion.draw_times(generators), generators)
        loss = diffusion.total(diffusion.losses(network(noised.z, noised.t), noised)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(network)
    return averaged.module.eval(), diffusion


def answers(
    network: JointDenoiser,
    diffusion: JointDiffusion,
    people: dict[str, Tensor],
    given: tuple[str, ...],
    method: dict[str, object],
    samples: int,
) -> dict[str, Tensor]:
    """Draws (n, samples) of each scalar."""
    n = len(people["site"])
    fixed = {name: people[name].repeat_interleave(samples, 0) for name in given}
    generators = [generator(0, "answer", i, j) for i in range(n) for j in range(samples)]
    drawn = sample(network, diffusion, fixed, generators, **method)  # type: ignore[arg-type]
    return {name: drawn[name].reshape(n, samples) for name in (*NUMBERS, "site")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="of training")
    parser.add_argument("--people", type=int, default=100, help="asked about")
    parser.add_argument("--samples", type=int, default=30, help="chains a question")
    options = parser.parse_args()
    law = Law()
    start = time.time()
    network, diffusion = learn(law, options.steps)
    print(f"{options.steps} steps of training in {time.time() - start:.0f} s\n")
    people = law.draw(options.people, torch.Generator().manual_seed(2))
    print("| given | conditioning | error / best | SD / exact | chances off | s |\n|---|---|---:|---:|---:|---:|")
    for size in range(4):
        for given in combinations(VARIABLES.names, size):
            exact = law.posterior(people, given)
            for label, method in METHODS.items() if exact else ():
                start = time.time()
                drawn = answers(network, diffusion, people, given, method, options.samples)
                seconds = time.time() - start
                numbers = [name for name in NUMBERS if name in exact]
                error, spread = [], []
                for name in numbers:
                    truth, (mean, sd) = people[name].flatten().double(), exact[name]
                    ours = drawn[name].double()
                    error.append(
                        float((ours.mean(1) - truth).square().mean().sqrt() / (mean - truth).square().mean().sqrt())
                    )
                    spread.append(float(ours.std(1).mean() / sd.mean()))
                shown = [f"{sum(v) / len(v):.3f}" if v else "" for v in (error, spread)]
                if "site" in exact:
                    share = F.one_hot(drawn["site"], K).double().mean((0, 1))
                    shown.append(f"{(share - exact['site'][0].mean(0)).abs().max():.3f}")
                else:
                    shown.append("")
                print(
                    f"| {', '.join(given) or 'nothing'} | {label} | {' | '.join(shown)} | {seconds:.1f} |", flush=True
                )


if __name__ == "__main__":
    main()
