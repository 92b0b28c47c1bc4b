"""Baselines for comparison: networks for a single query, from voxels (paper, section 4.2)."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvhpc.config import ResNetConfig, ViTConfig
from mvhpc.models.kernels.normalization import SyncedBatchNorm
from mvhpc.variables import Categorical, Scalar, Variables
from shards.schema import Schema

SMALLEST = 29  # voxels per axis that DenseNet121 needs; fewer leave nothing after five halvings
SD_FLOOR = 0.1  # of a voxel's SD, in units of the largest one
TITLES = {"densenet": "3D DenseNet121", "vit": "3D ViT", "braid": "BRAID"}  # name of a network -> in tables


def scalars_of(schema: Schema, names: Sequence[str], intervals: Mapping[str, Sequence[float]]) -> Variables:
    """Encodings of the scalars among ``names``.

    Args:
        schema: of all variables.
        names: variables of a query; volumes are ignored.
        intervals: number -> interval that is mapped to [-1, 1]; default: the schema's range.
    """
    return Variables.from_schema(Schema(tuple(v for v in schema.scalars if v.name in names)), {}, intervals)


class Baseline(nn.Module):
    """A network from volumes and scalars to one scalar.

    - ``densenet``: 3D DenseNet121 (Huang et al. 2017). Scalars are input channels.
    - ``vit``: 3D vision transformer (Dosovitskiy et al. 2021) whose linear head reads the class token. Scalars are
      input channels; volumes are standardised voxel by voxel. MONAI's default, a tanh after the head, is left out: it
      bounds numbers and logits to [-1, 1].
    - ``braid``: 3D ResNet (He et al. 2016) whose features are joined by the scalars before the last linear layer
      (Gao et al. 2025, BRAID).

    Channels are the given volumes and, for scalars at the input, each given number (constant over the volume) and each
    class of a given category (one-hot). A missing scalar is 0.

    Args:
        scalars: encodings of the query's scalars.
        given: names of the given variables; volumes are channels in this order.
        want: the scalar to predict.
        settings: of a ViT or ResNet; None: DenseNet121.
        shape: (H, W, D) of the volumes, for a ViT.
    """

    voxel_mean: Tensor | None
    voxel_sd: Tensor | None

    def __init__(
        self,
        scalars: Variables,
        given: Sequence[str],
        want: str,
        settings: ViTConfig | ResNetConfig | None = None,
        shape: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.conditioning: list[Scalar] = [v for v in scalars.scalars if v.name in given]
        volumes, width = len(given) - len(self.conditioning), sum(map(_width, self.conditioning))
        outputs = _width(next(v for v in scalars.scalars if v.name == want))
        self.register_buffer("voxel_mean", None)  # of the volumes, (V, H, W, D), where they are standardised
        self.register_buffer("voxel_sd", None)
        self.head: nn.Linear | None = None  # after the scalars are joined, where they are no channels
        if isinstance(settings, ViTConfig):
            self.network = _vit(volumes + width, outputs, settings, shape)
            self.voxel_mean, self.voxel_sd = torch.zeros(volumes, *shape), torch.ones(volumes, *shape)
        elif settings is None:
            self.network = _densenet(volumes + width, outputs)
        else:
            self.network, features = _resnet(volumes, settings)
            self.head = nn.Linear(features + width, outputs)

    @property
    def standardizes(self) -> bool:
        """Whether volumes are standardised before the network, see :meth:`standardize`."""
        return self.voxel_mean is not None

    def standardize(self, voxels: Tensor) -> None:
        """Take the mean and the SD of each voxel over some volumes (N, V, H, W, D), N of at least 2.

        People differ in a tenth of the intensities: without this, a ViT on a few hundred of them sees the mean brain
        only and predicts the mean.
        """
        sd, self.voxel_mean = torch.std_mean(voxels.float(), 0)
        self.voxel_sd = sd.clamp(min=SD_FLOOR * float(sd.max()))  # no noise where nobody differs

    def forward(self, voxels: Tensor, values: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """Predict the wanted scalar.

        Args:
            voxels: the given volumes, (B, V, H, W, D) in [0, 1].
            values: encoded scalars by name, (B, 1) for a number, (B,) for a category; other variables are ignored.
            present: by name, which rows have a value, (B,) bool.

        Returns:
            (B, 1), an encoded number, or (B, K), logits of the classes.
        """
        found = self.network(self.channels(voxels, values, present))
        x: Tensor = found[0] if isinstance(found, tuple) else found  # MONAI's ViT returns its hidden states too
        if self.head is None:
            return x
        prediction: Tensor = self.head(torch.cat([x, *self._scalars(values, present)], 1))
        return prediction

    def channels(self, voxels: Tensor, values: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """The inputs of :meth:`forward` as input channels of the network, (B, C, H, W, D)."""
        if self.head is not None:
            return voxels
        if self.voxel_mean is not None and self.voxel_sd is not None:
            voxels = (voxels - self.voxel_mean) / self.voxel_sd
        rows = self._scalars(values, present)
        return torch.cat([voxels, *(x[:, :, None, None, None].expand(-1, -1, *voxels.shape[2:]) for x in rows)], 1)

    def _scalars(self, values: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> list[Tensor]:
        """Of each given scalar, its value (B, 1) or indicators (B, K)."""
        rows = []
        for v in self.conditioning:
            x = values[v.name]
            if isinstance(v, Categorical):
                x = F.one_hot(x, v.size).float()
            rows.append(x * present[v.name][:, None])
        return rows


def _width(variable: Scalar) -> int:
    return variable.size if isinstance(variable, Categorical) else 1


def _densenet(channels: int, outputs: int) -> nn.Module:
    from monai.networks.nets import DenseNet121  # MONAI takes seconds to import

    return DenseNet121(3, channels, outputs, norm=_synced_batch_norm())


def _vit(channels: int, outputs: int, settings: ViTConfig, shape: Sequence[int]) -> nn.Module:
    from monai.networks.nets import ViT

    return ViT(
        channels,
        list(shape),
        settings.patch,
        settings.hidden,
        settings.mlp,
        settings.layers,
        settings.heads,
        classification=True,
        num_classes=outputs,
        dropout_rate=settings.dropout,
        post_activation="none",
        qkv_bias=True,
    )


def _resnet(channels: int, settings: ResNetConfig) -> tuple[nn.Module, int]:
    """A ResNet without its last layer, and how many features it has."""
    from monai.networks.nets import resnet

    build = getattr(resnet, f"resnet{settings.depth}")
    network = build(
        n_input_channels=channels,
        conv1_t_stride=2,
        widen_factor=settings.width,
        feed_forward=False,
        bias_downsample=False,
        shortcut_type="B",
        norm=_synced_batch_norm(),
    )
    return network, int(network.in_planes)


def _synced_batch_norm() -> str:
    """MONAI's name for batch normalisation over all workers."""
    from monai.networks.layers.factories import Norm

    if "SYNCED_BATCH" not in Norm.names:
        Norm.add_factory_class("synced_batch", SyncedBatchNorm)
    return "synced_batch"
