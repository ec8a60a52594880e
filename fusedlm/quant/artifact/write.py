"""From tensors to the bytes of an artifact, and what each tensor takes in it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from fusedlm.config import Recipe, dump_recipe
from fusedlm.data.tokenizer import Tokenizer
from fusedlm.quant.artifact.code_model import Layout
from fusedlm.quant.artifact.coders import REQUIRED, compress, planes, smallest
from fusedlm.quant.artifact.codes import CodesWriter
from fusedlm.quant.artifact.container import ContentDigest, assemble, check_of, tensor_bytes
from fusedlm.quant.artifact.table import (
    DTYPES,
    RANS,
    SCALE_DTYPES,
    SCALES,
    STATES,
    TOKENIZER,
    Header,
    Matrix,
    Part,
    Tensor,
    expected_parts,
)
from fusedlm.quant.integer import IntegerMatrix

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Packed:
    """content: the bytes of the file. header: its tables. header_bytes: of the file before its sections."""

    content: bytes
    header: Header
    header_bytes: int


def pack(
    tensors: Mapping[str, IntegerMatrix | torch.Tensor],
    recipe: Recipe,
    tokenizer: Tokenizer,
    *,
    step: int,
    text: str,
    weights: str = "raw",
    coders: Sequence[str] = REQUIRED,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Packed:
    """An artifact. The same arguments give the same bytes; with other versions of NumPy, ranks may be chosen otherwise.

    Args:
        tensors: by the names of the model's state; matrices of codes where they have some. On the CPU.
        step, weights, text: of the checkpoint: its step, its weights (raw, ema or swa) and the fingerprint of its text.
        coders: of bytes, that may be used beside the entropy coder of codes. A file is as small as the best of all
            makes it; one with a coder that is not in `coders.REQUIRED` can be read only where that is installed.
        progress: is called with the elements done, and all.

    Raises:
        ValueError: names a tensor of another dtype, or a matrix that is none of its bits.
    """
    matrices = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, IntegerMatrix)}
    plain = {name: tensor for name, tensor in tensors.items() if name not in matrices}
    digest = ContentDigest()
    for name, matrix in matrices.items():
        _check_matrix(name, matrix)
        digest.add(name, matrix)
    for name, tensor in plain.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {name!r} of {tensor.dtype}: must be one of {', '.join(DTYPES)}")
        digest.add(name, tensor)
    entries, sections, states, lanes = _pack_codes(matrices, coders, progress)
    header = Header(
        recipe=dump_recipe(recipe),
        step=step,
        weights=weights,
        text=text,
        lanes=lanes,
        content=digest.hexdigest(),
        parts=[],
        matrices=entries,
        tensors=[Tensor(name=n, shape=list(t.shape), dtype=_NAMES[t.dtype]) for n, t in plain.items()],
    )
    parts, coded_parts = [], []
    for kind, dtype in expected_parts(header):
        if kind == TOKENIZER:
            raw = json.dumps(tokenizer.files(), ensure_ascii=False, sort_keys=True).encode()
        elif kind == STATES:
            raw = states
        else:
            members = [m.scales for m in matrices.values()] if kind == SCALES else plain.values()
            of_dtype = [tensor for tensor in members if _NAMES[tensor.dtype] == dtype]
            raw = planes(b"".join(map(tensor_bytes, of_dtype)), DTYPES[dtype].itemsize)
        coder, coded = smallest(compress(raw, coders))
        size = len(raw)
        parts.append(Part(kind=kind, dtype=dtype, coder=coder, size=size, bytes=len(coded), check=check_of(coded)))
        coded_parts.append(coded)
    header = header.model_copy(update={"parts": parts})
    content = assemble(header, coded_parts + sections)
    return Packed(content, header, len(content) - sum(map(len, coded_parts + sections)))


def _check_matrix(name: str, matrix: IntegerMatrix) -> None:
    codes, scales, largest = matrix.codes, matrix.scales, 2 ** (matrix.bits - 1) - 1
    if not 2 <= matrix.bits <= 8:
        raise ValueError(f"matrix {name!r}: bits={matrix.bits} must be 2 to 8")
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"matrix {name!r}: codes must be int8 (rows, columns), not {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and (codes.min() < -largest or codes.max() > largest):
        found = f"{int(codes.min())} to {int(codes.max())}"
        raise ValueError(f"matrix {name!r}: codes from {found} are not of {matrix.bits} bits: -{largest} to {largest}")
    if _NAMES.get(scales.dtype) not in SCALE_DTYPES:
        raise ValueError(f"matrix {name!r}: scales of {scales.dtype} must be one of {', '.join(SCALE_DTYPES)}")
    if matrix.group is not None and matrix.group < 1:
        raise ValueError(f"matrix {name!r}: group={matrix.group} must be at least 1")
    groups = 1 if matrix.group is None else -(-codes.shape[1] // matrix.group)
    if tuple(scales.shape) != (codes.shape[0], groups):
        expected = (codes.shape[0], groups)
        raise ValueError(f"matrix {name!r}: scales have shape {tuple(scales.shape)}, its codes and group {expected}")


def _pack_codes(
    matrices: Mapping[str, IntegerMatrix], coders: Sequence[str], progress: Callable[[int, int], None]
) -> tuple[list[Matrix], list[bytes], bytes, int]:
    """(entries, their sections, states of the entropy coder, its lanes)."""
    total, done = sum(matrix.codes.numel() for matrix in matrices.values()), 0
    writer = CodesWriter(total)
    chosen: list[tuple[str, bool, Layout | None, bytes | None]] = []
    for matrix in matrices.values():
        progress(done, total)
        chosen.append(_choose(writer, matrix, coders))
        done += matrix.codes.numel()
    progress(done, total)
    states, words = writer.finish()
    of_rans = iter(words)
    entries, sections = [], []
    for (name, matrix), (coder, transposed, layout, coded) in zip(matrices.items(), chosen, strict=True):
        section = next(of_rans) if coded is None else coded
        sections.append(section)
        entries.append(
            Matrix(
                name=name,
                shape=tuple(matrix.codes.shape),
                bits=matrix.bits,
                group=matrix.group,
                scales=_NAMES[matrix.scales.dtype],
                coder=coder,
                transposed=transposed,
                rank=layout.rank if layout else 0,
                level=layout.level if layout else 0,
                bytes=len(section),
                check=check_of(section),
            )
        )
    return entries, sections, states, writer.lanes


def _choose(
    writer: CodesWriter, matrix: IntegerMatrix, coders: Sequence[str]
) -> tuple[str, bool, Layout | None, bytes | None]:
    """(coder, whether transposed, layout and None if the writer has the codes, else None and the bytes)."""
    codes = matrix.codes.numpy()
    others = {
        (coder, transposed): coded
        for transposed in (False, True)
        for coder, coded in compress((codes.T if transposed else codes).tobytes(), coders).items()
    }
    (coder, transposed), coded = smallest(others)
    if codes.size:
        n_bytes, options = writer.estimate(codes, matrix.bits)
        if n_bytes < len(coded):
            return RANS, options["transposed"], writer.add(codes, matrix.bits, options), None
    return coder, transposed, None, coded
