"""Bytes, time and error of number formats and compressors, on canonical volumes of real scans."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numcodecs
import numpy as np
import torch
from numpy.typing import NDArray

from shards.preprocess.recipe import read_derivative
from shards.volumes import _place, _rescale, read, sample

SHAPES = {1.0: (160, 192, 160), 2.0: (80, 96, 80)}  # of the presets, by spacing
DTYPES = {"float16": 0, "uint8": 255, "uint16": 65535}  # -> the number that stands for 1; 0 for floats
BLOSC = {"shuffle": numcodecs.Blosc.SHUFFLE, "bitshuffle": numcodecs.Blosc.BITSHUFFLE}
CODECS: dict[str, Any] = {
    "none": None,
    "lz4": numcodecs.LZ4(),
    "zstd 1": numcodecs.Zstd(level=1),
    "zstd 3": numcodecs.Zstd(level=3),
    **{
        f"{how} + {name}": numcodecs.Blosc(name.split()[0], clevel=1, shuffle=mode)
        for how, mode in BLOSC.items()
        for name in ("zstd 1", "lz4")
    },
}
Array = NDArray[Any]


def scans(folder: Path) -> list[Path]:
    """The preprocessed T1w volumes of a derivative, or the T1w scans of a BIDS folder."""
    found = sorted(folder.glob("sub-*/**/anat/*_desc-preproc_T1w.nii.gz"))
    return found or sorted(folder.glob("sub-*/**/anat/*_T1w.nii.gz"))


def volume(path: Path, spacing: float, folder: Path) -> NDArray[np.float32]:
    """A scan's canonical volume before it is rounded to a number format: float32 in [0, 1]."""
    derivative, shape = read_derivative(folder), SHAPES[spacing]
    scan = read(path)
    signal = _rescale(scan.voxels)
    step, centre = _place(scan, signal, spacing, derivative[1] if derivative else None)
    return np.clip(sample(signal, step, centre - step @ [n // 2 for n in shape], shape), 0, 1)


def store(x: NDArray[np.float32], dtype: str) -> Array:
    """float32 in [0, 1] -> stored numbers."""
    one = DTYPES[dtype]
    return np.rint(x * np.float32(one)).astype(dtype) if one else x.astype(dtype)


def to_float(stored: Array) -> NDArray[np.float32]:
    """Stored numbers -> float32 in [0, 1]."""
    one = DTYPES[stored.dtype.name]
    if one:
        return stored * np.float32(1 / one)
    return torch.from_numpy(stored).float().numpy()  # NumPy's conversion takes ten times as long


def cpu_ms(function: Callable[[], Any]) -> tuple[float, Any]:
    """Process time of a call, and its result."""
    start = time.process_time()
    result = function()
    return 1000 * (time.process_time() - start), result


def measure(volumes: Iterator[NDArray[np.float32]]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of bytes and times by dtype and codec, and rows of errors by dtype; medians over volumes."""
    torch.set_num_threads(1)
    numcodecs.blosc.use_threads = False
    cells: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    errors: dict[str, list[tuple[float, ...]]] = {}
    for x in volumes:
        for dtype in DTYPES:
            convert, stored = cpu_ms(lambda: store(x, dtype))
            error = np.abs(to_float(stored).astype(np.float64) - x)
            brain = x > 0
            psnr = [-10 * np.log10(np.square(e).mean()) for e in (error, error[brain])]
            zeroed, lit = (stored[brain] == 0).mean(), (stored[~brain] != 0).sum()
            errors.setdefault(dtype, []).append((error.max(), error[brain].mean(), *psnr, zeroed, lit))
            for name, codec in CODECS.items():
                encode, packed = cpu_ms(lambda: stored.tobytes() if codec is None else codec.encode(stored))
                target = np.empty_like(stored)
                decode, _ = cpu_ms(lambda: _decode(codec, packed, target))
                assert np.array_equal(target, stored)
                read, _ = cpu_ms(lambda: to_float(target))
                cells.setdefault((dtype, name), []).append((len(packed), convert + encode, decode, decode + read))
    rows = []
    for (dtype, name), found in cells.items():
        size, *times = (median(column) for column in zip(*found))
        rows.append([dtype, name, f"{size / 1e6:.2f}", *(f"{ms:.2f}" for ms in times)])
    lines = []
    for dtype, found in errors.items():
        worst, mean, psnr, inside, zeroed, lit = zip(*found)
        lines.append(
            [dtype, f"{max(worst):.1e}", f"{median(mean):.1e}", f"{median(psnr):.1f}", f"{median(inside):.1f}"]
            + [f"{max(zeroed):.1e}", f"{max(lit)}"]
        )
    return rows, lines


def _decode(codec: Any, packed: bytes, target: Array) -> None:
    if codec is None:
        target[...] = np.frombuffer(packed, target.dtype).reshape(target.shape)
    else:
        codec.decode(packed, target)


def tables(folders: Sequence[Path], spacing: float, count: int) -> str:
    """The tables of ``count`` scans of each folder, as Markdown."""
    chosen = [(folder, found[:: max(1, len(found) // count)][:count]) for folder in folders if (found := scans(folder))]
    volumes = (volume(path, spacing, folder) for folder, paths in chosen for path in paths)
    rows, lines = measure(volumes)
    number = sum(len(paths) for _, paths in chosen)
    title = f"{number} volumes of {' x '.join(map(str, SHAPES[spacing]))} voxels of {spacing:g} mm"
    head = ["stored as", "compressor", "MB", "encode, ms", "decode, ms", "to float32, ms"]
    errors = ["stored as", "largest error", "mean in brain", "PSNR, dB", "in brain, dB"]
    errors += ["brain stored as 0", "background not 0"]
    return f"{title}\n\n{markdown(head, rows)}\n\n{markdown(errors, lines)}\n"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
