"""Calibration: how much wider predictive laws must be than training alone says.

A network knows the people it learnt from better than anybody else, and so takes its answers from an image for surer
than they are: with a hundred subjects by a factor of two. People it did not learn from show by how much. One factor a
scalar stretches its density about its mean, or divides the logits of its classes (temperature scaling, Guo et al.
2017); means and the order of classes stay as they are.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from mvhpc.diffusion.density import by_member, density
from mvhpc.diffusion.joint import JointDiffusion
from mvhpc.diffusion.posterior import Posterior, ScalarNetwork, why_not

PRIOR = math.log(2)  # SD of the factor's logarithm before anybody is seen: so few people cannot push it far
LIMITS = (math.log(0.25), math.log(8))
PART = 64  # people at a time


@torch.inference_mode()
def calibrate(
    denoiser: ScalarNetwork,
    diffusion: JointDiffusion,
    clean: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    judged: Tensor,
) -> dict[str, float]:
    """The most probable factors, given people that were not trained on.

    Each is asked for every scalar twice: given the volumes, and given the volumes and all other scalars.

    Args:
        denoiser: in evaluation mode.
        diffusion: on the same device.
        clean: encoded values of N people.
        present: who has them, (N,) bool.
        judged: (N, R) bool, for each person the one of R readers that did not learn from them.

    Returns:
        By scalar; empty for a model without posterior, and without those that nobody here has.
    """
    if why_not(denoiser, diffusion):
        return {}
    volumes = [v.name for v in diffusion.variables.volumes]
    anybody = torch.stack([present[name] for name in volumes]).any(0)
    factors = {}
    for v in diffusion.variables.scalars:
        rows = torch.nonzero(anybody & present[v.name])[:, 0]
        if not len(rows):
            continue
        said = []
        for given in (volumes, [name for name in diffusion.variables.names if name != v.name]):
            for part in rows.split(PART):
                known = {name: clean[name][part] for name in given}, {name: present[name][part] for name in given}
                asked = Posterior(denoiser, diffusion, known[0], len(part), known[1])
                answers = by_member(denoiser.predict(asked.features, asked.z, asked.t, [v.name])[v.name])  # (n, R, ...)
                said.append(answers[judged[part]])
        truth = clean[v.name][rows].repeat(2, *[1] * (clean[v.name].ndim - 1)).to(diffusion.device)
        surprise = partial(_surprise, torch.cat(said).double(), truth, diffusion.parameterization(v))
        factors[v.name] = math.exp(minimize_scalar(surprise, bounds=LIMITS, method="bounded").x)
    return factors


def _surprise(said: Tensor, truth: Tensor, kind: str, log: float) -> float:
    """Negative logarithm of how probable a factor is, from outputs about N people, twice; ``log`` of the factor."""
    if truth.dtype is torch.int64:
        total = F.cross_entropy(said / math.exp(log), truth, reduction="sum")
    else:
        total = -density(said, kind, math.exp(log)).log_prob(truth[:, 0].double()).sum()
    return float(total) / 2 + 0.5 * (log / PRIOR) ** 2
