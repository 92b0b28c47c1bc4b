"""Versions of cuDNN that must not be used."""

FIRST_FAULTY, FIRST_MENDED = 90800, 91300


def cudnn_fault(version: int | None) -> str | None:
    """Why a version of cuDNN must not compute in bfloat16; None where it may.

    Its 3D convolutions in bfloat16 are silently wrong or forty times slower from 9.8 to 9.12 (PyTorch issues 163539,
    170138 and 166122).

    Args:
        version: as ``torch.backends.cudnn.version()`` returns it: 91002 is 9.10.2; None where there is no cuDNN.
    """
    if version is None or not FIRST_FAULTY <= version < FIRST_MENDED:
        return None
    major, minor, patch = version // 10000, version // 100 % 100, version % 100
    return (
        f"cuDNN {major}.{minor}.{patch} computes bfloat16 3D convolutions wrongly or forty times slower "
        "(pytorch#163539, #170138, #166122); install torch 2.10 or later, which brings cuDNN 9.13 or later"
    )
