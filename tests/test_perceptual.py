"""The perceptual distance: a distance, differentiable, and built only from files with the right hash."""

import hashlib
from pathlib import Path

import pytest
import torch

from mvhpc.models.perceptual import (
    BACKBONE_SHA256,
    HEADS_SHA256,
    TAPS,
    SqueezeLPIPS,
    load_lpips,
    slice_distance,
)
from mvhpc.models.weight_files import WeightsError
from mvhpc.runtime.randomness import generator


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str, str]:
    """Random weights in the layout of the official files, and their hashes."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    features = {f"features.{name}": value for name, value in SqueezeLPIPS().features.state_dict().items()}
    torch.save({**features, "classifier.1.weight": torch.zeros(1)}, folder / "backbone.pth")
    torch.save(
        {f"lin{n}.model.1.weight": torch.rand(1, c, 1, 1) for n, c in enumerate(TAPS.values())},
        folder / "heads.pth",
    )
    paths = folder / "backbone.pth", folder / "heads.pth"
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    return str(paths[0]), str(paths[1]), hashes[0], hashes[1]


@pytest.fixture(scope="module")
def lpips(files: tuple[str, str, str, str]) -> SqueezeLPIPS:
    return load_lpips(*files)


def distance(lpips: SqueezeLPIPS, a: torch.Tensor, b: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return slice_distance(lpips, a, b, 0.2, [generator(seed, row) for row in range(a.shape[0])])


def test_layout_is_torchvisions(files: tuple[str, str, str, str]) -> None:
    """Names and shapes of SqueezeNet 1.1 as torchvision stores them, from its published architecture."""
    state = torch.load(files[0], weights_only=True)
    assert state["features.0.weight"].shape == (64, 3, 3, 3)
    assert state["features.3.squeeze.weight"].shape == (16, 64, 1, 1)
    assert state["features.9.expand3x3.bias"].shape == (192,)
    assert state["features.12.expand1x1.weight"].shape == (256, 64, 1, 1)
    assert sum(v.numel() for k, v in state.items() if k.startswith("features.")) == 722_496


def test_zero_for_equal_symmetric_and_positive_for_different(lpips: SqueezeLPIPS) -> None:
    draws = torch.Generator().manual_seed(1)
    a, b = (torch.rand(2, 1, 20, 24, 17, generator=draws) for _ in range(2))
    assert torch.equal(distance(lpips, a, a), torch.zeros(2))
    ab = distance(lpips, a, b)
    assert (ab > 0).all()
    torch.testing.assert_close(ab, distance(lpips, b, a))
    nearer = distance(lpips, a, a + 0.1 * (b - a))
    assert (nearer < ab).all()


def test_a_samples_distance_does_not_depend_on_its_batch(lpips: SqueezeLPIPS) -> None:
    draws = torch.Generator().manual_seed(2)
    a, b = (torch.rand(3, 1, 20, 20, 20, generator=draws) for _ in range(2))
    together = distance(lpips, a, b)
    alone = slice_distance(lpips, a[1:2], b[1:2], 0.2, [generator(0, 1)])
    torch.testing.assert_close(together[1:2], alone)


def test_with_all_slices_it_is_the_mean_over_slices_summed_over_axes(lpips: SqueezeLPIPS) -> None:
    draws = torch.Generator().manual_seed(3)
    a, b = (torch.rand(1, 1, 18, 20, 22, generator=draws) for _ in range(2))
    expected = torch.zeros(())
    for axis in (2, 3, 4):
        pairs = zip(a.unbind(axis), b.unbind(axis), strict=True)
        expected = expected + torch.stack([lpips(x, y)[0] for x, y in pairs]).mean()
    found = slice_distance(lpips, a, b, 1.0, [generator(0)])
    torch.testing.assert_close(found[0], expected)


def test_gradient_is_finite_even_where_features_vanish(lpips: SqueezeLPIPS) -> None:
    a = torch.zeros(1, 1, 20, 20, 20, requires_grad=True)
    distance(lpips, a, torch.zeros_like(a)).sum().backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()
    assert not any(p.requires_grad for p in lpips.parameters())


def test_too_small_volumes_are_refused(lpips: SqueezeLPIPS) -> None:
    with pytest.raises(ValueError, match=r"too small.*loss\.perceptual=0"):
        distance(lpips, torch.rand(1, 1, 16, 32, 32), torch.rand(1, 1, 16, 32, 32))


def test_missing_weights_say_how_to_get_them_or_do_without(files: tuple[str, str, str, str]) -> None:
    for key, paths in {"loss.backbone": ("", ""), "loss.heads": (files[0], "nowhere.pth")}.items():
        with pytest.raises(WeightsError) as error:
            load_lpips(*paths, backbone_sha256=files[2])
        text = str(error.value)
        assert text.startswith(f"{key}=")
        for hint in ("download.pytorch.org", "lpips", BACKBONE_SHA256, HEADS_SHA256, "loss.perceptual=0"):
            assert hint in text


def test_a_file_with_another_hash_is_refused(files: tuple[str, str, str, str], tmp_path: Path) -> None:
    changed = tmp_path / "backbone.pth"
    data = bytearray(Path(files[0]).read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    with pytest.raises(WeightsError, match="SHA-256"):
        load_lpips(str(changed), *files[1:])
