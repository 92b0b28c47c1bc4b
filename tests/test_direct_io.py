"""A file holds what was given, however it is cut into writes and whatever the file system allows."""

import hashlib
import mmap
from pathlib import Path

import pytest

from mvhpc.checkpoints.direct_io import BLOCK, Direct

CONTENT = bytes(range(256)) * 100


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, len(CONTENT)])
@pytest.mark.parametrize("part", [1000, BLOCK, 10 * BLOCK])
@pytest.mark.parametrize("shift", [0, 1])  # an address that is no multiple of anything cannot be written past the cache
def test_a_file_is_what_was_written(tmp_path: Path, size: int, part: int, shift: int) -> None:
    buffer = memoryview(mmap.mmap(-1, 3 * BLOCK))[shift : shift + 2 * BLOCK]
    file = Direct(tmp_path / "file", buffer)
    for start in range(0, size, part):
        assert file.write(CONTENT[start : min(start + part, size)]) == min(part, size - start)
    file.flush()
    file.close()
    assert (tmp_path / "file").read_bytes() == CONTENT[:size]
    assert file.size == size
    assert file.sha.hexdigest() == hashlib.sha256(CONTENT[:size]).hexdigest()
