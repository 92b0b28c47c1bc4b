"""Cross-fitting: who teaches which of several readers, and who judges it.

Every reader learns from all people but a share of its own, and is judged by that share. So everybody is learnt from and
everybody judges, and the answers to the judges are those to strangers (Barber et al. 2021, whose intervals rest on the
same; nnU-Net, Isensee et al. 2021, asks the networks of a cross-validation together, as is done here).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mvhpc.runtime.randomness import generator


def shares(groups: Sequence[str], readers: int, seed: int) -> Tensor:
    """Who teaches which reader.

    Args:
        groups: of each of N people; those of one group judge the same reader.
        readers: R, at least 2.
        seed: of the draw.

    Returns:
        (N, R) bool, in each row one False, at the reader whom the person judges.
    """
    names = sorted(set(groups))
    order = torch.randperm(len(names), generator=generator(seed, "shares")).tolist()
    judged = {names[place]: i % readers for i, place in enumerate(order)}
    return torch.tensor([judged[group] for group in groups])[:, None] != torch.arange(readers)
