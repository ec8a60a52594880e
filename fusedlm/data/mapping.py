"""Memory-mapped arrays that hold no file descriptor: a prepared folder can have more files than a process may open.
numpy.memmap keeps one descriptor per array."""

from pathlib import Path

import numpy as np
import pyarrow


def map_array(path: Path, dtype: np.dtype, offset: int = 0) -> np.ndarray:
    """A read-only one-dimensional array of a file from a byte on.

    Raises:
        ValueError: the rest of the file is no whole number of elements.
    """
    with pyarrow.memory_map(str(path)) as file:
        content = file.read_buffer()  # keeps the mapping when the file is closed
    return np.frombuffer(content, np.uint8)[offset:].view(dtype)


def map_npy(path: Path) -> np.ndarray:
    """The same of a one-dimensional .npy file.

    Raises:
        ValueError: it is not one.
    """
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{path}: version {version} of the npy format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{path}: objects, not numbers")
    array = map_array(path, dtype, offset)
    if shape != array.shape:
        raise ValueError(f"{path}: {array.shape} elements instead of {shape}")
    return array
