"""The autoencoder: its factor, its determinism, and the closed form of its KL term."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from mvhpc import config
from mvhpc.models.autoencoder import Autoencoder
from mvhpc.models.autoencoder import kl_divergence as kl


def tiny(levels: int = 4, latent: int = 3) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(
        config.AutoencoderConfig(
            channels=[8] * levels, latent_channels=latent, res_blocks=1, norm_groups=4, checkpointing=False
        )
    ).eval()


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_latent_is_smaller_by_the_factor_on_every_axis(levels: int) -> None:
    network = tiny(levels)
    x = torch.rand(2, 1, 8, 16, 24)
    mean, sigma = network.encode(x)
    f = network.factor
    assert f == 2 ** (levels - 1)
    assert mean.shape == sigma.shape == (2, 3, 8 // f, 16 // f, 24 // f)
    assert mean.shape[1:] == network.latent_shape(x.shape[2:])
    assert network.decode(mean).shape == x.shape
    assert (sigma > 0).all()


def test_a_shape_that_does_not_divide_is_refused_with_the_next_multiples() -> None:
    with pytest.raises(ValueError, match=r"\(30, 32, 41\).*\(32, 32, 48\)"):
        tiny().encode(torch.rand(1, 1, 30, 32, 41))


def test_widths_must_divide_by_the_groups() -> None:
    with pytest.raises(ValueError, match="norm_groups"):
        Autoencoder(config.AutoencoderConfig([8, 12], 3, 1, 8, False))


def test_encoding_and_decoding_are_deterministic_and_independent_of_the_batch() -> None:
    network = tiny()
    x = torch.rand(3, 1, 16, 16, 16)
    mean, _ = network.encode(x)
    assert torch.equal(mean, network.encode(x)[0])
    torch.testing.assert_close(mean[1:2], network.encode(x[1:2])[0], rtol=1e-5, atol=1e-6)


def test_zero_noise_reconstructs_from_the_mean_and_noise_moves_it_by_sigma() -> None:
    network = tiny()
    x = torch.rand(1, 1, 16, 16, 16)
    noise = torch.randn(1, 3, 2, 2, 2)
    reconstruction, mean, sigma = network(x, torch.zeros_like(noise))
    assert torch.equal(reconstruction, network.decode(mean))
    assert torch.equal(network(x, noise)[0], network.decode(mean + sigma * noise))


def test_kl_equals_the_closed_form_of_torch_distributions() -> None:
    draws = torch.Generator().manual_seed(1)
    mean = torch.randn(4, 3, 2, 2, 2, generator=draws)
    sigma = torch.rand(4, 3, 2, 2, 2, generator=draws) * 3 + 0.01
    expected = kl_divergence(Normal(mean, sigma), Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(kl(mean, sigma), expected)
    assert torch.equal(kl(torch.zeros(2, 1, 1, 1, 1), torch.ones(2, 1, 1, 1, 1)), torch.zeros(2))


def test_checkpointing_changes_no_gradient() -> None:
    x, noise = torch.rand(1, 1, 16, 16, 16), torch.randn(1, 3, 2, 2, 2)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = Autoencoder(config.AutoencoderConfig([8] * 4, 3, 1, 4, checkpointing))
        network(x, noise)[0].sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, saved)


def shortcut(channels: int, volumes: Tensor) -> Autoencoder:
    """Of 2 x 2 x 2 blocks, fitted to volumes (B, 1, H, W, D)."""
    network = Autoencoder(config.AutoencoderConfig([8, 8], channels, 1, 4, False, shortcut=True)).eval()
    network.fit_shortcut(volumes[:, 0])
    return network


@torch.no_grad()
def squared_error(network: Autoencoder, volumes: Tensor) -> float:
    return float((network.decode(network.encode(volumes)[0]) - volumes).square().mean())


def test_a_shortcut_starts_as_the_principal_components_of_blocks() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(8, 8) * torch.tensor([3.0, 2, 1, 0.5, 0.3, 0.2, 0.1, 0.05])
    blocks = torch.randn(32, 8 * 8 * 8, 8) @ mixing.T  # independent of each other
    volumes = blocks.view(32, 8, 8, 8, 2, 2, 2).permute(0, 1, 4, 2, 5, 3, 6).reshape(32, 1, 16, 16, 16)
    network = shortcut(3, volumes)
    rows = blocks.flatten(0, 1).double()
    squares = torch.linalg.eigvalsh(rows.T @ rows / len(rows)).flip(0)
    left = float(squares[3:].sum() / 8)  # what the components leave out; of neighbours nothing can be learnt
    assert 0.98 * left < squared_error(network, volumes) < left
    with torch.no_grad():
        mean = network.encode(volumes)[0].square().mean((0, 2, 3, 4))
    torch.testing.assert_close(mean, torch.ones(3), rtol=1e-4, atol=0)
    assert torch.equal(network.down.weight, shortcut(3, volumes).down.weight)
    assert squared_error(shortcut(8, volumes), volumes) < 1e-6  # with all components nothing is lost
    assert squared_error(shortcut(11, volumes), volumes) < 1e-6  # nor with more channels than a block has voxels


def test_a_shortcut_reads_details_of_a_block_from_its_neighbours() -> None:
    torch.manual_seed(0)
    smooth = F.avg_pool3d(torch.randn(32, 1, 20, 20, 20), 5, 1)  # (32, 1, 16, 16, 16)
    x = smooth.reshape(32, 8, 2, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 8).double()
    alone = float(torch.linalg.eigvalsh(x.T @ x / len(x))[:6].sum() / 8)  # of two components, without neighbours
    assert squared_error(shortcut(2, smooth), smooth) < 0.8 * alone
