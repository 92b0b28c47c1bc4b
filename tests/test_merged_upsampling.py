"""Doubling and convolving at once."""

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import AutoencoderKL
from torch import Tensor, nn

from mvhpc.models.kernels.cpu_conv3d import patch_conv3d
from mvhpc.models.kernels.merged_upsampling import UpsampleConv, convolve_octants, merge_upsampling


def networks() -> tuple[nn.Module, nn.Module]:
    """One as MONAI builds it, and one with its upsampling merged; drawn from one seed."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return AutoencoderKL(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            channels=(4, 8, 8),
            num_res_blocks=(1, 1, 1),
            attention_levels=(False, False, False),
            latent_channels=2,
            norm_num_groups=2,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
        ).double()

    plain, merged = build(), build()
    merge_upsampling(merged)
    return plain, merged


def results(network: nn.Module, z: Tensor) -> list[Tensor]:
    """What it decodes, and the gradients of that with respect to everything it has come through."""
    z = z.clone().requires_grad_()
    decoded = network.decode(z)
    decoded.square().sum().backward()
    return [decoded, z.grad, *(p.grad for p in network.decoder.parameters())]


def test_a_merged_network_has_the_same_results_and_gradients() -> None:
    plain, merged = networks()
    assert [*plain.state_dict()] == [*merged.state_dict()]
    assert sum(isinstance(part, UpsampleConv) for part in merged.modules()) == 2
    for size in ((1, 1, 1), (2, 3, 4), (5, 2, 1)):
        z = torch.randn(2, 2, *size, dtype=torch.float64)
        for a, b in zip(results(plain, z), results(merged, z), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_in_bfloat16_it_differs_by_its_rounding() -> None:
    """Thin volumes too, whose weight gradients oneDNN gets wrong."""
    torch.manual_seed(0)
    for channels in (3, 16, 64):
        for size in ((1, 1, 1), (2, 2, 2), (3, 4, 3), (2, 5, 6), (4, 6, 5), (6, 3, 2), (3, 1, 2)):
            x, gradient = torch.randn(4, channels, *size), torch.randn(4, channels, *(2 * n for n in size))
            convolution = UpsampleConv(channels, channels)
            patch_conv3d(convolution)
            computed = []
            for rounded in (False, True):
                convolution.zero_grad()
                y = x.clone().requires_grad_()
                with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
                    out = convolution(y)
                out.backward(gradient.to(out.dtype))
                computed.append([out.float(), y.grad, convolution.weight.grad.clone()])
            for exact, near in zip(*computed, strict=True):
                assert float((exact - near).detach().abs().max()) < 0.03 * float(exact.abs().max()), (channels, size)


def test_eight_voxels_at_once_are_the_same() -> None:
    """The way it is computed on GPUs."""
    torch.manual_seed(0)
    convolution = UpsampleConv(3, 5).double()
    for size in ((3, 4, 5), (1, 1, 1), (2, 1, 3)):
        x, toward = torch.randn(2, 3, *size).double().requires_grad_(), torch.randn(2, 5, *(2 * n for n in size))
        of = [x, convolution.weight, convolution.bias]
        for bias in (convolution.bias, None):
            usual = F.conv_transpose3d(x, convolution.kernel, bias, stride=2, padding=1)
            ours = convolve_octants(x, convolution.kernel, bias)
            computed = [[y, *torch.autograd.grad(y, of[: 3 if bias is not None else 2], toward)] for y in (usual, ours)]
            for a, b in zip(*computed, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_gpus_it_is_what_it_is_on_cpus() -> None:
    torch.manual_seed(0)
    convolution = UpsampleConv(16, 8).double()
    x, toward = torch.randn(2, 16, 3, 4, 5).double(), torch.randn(2, 8, 6, 8, 10).double()
    computed = []
    for device in ("cpu", "cuda"):
        y = x.to(device).requires_grad_()
        out = convolution.to(device)(y)
        of = [y, convolution.weight, convolution.bias]
        computed.append([t.cpu() for t in (out, *torch.autograd.grad(out, of, toward.to(device)))])
    for a, b in zip(*computed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
