"""Baseline for comparison: a network for a single query, from voxels (paper, section 4.2)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvhpc.models.kernels.normalization import SyncedBatchNorm
from mvhpc.variables import Categorical, Scalar, Variables
from shards.schema import Schema

SMALLEST = 29  # voxels per axis; fewer leave nothing after five halvings


def scalars_of(schema: Schema, names: Sequence[str], intervals: Mapping[str, Sequence[float]]) -> Variables:
    """Encodings of the scalars among ``names``.

    Args:
        schema: of all variables.
        names: variables of a query; volumes are ignored.
        intervals: number -> interval that is mapped to [-1, 1]; default: the schema's range.
    """
    return Variables.from_schema(Schema(tuple(v for v in schema.scalars if v.name in names)), {}, intervals)


class Baseline(nn.Module):
    """3D DenseNet121 (Huang et al. 2017) from volumes and scalars, joined at the input, to one scalar.

    Input channels are the given volumes, each given number (constant over the volume) and each class of a given
    category (one-hot). A missing scalar is 0 in all its channels.

    Args:
        scalars: encodings of the query's scalars.
        given: names of the given variables; volumes are channels in this order.
        want: the scalar to predict.
    """

    def __init__(self, scalars: Variables, given: Sequence[str], want: str) -> None:
        from monai.networks.layers.factories import Norm  # MONAI takes seconds to import
        from monai.networks.nets import DenseNet121

        if "SYNCED_BATCH" not in Norm.names:
            Norm.add_factory_class("synced_batch", SyncedBatchNorm)
        super().__init__()
        self.conditioning: list[Scalar] = [v for v in scalars.scalars if v.name in given]
        channels = len(given) - len(self.conditioning) + sum(map(_width, self.conditioning))
        wanted = next(v for v in scalars.scalars if v.name == want)
        self.network = DenseNet121(3, channels, _width(wanted), norm="synced_batch")

    def forward(self, voxels: Tensor, values: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Predict the wanted scalar.

        Args:
            voxels: the given volumes, (B, V, H, W, D) in [0, 1], at least :data:`SMALLEST` voxels per axis.
            values: encoded scalars by name, (B, 1) for a number, (B,) for a category; other variables are ignored.
            present: by name, which rows have a value, (B,) bool.

        Returns:
            (B, 1), an encoded number, or (B, K), logits of the classes.
        """
        prediction: Tensor = self.network(self.channels(voxels, values, present))
        return prediction

    def channels(self, voxels: Tensor, values: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """The inputs of :meth:`forward` as input channels of the network, (B, C, H, W, D)."""
        channels = [voxels]
        for v in self.conditioning:
            x = values[v.name]
            if isinstance(v, Categorical):
                x = F.one_hot(x, v.size).float()
            x = x * present[v.name][:, None]  # (B, 1 or K)
            channels.append(x[:, :, None, None, None].expand(-1, -1, *voxels.shape[2:]))
        return torch.cat(channels, 1)


def _width(variable: Scalar) -> int:
    return variable.size if isinstance(variable, Categorical) else 1
