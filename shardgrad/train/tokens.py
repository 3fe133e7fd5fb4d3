"""Files of token ids, mapped into memory: a page is read when a batch needs it, and the file is never read whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardgrad.settings import check_regular
from shardgrad.train.data import DataError

_CHUNK = 2**22  # ids looked at together


def open_tokens(path: str | Path, dtype: str) -> NDArray[Any]:
    """Ids [n] of a file: NumPy's format if its name ends in .npy, else nothing but little-endian ids of `dtype`.

    Raises:
        DataError: the file cannot be read, is empty, or holds something else.
    """
    file = Path(path)
    try:
        check_regular(file)
        size = file.stat().st_size
        if file.suffix == ".npy":
            ids = np.load(file, mmap_mode="r", allow_pickle=False)
        elif size == 0:
            raise DataError(f"data.tokens: {path} is empty")
        else:
            width = np.dtype(dtype).itemsize
            if size % width:
                raise DataError(
                    f"data.tokens: {path} has {size} bytes, no multiple of the {width} of data.tokens_dtype = {dtype}"
                )
            ids = np.memmap(file, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    except OSError as error:
        raise DataError(f"data.tokens: cannot read {path}: {error.strerror or error}") from None
    except DataError:
        raise
    except (ValueError, EOFError) as error:
        raise DataError(f"data.tokens: cannot read {path} as a .npy file: {error}") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(f"data.tokens: {path} must hold one row of integers, not {ids.dtype} {list(ids.shape)}")
    return ids


def check_ids(ids: NDArray[Any], vocab: int, path: str | Path) -> None:
    """Look at every id once, a few megabytes at a time.

    Raises:
        DataError: one is not below `vocab`; says which and where.
    """
    for start in range(0, len(ids), _CHUNK):
        some = ids[start : start + _CHUNK]
        if int(some.max()) >= vocab or int(some.min()) < 0:
            wrong = int(np.argmax((some >= vocab) | (some < 0)))
            raise DataError(
                f"data.tokens: {path} holds the id {int(some[wrong])} at position {start + wrong}; with data.vocab = "
                f"{vocab} ids are 0 to {vocab - 1}"
            )
