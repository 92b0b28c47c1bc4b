"""Calibration of predictive densities on held-out subjects.

A network is overconfident about subjects it was not trained on: by a factor of two with a hundred training subjects.
One temperature per scalar, fitted to held-out subjects, widens its density about the mean, or divides the logits of its
classes (temperature scaling, Guo et al. 2017). Means and the order of classes do not change.
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
from mvhpc.runtime.devices import one_thread

PRIOR = math.log(2)  # SD of the prior of the temperature's logarithm; with few subjects the temperature stays near 1
LIMITS = (math.log(0.25), math.log(8))
BATCH = 64  # subjects per batch


@torch.inference_mode()
@one_thread()  # training and export find the same temperatures, to the bit
def calibrate(
    network: ScalarNetwork,
    diffusion: JointDiffusion,
    clean: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    held_out: Tensor,
) -> dict[str, float]:
    """The most probable temperatures, given held-out subjects.

    Every scalar is predicted twice: given the volumes, and given the volumes and all other scalars.

    Args:
        network: ready for inference, in the precision of inference.
        diffusion: on the same device.
        clean: encoded values of N subjects, by variable.
        present: by variable, which subjects have a value, (N,) bool.
        held_out: (N, R) bool, for each subject the one of R ensemble members that was not trained on it.

    Returns:
        Temperature by scalar, of the scalars that any subject has; empty for a model without posterior.
    """
    if why_not(network, diffusion):
        return {}
    volumes = [v.name for v in diffusion.variables.volumes]
    has_volume = torch.stack([present[name] for name in volumes]).any(0)
    temperatures = {}
    for v in diffusion.variables.scalars:
        rows = torch.nonzero(has_volume & present[v.name])[:, 0]
        if not len(rows):
            continue
        outputs = []
        for given in (volumes, [name for name in diffusion.variables.names if name != v.name]):
            for part in rows.split(BATCH):
                known = {name: clean[name][part] for name in given}, {name: present[name][part] for name in given}
                posterior = Posterior(network, diffusion, known[0], len(part), known[1])
                output = network.predict(posterior.features, posterior.z, posterior.t, [v.name])[v.name]
                outputs.append(by_member(output)[held_out[part]])  # from (n, R, ...)
        truth = clean[v.name][rows].repeat(2, *[1] * (clean[v.name].ndim - 1)).to(diffusion.device)
        objective = partial(_objective, torch.cat(outputs).double(), truth, diffusion.parameterization(v))
        temperatures[v.name] = math.exp(minimize_scalar(objective, bounds=LIMITS, method="bounded").x)
    return temperatures


def _objective(outputs: Tensor, truth: Tensor, kind: str, log: float) -> float:
    """Negative log posterior of a temperature.

    Args:
        outputs: of the network for N subjects, each twice.
        truth: encoded values, in the same order.
        kind: parameterisation of a number.
        log: logarithm of the temperature.
    """
    if truth.dtype is torch.int64:
        nll = F.cross_entropy(outputs / math.exp(log), truth, reduction="sum")
    else:
        nll = -density(outputs, kind, math.exp(log)).log_prob(truth[:, 0].double()).sum()
    return float(nll) / 2 + 0.5 * (log / PRIOR) ** 2
