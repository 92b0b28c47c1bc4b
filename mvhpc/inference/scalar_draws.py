"""Draws of a person's scalars by the model of scalars, before a joint model draws volumes given them."""

from collections.abc import Mapping, Sequence

import torch
from numpy.typing import NDArray

from mvhpc.inference.law_cells import decode_draws
from mvhpc.models.bundle import JointModel
from mvhpc.models.scalar_bundle import ScalarsModel
from mvhpc.models.scalar_stack import StackPosterior
from mvhpc.models.training_people import TrainingPeople
from mvhpc.records import cube, pool
from mvhpc.runtime.devices import one_thread
from mvhpc.runtime.randomness import rand
from mvhpc.variables import Value


def reads(model: JointModel, volume: str) -> bool:
    """Whether scalars can be drawn given voxels of ``volume``: not without a model of scalars, nor by one that reads
    tissue maps, which a drawn volume does not have."""
    return model.scalars is not None and model.scalars.channels.get(volume) == [volume]


@torch.inference_mode()
@one_thread()  # a row does not depend on the number of threads
def draw_scalars(
    model: ScalarsModel,
    given: Mapping[str, Value],
    generators: Sequence[torch.Generator],
    voxels: Mapping[str, NDArray] | None = None,
) -> list[dict[str, Value]]:
    """The scalars of B people with the same given ones; the others are drawn by the chain rule.

    Numbers are drawn within the range that the training's people had: a law has tails where nobody was.

    Args:
        model: of scalars.
        given: known scalars, in their units.
        generators: B of them, each advanced by one draw.
        voxels: by volume that the model reads as it is (see :func:`reads`), (B, H, W, D) in [0, 1] on its grid.

    Returns:
        Scalars of each person by name.
    """
    people = len(generators)
    want = [v.name for v in model.variables.scalars if v.name not in given]
    values, known = model.variables.encode_scalars([given] * people)
    pooled = {v.name: torch.zeros(people, *v.shape) for v in model.variables.volumes}
    n = cube(model.grid, model.spacing)
    for v in model.variables.volumes:
        x = (voxels or {}).get(v.name)
        known[v.name] = torch.full((people,), x is not None)
        if x is not None:
            pooled[v.name] = pool(torch.from_numpy(x)[:, None].float(), n)
    uniform = rand(generators, (1, len(want))).double().clamp(1e-7, 1 - 1e-7)
    ranges = TrainingPeople.read(model.meta).ranges
    limits = {v.name: v.encode(ranges[v.name])[:, 0] for v in model.variables.scalars if v.name in ranges}
    drawn = StackPosterior(model.stack, pooled, values, known).draw(want, uniform, limits) if want else {}
    columns = {name: decode_draws(model.variables[name], x, people) for name, x in drawn.items()}
    return [{**given, **{name: x[i][0] for name, x in columns.items()}} for i in range(people)]
