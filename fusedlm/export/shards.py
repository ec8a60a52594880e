"""Weights in safetensors files, with an index where there are several, as Transformers names them."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

SHARD_BYTES = 5 * 10**9
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Write tensors in their order; returns the names of the files.

    Args:
        shard_bytes: most bytes of tensors per file; a larger tensor has a file of its own.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        _save(shards[0], folder / _SINGLE)
        return [_SINGLE]
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        _save(shard, folder / file)
    where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, _INDEX]


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(tensors, path, metadata={"format": "pt"})  # which Transformers requires
    path.chmod(mode)  # save_file makes a file that only its owner can read


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by name, on the CPU, in the dtypes of the files.

    Raises:
        ValueError: a file is missing or damaged, or names a file outside of the folder.
    """
    if not (folder / _INDEX).is_file():
        if not (folder / _SINGLE).is_file():
            raise ValueError(f"{folder}: holds neither {_SINGLE} nor {_INDEX}; weights are read from safetensors alone")
        return _load(folder / _SINGLE)
    try:
        where = dict(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"])
        if any(not isinstance(file, str) or Path(file).name != file for file in where.values()):
            raise ValueError("a file that is not beside it")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / _INDEX}: damaged ({' '.join(str(error).split())[:100]})") from None
    tensors = {}
    for file in sorted(set(where.values())):
        tensors |= _load(folder / file)
    if missing := sorted(where.keys() - tensors.keys()):
        raise ValueError(f"{folder / where[missing[0]]}: tensor {missing[0]!r} of {_INDEX} is not in it")
    return tensors


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: No such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())[:200]}") from None
