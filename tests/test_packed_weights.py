"""What is frozen says the same."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mvhpc.models.kernels.cpu_conv3d import ONEDNN, patch_conv3d
from mvhpc.models.kernels.packed_weights import PackedConv, freeze, pack
from tests.test_denoiser import DESIGNS, inputs, model, variables


@DESIGNS
@pytest.mark.parametrize("packed", [False, True], ids=["frozen", "packed"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_network_gives_the_same_answers_to_the_bit(design: str, precision: torch.dtype, packed: bool) -> None:
    v = variables((3, 4, 2), channels=(2, 1))
    network = model(v, design, masked_level=1000)
    frozen = copy.deepcopy(network)
    freeze(frozen, precision)
    if packed:
        pack(frozen)
        if precision is torch.bfloat16 and ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            kinds = {type(layer) for layer in frozen.modules()}
            assert PackedConv in kinds and nn.Conv3d not in kinds
    z, t = inputs(v, 4)
    for want in (None, ["age"] if design == "early" else ["v0"]):
        with torch.inference_mode(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            outputs, again = network(z, t, want), frozen(z, t, want)
        assert outputs.keys() == again.keys()
        for name, value in outputs.items():
            assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1, 4), (3, 4, 5)], ids=str)
def test_a_patched_network_that_is_frozen_takes_volumes_of_any_shape(shape: tuple[int, int, int]) -> None:
    """Shapes whose gradients need float32 on CPUs need nothing where there are no gradients."""
    network = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1)).eval()
    x = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = network(x)
        patch_conv3d(network)
        freeze(network, torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = network(x).float()
    assert (rounded - exact).abs().max() < 0.02 * exact.abs().max()


def test_products_are_counted_of_packed_convolutions_too() -> None:
    v = variables((3, 4, 2))
    frozen, counts = model(v, masked_level=1000), []
    freeze(frozen, torch.bfloat16)
    for prepare in (lambda network: None, pack):
        prepare(frozen)
        with FlopCounterMode(display=False) as counter, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            frozen(*inputs(v, 4))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
