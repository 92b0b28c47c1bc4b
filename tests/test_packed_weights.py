"""What is frozen says the same."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mvhpc.models.denoiser import JointDenoiser
from mvhpc.models.kernels.cpu_conv3d import ONEDNN
from mvhpc.models.kernels.packed_weights import PackedConv, freeze, pack
from tests.test_denoiser import DESIGNS, inputs, model, variables


@DESIGNS
@pytest.mark.parametrize("packed", [False, True], ids=["frozen", "packed"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_network_gives_the_same_answers_to_the_bit(design: str, precision: torch.dtype, packed: bool) -> None:
    v = variables((3, 4, 2), channels=(2, 1))
    network = model(v, design, blind=1000).eval()
    frozen = copy.deepcopy(network)
    freeze(frozen, precision, JointDenoiser.TELLING)
    if packed:
        pack(frozen)
        if precision is torch.bfloat16 and ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            kinds = {type(part) for part in frozen.modules()}
            assert PackedConv in kinds and nn.Conv3d not in kinds
    z, t = inputs(v, 4)
    for want in (None, ["age"]):
        with torch.inference_mode(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            said, again = network(z, t, want), frozen(z, t, want)
        assert said.keys() == again.keys()
        for name, value in said.items():
            assert torch.equal(value, again[name]), name
    if design == "late":  # as a posterior does it: read under autocast, ask without
        with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            seen, again = network.encode(z, t), frozen.encode(z, t)
        assert torch.equal(network.predict(seen, z, t, ["age"])["age"], frozen.predict(again, z, t, ["age"])["age"])


def test_products_are_counted_of_packed_convolutions_too() -> None:
    v = variables((3, 4, 2))
    frozen, counts = model(v, blind=1000).eval(), []
    freeze(frozen, torch.bfloat16, JointDenoiser.TELLING)
    for prepare in (lambda network: None, pack):
        prepare(frozen)
        with FlopCounterMode(display=False) as counter, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            frozen(*inputs(v, 4))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
