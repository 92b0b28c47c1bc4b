"""Devices compute in a precision, and by kernels, that are fast and correct there."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.profiler import profile

from mvhpc.bids_app import main
from mvhpc.config import ConfigError
from mvhpc.models.kernels.cpu_conv3d import ONEDNN, patch_conv3d
from mvhpc.runtime.cudnn import cudnn_fault
from mvhpc.runtime.devices import resolve_precision


@pytest.mark.parametrize(
    ("has", "precision"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "avx512_fp16": True}, torch.bfloat16),  # Sapphire Rapids
        ({"amx_bf16": False, "avx512_bf16": True, "avx512_fp16": True}, torch.float32),  # the same, AMX hidden
        ({"amx_bf16": False, "avx512_bf16": True, "avx512_fp16": False}, torch.bfloat16),  # Zen 4, Cooper Lake
        ({"avx512_bf16": False}, torch.float32),
        ({"architecture": "arm64"}, torch.float32),
    ],
)
def test_auto_is_what_the_cpu_does_faster(
    monkeypatch: pytest.MonkeyPatch, has: dict[str, object], precision: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert resolve_precision("auto", torch.device("cpu")) is precision
    assert resolve_precision("bfloat16", torch.device("cpu")) is torch.bfloat16


@pytest.mark.parametrize(
    ("version", "faulty"),
    [
        (None, False),
        (8902, False),  # before 9 a minor version had one digit
        (90701, False),
        (90800, True),
        (91002, True),
        (91299, True),
        (91300, False),
        (92000, False),
        (100000, False),
    ],
)
def test_cudnn_with_faulty_convolutions_is_refused_in_bfloat16_alone(
    monkeypatch: pytest.MonkeyPatch, version: int | None, faulty: bool
) -> None:
    assert (cudnn_fault(version) is not None) == faulty
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    cuda = torch.device("cuda")
    assert resolve_precision("float32", cuda) is torch.float32
    assert resolve_precision("bfloat16", torch.device("cpu")) is torch.bfloat16
    if not faulty:
        assert resolve_precision("bfloat16", cuda) is torch.bfloat16
        return
    with pytest.raises(ConfigError, match=r"cuDNN 9\.\d+\.\d+ .*pytorch#163539.*or set compute\.precision=float32"):
        resolve_precision("bfloat16", cuda)


@pytest.mark.parametrize(("kernel", "stride", "batch"), [*product((1, 2, 3), (1, 2), (1, 2)), (4, 2, 1)])
def test_one_small_sample_in_float32_is_left_to_onednn_as_well(kernel: int, stride: int, batch: int) -> None:
    """And gives, with all gradients, what PyTorch's own kernel gives."""
    torch.manual_seed(0)
    convolution = nn.Conv3d(8, 6, kernel, stride, padding=kernel // 2)
    x = torch.randn(batch, 8, 10, 12, 14, requires_grad=True)
    weight = torch.randn_like(convolution(x))
    found = []
    for mended in (False, True):
        if mended:
            patch_conv3d(convolution)
        with profile() as events:
            y = convolution(x)
            gradients = torch.autograd.grad((weight * y).sum(), [x, *convolution.parameters()])
        found.append([y, *gradients])
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)
        assert other.layout == torch.strided and other.is_contiguous()
    if kernel > 1 and ONEDNN:  # of 1 it is a plain matrix product, as fast
        assert not any("slow_conv3d" in event.key for event in events.key_averages())


@pytest.mark.parametrize(("kernel", "size"), [(3, (2, 4, 4)), (3, (4, 1, 4)), (4, (3, 3, 3)), (4, (4, 4, 4))])
def test_gradients_in_bfloat16_are_those_of_float32_but_for_rounding(kernel: int, size: tuple[int, ...]) -> None:
    """Also where an axis is shorter than the kernel, as in the last layer of a discriminator of small volumes."""
    torch.manual_seed(0)
    convolution = nn.Conv3d(16, 4, kernel, padding=1)
    patch_conv3d(convolution)
    x = torch.randn(8, 16, *size, requires_grad=True)
    weight = torch.randn_like(convolution(x))
    found = []
    for reduced in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=reduced):
            y = convolution(x)
        found.append(torch.autograd.grad((weight * y.float()).sum(), [x, *convolution.parameters()]))
    for exact, near in zip(*found, strict=True):
        assert (exact - near).norm() < 0.02 * exact.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scans", "results", "participant", "--model", "model", "--device", "cuda"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mvhpc: compute.device=cuda, but torch sees no CUDA device")
