"""bfloat16 is taken where it is fast."""

import pytest
import torch

from mvhpc.devices import resolve_precision


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
