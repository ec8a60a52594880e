"""Write a safetensors file from a thread beside training: in chunks that leave Python's lock to others, with its
checksum taken on the way, and so that it can be cancelled."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

_CHUNK_BYTES = 1 << 24
# In the order in which the safetensors package stores them, so that a file has the bytes that it would write.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER = {dtype: index for index, dtype in enumerate(_DTYPES)}


class Cancelled(Exception):
    """The file was not written to its end, because nobody wants it any more."""


def never() -> bool:
    """For `cancelled`: the file is wanted."""
    return False


def write_tensor_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    cancelled: Callable[[], bool] = never,
) -> dict:
    """Write tensors by name, on any device, and flush them to the disk. Each is fetched twice from the mapping, and
    only one is in host memory at a time.

    Args:
        path: of a file that does not exist.
        metadata: of the safetensors header.
        cancelled: asked before each chunk.

    Returns:
        "sha256" and "bytes" of the file, as the manifest of a checkpoint has them.

    Raises:
        Cancelled: `cancelled` returned True.
        OSError: the disk is full, or the file exists or cannot be written.
        TypeError: safetensors have no such dtype.
    """
    digest, n_bytes = hashlib.sha256(), 0
    names, header = _header(tensors, metadata)
    with path.open("xb") as file:
        for data in (header, *(_bytes(tensors[name]) for name in names)):
            for start in range(0, len(data), _CHUNK_BYTES):
                if cancelled():
                    raise Cancelled(path)
                chunk = data[start : start + _CHUNK_BYTES]
                file.write(chunk)
                digest.update(chunk)
                n_bytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "bytes": n_bytes}


def _header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> tuple[list[str], bytes]:
    """The names in the order of their data, and the header with its length."""
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    for name, (dtype, _) in found.items():
        if dtype not in _DTYPES:
            raise TypeError(f"tensor {name!r} is {dtype}, which safetensors do not have")
    names = sorted(found, key=lambda name: (_ORDER[found[name][0]], name))
    table, offset = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name in names:
        dtype, shape = found[name]
        end = offset + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return names, len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Of a tensor, little-endian as all machines that torch runs on."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
