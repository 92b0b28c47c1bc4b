"""The networks of the joint model: which there are, and both as the one function that samplers call."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from mvhpc import config
from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.layers import Values
from mvhpc.models.linear_denoiser import LinearDenoiser
from mvhpc.models.scalar_predictor import ScalarPredictor
from mvhpc.variables import Variables
from shards.schema import Schema


def network_classes(variables: Variables | Schema, model: config.DenoiserConfig) -> dict[str, type[nn.Module]]:
    """Network name -> class: ``denoiser``, and in the late design ``scalars`` where there are scalars.

    Each class is called with variables, model and masked level.
    """
    classes: dict[str, type[nn.Module]] = {"denoiser": JointDenoiser}
    if model.scalars == "late" and variables.scalars:
        classes["scalars"] = ScalarPredictor
    return classes


def build_networks(
    variables: Variables, model: config.DenoiserConfig, masked_level: int | None = None
) -> dict[str, nn.Module]:
    """All networks of a joint model by name, untrained."""
    classes: dict[str, Any] = dict(network_classes(variables, model))
    return {name: kind(variables, model, masked_level) for name, kind in classes.items()}


class JointNetwork:
    """f(z, t) over all variables; each network is called only where one of its outputs is wanted.

    Args:
        denoiser: of volumes; in the early design of all variables.
        scalars: of scalars; None in the early design.
        linear: added to what the denoiser predicts of volumes; None in the early design.
    """

    def __init__(
        self, denoiser: JointDenoiser, scalars: ScalarPredictor | None = None, linear: LinearDenoiser | None = None
    ) -> None:
        self.denoiser, self.scalars, self.linear = denoiser, scalars, linear

    def __call__(self, z: Values, t: Values, want: Collection[str] | None = None) -> dict[str, Tensor]:
        """Outputs by variable; see the networks' ``forward``."""
        want = self.denoiser.names if want is None else want
        outputs: dict[str, Tensor] = {}
        if self.scalars is not None and not {v.name for v in self.scalars.scalars}.isdisjoint(want):
            outputs |= self.scalars(z, t, want)
        if not set(self.denoiser.outputs).isdisjoint(want):
            outputs |= self.denoiser(z, t, want)
            if self.linear is not None:
                outputs = self.linear.added_to(outputs, z, t)
        return outputs
