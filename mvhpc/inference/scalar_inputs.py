"""The inputs of a model of scalars, from the records of a packed data set."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from mvhpc.config import ConfigError
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.records import channels_of, read_pooled, scalar_values
from shards.dataset import Dataset

Inputs = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def check_channels(model: ScalarsModel, dataset: Dataset, volumes: Collection[str]) -> None:
    """Refuse data without the tissue maps that a model reads, or with others.

    Raises:
        ConfigError: naming both.
    """
    for name in volumes:
        theirs, ours = channels_of(dataset.index, name), model.channels[name]
        if theirs != ours:
            raise ConfigError(
                f"{dataset.folder} has {', '.join(theirs)} of {name}, the model was trained on {', '.join(ours)}; "
                "preprocess and pack as the data that it was trained on"
            )


def read_inputs(model: ScalarsModel, dataset: Dataset, keys: Sequence[str], given: Collection[str]) -> Inputs:
    """What is given of B records.

    Args:
        model: of scalars.
        dataset: packed volumes.
        keys: of the records.
        given: names of variables.

    Returns:
        Pooled volumes (B, C, h, w, d), zeros where not given or missing; encoded scalars (B, 1) or (B,); and by
        variable, which are given and there, (B,) bool.

    Raises:
        ConfigError: data without the model's tissue maps; a category that the model does not have, with its record.
        IntegrityError: a damaged volume, with its record.
    """
    volumes = [v for v in model.variables.volumes if v.name in given]
    check_channels(model, dataset, [v.name for v in volumes])
    values, present = model.variables.encode_scalars([scalar_values(dataset, key, model.schema, given) for key in keys])
    nobody = torch.zeros(len(keys), dtype=torch.bool)
    known = {v.name: nobody.clone() for v in model.variables.volumes}
    known |= {name: there if name in given else nobody for name, there in present.items()}
    pooled = {v.name: torch.zeros(len(keys), *v.shape) for v in model.variables.volumes}
    for v in volumes:
        arrays = model.channels[v.name]
        for i, key in enumerate(keys):
            if all(dataset.has(key, name) for name in arrays):
                known[v.name][i] = True
                pooled[v.name][i] = read_pooled(dataset, key, arrays, model.spacing).half().float()  # as in training
    return pooled, values, known
