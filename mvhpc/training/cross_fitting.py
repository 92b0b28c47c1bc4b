"""Cross-fitting: the subjects that each member of an ensemble is trained on.

Every member is trained on all subjects except its own fold, and validated on that fold. All subjects are used for
training and for validation, the latter always by a member that was not trained on them. Barber et al. 2021 base
intervals on this; nnU-Net (Isensee et al. 2021) also predicts by an ensemble of cross-validation networks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvhpc.runtime.randomness import generator


def assign_folds(groups: Sequence[str], members: int, seed: int) -> Tensor:
    """The subjects that each ensemble member is trained on.

    Args:
        groups: group of each of N subjects; subjects of one group are held out from the same member.
        members: R, at least 2.
        seed: of the draw.

    Returns:
        (N, R) bool with one False in each row: the member from which the subject is held out.
    """
    names = sorted(set(groups))
    # The name of the stream decides the draw, so it must not change.
    order = torch.randperm(len(names), generator=generator(seed, "shares")).tolist()
    held_out = {names[place]: i % members for i, place in enumerate(order)}
    return torch.tensor([held_out[group] for group in groups])[:, None] != torch.arange(members)
