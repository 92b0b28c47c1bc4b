"""Random draws that are functions of their purpose.

Noise for a sample is drawn from (seed, step, sample). It does not depend on the number of workers, on the batch of the
sample, or on interruptions of the run.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mvhpc.runtime.devices import send


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by the SHA-256 of ``parts`` (seed, step, key, ...), equal on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def randn(
    generators: Sequence[torch.Generator],
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal draws (B, *shape), row b from ``generators[b]``."""
    rows = [torch.randn(tuple(shape), generator=g) for g in generators]
    return send(torch.stack(rows).to(dtype), device)  # (B, *shape)


def rand(
    generators: Sequence[torch.Generator], shape: Sequence[int] = (), device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform draws in [0, 1) of shape (B, *shape), row b from ``generators[b]``."""
    return send(torch.stack([torch.rand(tuple(shape), generator=g) for g in generators]), device)
