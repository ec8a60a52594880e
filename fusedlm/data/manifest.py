"""manifest.json of a prepared folder: what it holds, its checks, and what to do about a folder that is damaged."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pydantic
from pydantic import BaseModel, ConfigDict, Field

FORMAT = "fusedlm prepared data"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
_KEY_LETTERS = 12  # of the fingerprint in the folder's name
PREPARED_NAME = re.compile(rf"-[0-9a-f]{{{_KEY_LETTERS}}}$")  # of a folder that `prepare` named


class DamagedData(ValueError):
    """Prepared text is missing, or is not what was written."""


# Names are plain: nothing in a manifest can lead out of its folder.
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _File(_Part):
    bytes: _Count
    sha256: _Digest


class _Shard(_Part):
    name: _Name
    documents: Annotated[_Count, Field(ge=1)]
    tokens: _Count
    bytes: _Count


class _Split(_Part):
    documents: _Count
    tokens: _Count
    bytes: _Count
    shards: list[_Shard]


class _Splits(_Part):
    train: _Split
    validation: _Split


class _Tokenizer(_Part):
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    eot_id: _Count
    fingerprint: _Digest


class _Source(_Part):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,60}$")]
    train: Annotated[_Count, Field(ge=1)]  # shards
    validation: _Count


class _Manifest(_Part):
    """The keys that are read; others are for people."""

    fingerprint: _Digest
    tokenizer: _Tokenizer
    dtype: Literal["<u2", "<u4"]
    splits: _Splits
    sources: list[_Source] | None = None  # several; each has the shards after those of the one before it
    files: dict[_Name, _File]


def folder_name(stem: str, fingerprint: str) -> str:
    """The name of a prepared folder: a readable stem and the beginning of the fingerprint."""
    return f"{stem}-{fingerprint[:_KEY_LETTERS]}"


def is_folder_of(directory: Path, fingerprint: str) -> bool:
    """Whether the name of a folder is one for this fingerprint."""
    return directory.name.endswith(f"-{fingerprint[:_KEY_LETTERS]}")


def write_manifest(directory: Path, manifest: dict, checksums: dict[str, str]) -> None:
    """Write manifest.json: `manifest`, the size and sha256 of the named files, and a checksum of both."""
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": checksum}
        for name, checksum in sorted(checksums.items())
    }
    content = {"format": FORMAT, "version": FORMAT_VERSION} | manifest | {"files": files}
    content["checksum"] = _checksum(content)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(directory: Path) -> dict:
    """The manifest of a prepared folder, its checksum and the type and range of every key that is read checked.

    Raises:
        ValueError: there is no such folder.
        DamagedData: the manifest is missing, of another version, or not what was written.
    """
    path = directory / MANIFEST
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder; run `fusedlm data prepare` first")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise damaged(directory, MANIFEST, "is missing") from None
    except (ValueError, RecursionError):
        raise damaged(directory, MANIFEST, "is not JSON") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise damaged(directory, MANIFEST, f"is not a manifest of {FORMAT}")
    if manifest.get("version") != FORMAT_VERSION:
        raise damaged(
            directory, MANIFEST, f"has format version {manifest.get('version')!r}; this fusedlm reads {FORMAT_VERSION}"
        )
    if manifest.get("checksum") != _checksum(manifest):
        raise damaged(directory, MANIFEST, "does not match its own checksum")
    try:
        _Manifest.model_validate(manifest)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise damaged(directory, MANIFEST, f"has a bad value ({key[:100]!r}: {first['msg']})") from None
    if (wrong := _disagreement(manifest)) is not None:
        raise damaged(directory, MANIFEST, f"contradicts itself ({wrong})")
    return manifest


def damaged(directory: Path, name: str, what: str) -> DamagedData:
    """An error about a file of a prepared folder, with what to do."""
    return DamagedData(f"{directory / name} {what}; {remedy(directory)}")


def remedy(directory: Path) -> str:
    """What to do about a damaged folder. Only one that has a name of ours is to be moved, and none is to be deleted:
    its source may be gone."""
    if PREPARED_NAME.search(directory.name):
        return f"move the folder {directory} to another place and prepare again"
    return "name a folder that `fusedlm data prepare` wrote"


def _checksum(manifest: dict) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _disagreement(manifest: dict) -> str | None:
    """The first statement that another one contradicts; None if all agree."""
    tokenizer, files, dtype = manifest["tokenizer"], manifest["files"], np.dtype(manifest["dtype"])
    if tokenizer["eot_id"] >= tokenizer["vocab_size"]:
        return "tokenizer.eot_id is not in its vocabulary"
    if tokenizer["vocab_size"] > 2 ** (8 * dtype.itemsize):
        return f"dtype {manifest['dtype']} cannot hold a vocabulary of {tokenizer['vocab_size']}"
    for split in SPLITS:
        content = manifest["splits"][split]
        for number, shard in enumerate(content["shards"]):
            if shard["name"] != f"{split}-{number:05d}":
                return f"shard {number} of {split} is named {shard['name']!r}"
            if missing := [name for name in shard_files(shard["name"]) if name not in files]:
                return f"{missing[0]} is not among its files"
            if files[f"{shard['name']}.bin"]["bytes"] != shard["tokens"] * dtype.itemsize:
                return f"{shard['name']}.bin does not have the size of {shard['tokens']} tokens"
        for key in ("documents", "tokens", "bytes"):
            if content[key] != sum(shard[key] for shard in content["shards"]):
                return f"splits.{split}.{key} is not the sum of its shards"
    return _disagreement_of_sources(manifest)


def _disagreement_of_sources(manifest: dict) -> str | None:
    sources = manifest.get("sources")
    if sources is None:
        return None
    if len({source["name"] for source in sources}) < len(sources):
        return "two sources have one name"
    for split in SPLITS:
        shards = len(manifest["splits"][split]["shards"])
        # Held-out text of its own is of no source.
        allowed = (shards,) if split == "train" else (0, shards)
        if sum(source[split] for source in sources) not in allowed:
            return f"its sources do not have the {shards} shards of {split}"
    return None


def shard_files(name: str) -> tuple[str, str, str]:
    """The files of a shard: tokens, offsets, bytes."""
    return f"{name}.bin", f"{name}.offsets.npy", f"{name}.bytes.npy"
