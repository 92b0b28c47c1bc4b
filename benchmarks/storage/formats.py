"""Bytes, time and error of number formats and compressors, on canonical volumes of real scans."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numcodecs
import numpy as np
import torch
from numpy.typing import NDArray

from shards.preprocess.recipe import read_derivative
from shards.quantization import dequantize, quantize, stored_as
from shards.volumes import canonical

SHAPES = {1.0: (160, 192, 160), 2.0: (80, 96, 80)}  # of the presets, by spacing
DTYPES = ("float16", "uint8", "uint16")
FAINT = 1e-3  # of the largest intensity; what is below belongs to the background
BLOSC = numcodecs.Blosc
CODECS: dict[str, Any] = {
    "none": None,
    "zstd 3": numcodecs.Zstd(level=3),
    "zstd 1": numcodecs.Zstd(level=1),
    "zstd -1": numcodecs.Zstd(level=-1),
    "lz4": numcodecs.LZ4(),
    "shuffle + zstd 1": BLOSC("zstd", 1, BLOSC.SHUFFLE, 2**20),
    "shuffle + lz4": BLOSC("lz4", 9, BLOSC.SHUFFLE),
    "bitshuffle + zstd 1": BLOSC("zstd", 1, BLOSC.BITSHUFFLE, 2**20),
    "bitshuffle + lz4": BLOSC("lz4", 9, BLOSC.BITSHUFFLE),
}
Array = NDArray[Any]


def scans(folder: Path) -> list[Path]:
    """The preprocessed T1w volumes of a derivative, or the T1w scans of a BIDS folder."""
    found = sorted(folder.glob("sub-*/**/anat/*_desc-preproc_T1w.nii.gz"))
    return found or sorted(folder.glob("sub-*/**/anat/*_T1w.nii.gz"))


def volume(path: Path, spacing: float, folder: Path) -> NDArray[np.float32]:
    """A scan's canonical volume before it is rounded to a number format: float32 in [0, 1]."""
    derivative = read_derivative(folder)
    space = derivative[1] if derivative else None
    space = space and replace(space, maps=())
    return canonical(path, spacing, SHAPES[spacing], space, dtype="float32").voxels


def to_float16(stored: Array) -> NDArray[np.float16]:
    """As :meth:`shards.dataset.Dataset.read`."""
    scale = stored_as(stored.dtype.name).get("scale")
    return stored if scale is None else dequantize(stored, scale)


def to_float32(stored: Array) -> NDArray[np.float32]:
    """Stored numbers -> float32 in [0, 1], without float16 between."""
    if scale := stored_as(stored.dtype.name).get("scale"):
        return stored * np.float32(scale)
    return torch.from_numpy(stored).float().numpy()  # NumPy's conversion takes ten times as long


def cpu_ms(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Process time of a call, and its result."""
    start = time.process_time()
    result = function(*arguments)
    return 1000 * (time.process_time() - start), result


def decode(codec: Any, packed: bytes, target: Array) -> None:
    """Fill ``target``."""
    if codec is None:
        target[...] = np.frombuffer(packed, target.dtype).reshape(target.shape)
    else:
        codec.decode(packed, target)


def costs(x: NDArray[np.float32], dtype: str, codec: Any) -> tuple[float, ...]:
    """Bytes, and milliseconds to convert and encode, to decode, and to decode to float16 and to float32."""
    convert, stored = cpu_ms(quantize, x, dtype)
    encode, packed = cpu_ms(codec.encode if codec else np.ndarray.tobytes, stored)
    target = np.empty_like(stored)
    times = [cpu_ms(decode, codec, packed, target)[0]]
    if not np.array_equal(target, stored):
        raise AssertionError(f"{codec} does not restore {dtype}")
    times += [times[0] + cpu_ms(to_float16, target)[0], times[0] + cpu_ms(to_float32, target)[0]]
    return (len(packed), convert + encode, *times)


def errors(x: NDArray[np.float32], dtype: str) -> tuple[float, ...]:
    """Largest error, mean in the brain, PSNR of all and of the brain, brain stored as 0, background stored as not 0."""
    stored = quantize(x, dtype)
    error, brain = np.abs(to_float32(stored).astype(np.float64) - x), x > FAINT
    psnr = [-10 * np.log10(np.square(e).mean()) for e in (error, error[brain])]
    return (error.max(), error[brain].mean(), *psnr, (stored[brain] == 0).mean(), np.count_nonzero(stored[x == 0]))


def measure(volumes: Iterator[NDArray[np.float32]]) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of bytes and times by dtype and codec, and rows of errors by dtype; medians over volumes."""
    torch.set_num_threads(1)
    numcodecs.blosc.use_threads = False
    cells: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    lost: dict[str, list[tuple[float, ...]]] = {}
    for x in volumes:
        for dtype in DTYPES:
            lost.setdefault(dtype, []).append(errors(x, dtype))
            for name, codec in CODECS.items():
                cells.setdefault((dtype, name), []).append(costs(x, dtype, codec))
    rows = []
    for (dtype, name), found in cells.items():
        size, *times = (median(column) for column in zip(*found))
        rows.append([dtype, name, f"{size / 1e6:.2f}", *(f"{ms:.2f}" for ms in times)])
    lines = []
    for dtype, found in lost.items():
        worst, mean, psnr, inside, zeroed, lit = zip(*found)
        cell = [f"{max(worst):.1e}", f"{median(mean):.1e}", f"{median(psnr):.1f}", f"{median(inside):.1f}"]
        lines.append([dtype, *cell, f"{max(zeroed):.1e}", f"{max(lit):.0f}"])
    return rows, lines


def tables(folders: Sequence[Path], spacing: float, count: int) -> str:
    """The tables of ``count`` scans of each folder, as Markdown."""
    chosen = [(folder, found[:: max(1, len(found) // count)][:count]) for folder in folders if (found := scans(folder))]
    volumes = (volume(path, spacing, folder) for folder, paths in chosen for path in paths)
    rows, lines = measure(volumes)
    number = sum(len(paths) for _, paths in chosen)
    title = f"{number} volumes of {' x '.join(map(str, SHAPES[spacing]))} voxels of {spacing:g} mm"
    head = ["stored as", "compressor", "MB", "encode, ms", "decode, ms", "to float16, ms", "to float32, ms"]
    losses = ["stored as", "largest error", "mean in brain", "PSNR, dB", "in brain, dB"]
    losses += ["brain stored as 0", "background not 0"]
    return f"{title}\n\n{markdown(head, rows)}\n\n{markdown(losses, lines)}\n"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
