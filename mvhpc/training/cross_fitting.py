"""Cross-fitting: which people each member of an ensemble is trained on, and which one each person is held out from.

Every member is trained on all people but a share of its own, and validated on that share. So everybody is used for
training and everybody for validation, always by a member that was not trained on them (Barber et al. 2021, whose
intervals rest on the same; nnU-Net, Isensee et al. 2021, also predicts by the networks of a cross-validation together).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvhpc.runtime.randomness import generator


def assign_folds(groups: Sequence[str], members: int, seed: int) -> Tensor:
    """Who is in the training fold of which ensemble member.

    Args:
        groups: of each of N people; those of one group are held out from the same member.
        members: R, at least 2.
        seed: of the draw.

    Returns:
        (N, R) bool, in each row one False, at the member from which the person is held out.
    """
    names = sorted(set(groups))
    order = torch.randperm(len(names), generator=generator(seed, "shares")).tolist()
    held_out = {names[place]: i % members for i, place in enumerate(order)}
    return torch.tensor([held_out[group] for group in groups])[:, None] != torch.arange(members)
