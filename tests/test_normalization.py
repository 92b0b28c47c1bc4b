"""Normalisation of groups and what stands around it: MONAI's bits on CPUs, and on GPUs what float32 says, rounded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet
from torch import Tensor, nn

from mvhpc.models.kernels.channels_last import down, middle, up, use_channels_last_blocks
from mvhpc.models.kernels.normalization import GroupNorm
from mvhpc.runtime.devices import repeatable

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def unet(conditioned: bool) -> nn.Module:
    """MONAI's U-Net, with attention and weights that are not zero."""
    torch.manual_seed(0)
    conditioning = {"with_conditioning": True, "cross_attention_dim": 4} if conditioned else {}
    net = DiffusionModelUNet(
        spatial_dims=3,
        in_channels=2,
        out_channels=2,
        channels=(8, 16, 16),
        attention_levels=(False, True, True),
        num_res_blocks=1,
        num_head_channels=8,
        norm_num_groups=4,
        use_flash_attention=True,
        **conditioning,
    )
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def walked(net: nn.Module, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
    """What the U-Net makes of x, block by block."""
    h = net.conv_in(x)
    skips = [h]
    for block in net.down_blocks:
        h, passed = down(block, h, time, context)
        skips += passed
    h = middle(net.middle_block, h, time, context)
    for block in net.up_blocks:
        n = len(block.resnets)
        skips, passed = skips[:-n], skips[-n:]
        h = up(block, h, passed, time, context)
    return net.out(h)


def monais(net: nn.Module, x: Tensor, time: Tensor, context: Tensor | None) -> Tensor:
    """The same by MONAI's own forward, given the embedding of a level in place of the level."""
    net.time_embed = nn.Identity()
    get = "monai.networks.nets.diffusion_model_unet.get_timestep_embedding"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get, lambda *_: time)
        return net(x, torch.zeros(len(x)), context)


@pytest.mark.parametrize("conditioned", [True, False])
def test_adopted_networks_have_monais_weights_and_on_cpus_its_bits(conditioned: bool) -> None:
    theirs = unet(conditioned)
    ours = copy.deepcopy(theirs)
    use_channels_last_blocks(ours)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert sum(type(part) is nn.GroupNorm for part in ours.modules()) == 0
    x, time = torch.randn(2, 2, 8, 4, 4), torch.randn(2, 32)
    context = torch.randn(2, 3, 4) if conditioned else None
    for precise in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=not precise):
            assert torch.equal(walked(ours, x, time, context), monais(theirs, x, time, context))


def test_an_adopted_autoencoder_has_monais_bits_on_cpus() -> None:
    torch.manual_seed(0)
    theirs = AutoencoderKL(3, 1, 1, (1, 1), (4, 8), (False, False), 2, 2, with_encoder_nonlocal_attn=False)
    ours = copy.deepcopy(theirs)
    use_channels_last_blocks(ours)
    x, z = torch.randn(2, 1, 4, 6, 4), torch.randn(2, 2, 2, 3, 2)
    assert torch.equal(ours.encode(x)[0], theirs.encode(x)[0]) and torch.equal(ours.decode(z), theirs.decode(z))


@GPU
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shifted", [True, False])
def test_on_gpus_it_stays_in_bfloat16_and_differs_by_its_rounding(silu: bool, shifted: bool) -> None:
    """Channels far from zero, numbers of them that no block of a program divides, volumes in one part and in many."""
    torch.manual_seed(0)
    for groups, channels, size in ((4, 12, (3, 4, 5)), (32, 160, (9, 8, 7)), (2, 4, (70, 60, 50))):
        norm = GroupNorm(groups, channels, device="cuda")
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        away = torch.randn(channels, 1, 1, 1, device="cuda") * 5
        x, offset = torch.randn(2, channels, *size, device="cuda") + away, torch.randn(2, channels, device="cuda")
        x, toward = x.bfloat16(), torch.randn_like(x).bfloat16()
        computed = []
        for precise in (True, False):
            inputs = [(x.float() if precise else x).requires_grad_(), offset.clone().requires_grad_()]
            if precise:
                y = inputs[0] + inputs[1][:, :, None, None, None] if shifted else inputs[0]
                y = F.group_norm(y, groups, norm.weight, norm.bias, norm.eps)
                y = F.silu(y) if silu else y
            else:
                y = norm(inputs[0], inputs[1] if shifted else None, silu)
                assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last_3d)
            of = [*inputs[: 1 + shifted], norm.weight, norm.bias]
            computed.append([y, *torch.autograd.grad(y, of, toward.to(y.dtype))])
        for exact, near in zip(*computed, strict=True):
            torch.testing.assert_close(exact, near.float(), rtol=2**-7, atol=2**-7 * float(exact.abs().max()))


@GPU
@pytest.mark.parametrize("conditioned", [True, False])
def test_on_gpus_adopted_networks_say_what_monais_do_and_the_same_bits_twice(conditioned: bool) -> None:
    theirs = unet(conditioned).cuda()
    ours = copy.deepcopy(theirs)
    use_channels_last_blocks(ours)
    x, time = torch.randn(2, 2, 32, 24, 24, device="cuda"), torch.randn(2, 32, device="cuda")
    context = torch.randn(2, 3, 4, device="cuda") if conditioned else None
    wanted = monais(theirs, x, time, context)
    twice = []
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            output = walked(ours, x, time, context)
        with repeatable(x.device):
            loss = output.float().square().sum()
            twice.append([output, *torch.autograd.grad(loss, [*ours.parameters()], allow_unused=True)])
    assert float((wanted - twice[0][0]).abs().max()) < 0.05 * float(wanted.abs().max())
    assert all(a is b or torch.equal(a, b) for a, b in zip(*twice, strict=True))
