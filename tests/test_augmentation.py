"""Random changes of volumes belong to the sample, and do what they are named for."""

import torch
from torch import Tensor

from mvhpc.runtime.randomness import generator
from mvhpc.training.augmentation import AugmentationConfig, augment

NONE = AugmentationConfig(rotation=0, scale=0, shift=0, flip=0, intensity=0, noise=0)


def volumes(n: int = 3) -> Tensor:
    """(n, 2, 12, 14, 10), smooth and different along each axis."""
    axes = torch.meshgrid(*[torch.linspace(0, 1, s) for s in (12, 14, 10)], indexing="ij")
    x = torch.stack([axes[0] * axes[1], axes[2].square() + 0.1 * axes[0]])
    return x[None] * torch.linspace(0.5, 0.9, n)[:, None, None, None, None]


def draws(n: int = 3, seed: int = 0) -> list[torch.Generator]:
    return [generator(seed, i) for i in range(n)]


def change(**settings: float) -> AugmentationConfig:
    return AugmentationConfig(**{**vars(NONE), **settings})


def test_without_settings_nothing_changes() -> None:
    assert torch.allclose(augment(volumes(), NONE, draws()), volumes(), atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    config = AugmentationConfig(rotation=5, scale=0.05, shift=1, flip=0.5, intensity=0.1, noise=0.02)
    together = augment(volumes(), config, draws())
    for i in range(3):
        alone = augment(volumes()[i : i + 1], config, draws()[i : i + 1])
        assert torch.allclose(alone[0], together[i], atol=1e-6)
    assert not torch.allclose(augment(volumes(), config, draws(seed=1)), together, atol=1e-3)


def test_a_flip_mirrors_left_and_right() -> None:
    assert torch.allclose(augment(volumes(), change(flip=1.0), draws()), volumes().flip(2), atol=1e-5)


def test_a_shift_moves_by_voxels_along_each_axis() -> None:
    x = torch.zeros(1, 1, 9, 11, 13)
    x[0, 0, 4, 5, 6] = 1
    found = augment(x, change(shift=1.0), draws(1))
    expected = -torch.randn(11, generator=generator(0, 0))[6:9]
    grid = torch.meshgrid(*[torch.arange(s).float() for s in (9, 11, 13)], indexing="ij")
    centre = torch.stack([(g * found[0, 0]).sum() / found.sum() for g in grid]) - torch.tensor([4.0, 5, 6])
    assert torch.allclose(centre, expected, atol=0.02)


def test_rotation_keeps_a_ball_and_turns_the_rest() -> None:
    """Turns are of voxels, whatever the shape of the box."""
    axes = torch.meshgrid(*[torch.arange(s) - (s - 1) / 2 for s in (24, 30, 20)], indexing="ij")
    ball = torch.exp(-0.5 * sum(a.square() for a in axes) / 9)[None, None]
    rod = torch.exp(-0.5 * (axes[0].square() / 25 + axes[1].square() / 2 + axes[2].square() / 2))[None, None]
    config = change(rotation=30.0)
    assert torch.allclose(augment(ball, config, draws(1)), ball, atol=0.04)  # interpolated
    assert (augment(rod, config, draws(1)) - rod).abs().max() > 0.2


def test_intensity_changes_channels_and_keeps_zero() -> None:
    found = augment(volumes(), change(intensity=0.2), draws())
    assert found[volumes() == 0].abs().max() < 1e-3
    ratio = found.amax((2, 3, 4)) / volumes().amax((2, 3, 4))
    assert (ratio - 1).abs().max() > 0.05 and not torch.allclose(ratio[:, 0], ratio[:, 1])
