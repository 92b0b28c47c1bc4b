"""Normalisation of groups: what a GPU computes in bfloat16 is what float32 says, rounded."""

import pytest
import torch
from torch import nn

from mvhpc.models.norm import NarrowGroupNorm, narrow_group_norms


def networks() -> tuple[nn.Sequential, nn.Sequential]:
    """One as libraries build it, and one narrowed."""
    wide, narrow = (nn.Sequential(nn.Conv3d(1, 8, 1), nn.GroupNorm(2, 8)) for _ in range(2))
    torch.manual_seed(0)
    for parameter in wide.parameters():
        nn.init.normal_(parameter)
    narrow_group_norms(narrow)
    narrow.load_state_dict(wide.state_dict())
    return wide, narrow


def test_a_narrowed_network_has_the_same_weights_and_on_cpus_the_same_bits() -> None:
    wide, narrow = networks()
    x = torch.randn(2, 1, 3, 4, 5)
    assert isinstance(narrow[1], NarrowGroupNorm)
    for precise in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            assert torch.equal(wide(x), narrow(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_gpus_it_stays_in_bfloat16_and_differs_by_its_rounding() -> None:
    wide, narrow = (network.cuda() for network in networks())
    x = torch.randn(2, 1, 9, 8, 7, device="cuda")
    said, gradients = [], []
    for network in (wide, narrow):
        with torch.autocast("cuda", torch.bfloat16):
            said.append(network(x))
        said[-1].float().square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert said[0].dtype == torch.float32 and said[1].dtype == torch.bfloat16
    torch.testing.assert_close(said[0], said[1].float(), rtol=2**-6, atol=2**-6)
    for a, b in zip(gradients[0][2:], gradients[1][2:], strict=True):  # of the norm
        torch.testing.assert_close(a, b, rtol=2**-5, atol=0.05 * float(a.abs().max()))
