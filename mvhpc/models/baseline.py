"""The comparison: a network trained for one question alone (paper, section 4.2), from voxels."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Norm
from monai.networks.nets import DenseNet121
from torch import Tensor, nn

from mvhpc.models.kernels.normalization import WholeBatchNorm
from mvhpc.variables import Categorical, Scalar, Variables
from shards.schema import Schema

SMALLEST = 29  # voxels an axis; of fewer, five halvings leave nothing
Norm.add_factory_class("whole_batch", WholeBatchNorm)


def scalars_of(schema: Schema, names: Sequence[str], intervals: Mapping[str, Sequence[float]]) -> Variables:
    """The scalars among ``names``, as a baseline takes and says them.

    Args:
        schema: of all variables.
        names: of a question, volumes too.
        intervals: what becomes [-1, 1] of a number; the schema's range where not named.
    """
    return Variables.from_schema(Schema(tuple(v for v in schema.scalars if v.name in names)), {}, intervals)


class Baseline(nn.Module):
    """3D DenseNet121 (Huang et al. 2017) from volumes and scalars, joined at the input, to one scalar.

    A given volume is an input channel; so is a given number, the same everywhere, and each class of a given category,
    one-hot. A scalar that is missing is 0 in all its channels.

    Args:
        scalars: encodings of the question's scalars.
        given: names; those that are no scalars are volumes, in the order of their channels.
        want: the scalar to answer.
    """

    def __init__(self, scalars: Variables, given: Sequence[str], want: str) -> None:
        super().__init__()
        self.told: list[Scalar] = [v for v in scalars.scalars if v.name in given]
        channels = len(given) - len(self.told) + sum(map(_width, self.told))
        wanted = next(v for v in scalars.scalars if v.name == want)
        self.network = DenseNet121(3, channels, _width(wanted), norm="whole_batch")

    def forward(self, voxels: Tensor, values: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """What is said of the wanted scalar.

        Args:
            voxels: of the given volumes, (B, V, H, W, D) in [0, 1], each axis of :data:`SMALLEST` or more.
            values: encoded scalars by name, (B, 1) of a number, (B,) of a category; those not given are not looked at.
            present: who has them, (B,) bool.

        Returns:
            (B, 1), a number as it is encoded; or (B, K), logits of the classes.
        """
        said: Tensor = self.network(self.channels(voxels, values, present))
        return said

    def channels(self, voxels: Tensor, values: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """What :meth:`forward` takes, joined as the network's input channels (B, C, H, W, D)."""
        channels = [voxels]
        for v in self.told:
            x = values[v.name]
            if isinstance(v, Categorical):
                x = F.one_hot(x, v.size).float()
            x = x * present[v.name][:, None]  # (B, 1 or K)
            channels.append(x[:, :, None, None, None].expand(-1, -1, *voxels.shape[2:]))
        return torch.cat(channels, 1)


def _width(variable: Scalar) -> int:
    return variable.size if isinstance(variable, Categorical) else 1
