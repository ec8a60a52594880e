"""Artifacts for tests: small tensors, and files that are forged with checksums that agree."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from fusedlm.config import parse_recipe
from fusedlm.data.tokenizer import ByteTokenizer
from fusedlm.quant.artifact import Packed, pack
from fusedlm.quant.artifact.coders import REQUIRED, compress, decompress
from fusedlm.quant.artifact.container import _digest, check_of
from fusedlm.quant.integer import IntegerMatrix

RECIPE = parse_recipe(
    "{name: small, model: {dim: 16, n_layers: 1, pattern: a, blocks: "
    "{a: {mixer: {type: attention, n_heads: 2}, ffn: {type: swiglu}}}}, train: {steps: 1, seq_len: 16, batch_size: 2}}"
)


def pack_small(tensors: Mapping[str, IntegerMatrix | torch.Tensor], **options) -> Packed:
    return pack(tensors, RECIPE, ByteTokenizer(), **({"step": 3, "text": "none", "coders": REQUIRED} | options))


def normal_codes(shape: tuple[int, int], bits: int, deviation: float, seed: int = 0) -> np.ndarray:
    """Rounded normal numbers, int8."""
    largest = 2 ** (bits - 1) - 1
    draw = np.random.default_rng(seed).standard_normal(shape) * deviation
    return np.clip(np.rint(draw), -largest, largest).astype(np.int8)


def matrix(
    codes: np.ndarray, bits: int, group: int | None = None, dtype=torch.bfloat16, seed: int = 0
) -> IntegerMatrix:
    groups = 1 if group is None else -(-codes.shape[1] // group)
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(codes.shape[0], groups, generator=generator).to(dtype)
    return IntegerMatrix(torch.from_numpy(codes.copy()), scales, bits, group)


def same(a: IntegerMatrix | torch.Tensor, b: IntegerMatrix | torch.Tensor) -> bool:
    """Bit for bit, NaN too."""
    if isinstance(a, IntegerMatrix) or isinstance(b, IntegerMatrix):
        if not (isinstance(a, IntegerMatrix) and isinstance(b, IntegerMatrix)):
            return False
        return (a.bits, a.group) == (b.bits, b.group) and same(a.codes, b.codes) and same(a.scales, b.scales)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def split(content: bytes) -> tuple[dict, list[bytes]]:
    """(header, sections) of an intact artifact."""
    _, _, n_coded, n_raw = struct.unpack("<8sHII", content[:18])
    header = json.loads(decompress(content[34 : 34 + n_coded], "lzma", n_raw))
    sections, offset = [], 34 + n_coded
    for entry in header["parts"] + header["matrices"]:
        sections.append(content[offset : offset + entry["bytes"]])
        offset += entry["bytes"]
    return header, sections


def join(header: object, sections: list[bytes]) -> bytes:
    """A file whose checksum of the header agrees."""
    raw = json.dumps(header).encode()
    coded = compress(raw, ("lzma",))["lzma"]
    prefix = struct.pack("<8sHII", b"\x89FLM\r\n\x1a\n", 1, len(coded), len(raw))
    return b"".join([prefix, _digest(prefix + coded), coded, *sections])


def forge(content: bytes, change: Callable[[dict, list[bytes]], None]) -> bytes:
    """Change header and sections; the sizes and checksums of sections are made to agree."""
    header, sections = split(content)
    before = list(sections)
    change(header, sections)
    for entry, section, old in zip(header["parts"] + header["matrices"], sections, before, strict=True):
        if section != old:
            entry["bytes"], entry["check"] = len(section), check_of(section)
    return join(header, sections)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path
