"""What each tensor takes of an artifact, and the budget that the file keeps."""

from dataclasses import asdict, dataclass

from fusedlm.quant.artifact.table import DTYPES, SCALES, STATES, TENSORS, Header


@dataclass(frozen=True)
class Row:
    """A tensor, or a part that belongs to all.

    bits: of an element before coding; None: it is none. bytes: of the file, to a tensor's share of what several have
    together. bits_per_element: after coding; None: it has no elements.
    """

    name: str
    shape: list[int] | None
    bits: int | None
    coder: str
    bytes: float
    bits_per_element: float | None


@dataclass(frozen=True)
class Breakdown:
    """total: bytes of the file, the sum of the rows."""

    total: int
    rows: list[Row]

    def record(self) -> dict:
        return {"bytes": self.total, "tensors": [asdict(row) for row in self.rows]}


class OverBudget(ValueError):
    """The file would be larger than its budget."""

    def __init__(self, breakdown: Breakdown, budget: int, code: int = 0):
        self.breakdown = breakdown
        total = breakdown.total + code
        of_code = f", {code:,} of them code" if code else ""
        over = total - budget
        super().__init__(
            f"{total:,} bytes{of_code}, {over:,} more than --bytes {budget}; nothing was written: use fewer bits, "
            "more deviations, or a smaller model"
        )


def break_down(header: Header, header_bytes: int) -> Breakdown:
    """The rows of an artifact, the largest first, then the parts that belong to all.

    Scales of one dtype share a part, and so do plain tensors: each has its share by its elements; the states of the
    entropy coder count as a part of their own.
    """
    rates, rest, coder_of = {}, [Row("header", None, None, "lzma", header_bytes, None)], {}
    for part in header.parts:
        if part.kind in (SCALES, TENSORS):
            rates[part.kind, part.dtype] = part.bytes / max(part.size // DTYPES[part.dtype].itemsize, 1)
            coder_of[part.kind, part.dtype] = part.coder
            if not part.size:  # of tensors without elements
                rest.append(Row(part.name, None, None, part.coder, part.bytes, None))
        else:
            name = "states of the entropy coder" if part.kind == STATES else part.kind
            rest.append(Row(name, None, None, part.coder, part.bytes, None))
    rows = []
    for matrix in header.matrices:
        n_bytes = matrix.bytes + matrix.n_scales * rates[SCALES, matrix.scales]
        rows.append(_row(matrix.name, list(matrix.shape), matrix.bits, matrix.coder, n_bytes, matrix.n_elements))
    for tensor in header.tensors:
        key = (TENSORS, tensor.dtype)
        n_bytes, bits = tensor.n_elements * rates[key], 8 * DTYPES[tensor.dtype].itemsize
        rows.append(_row(tensor.name, tensor.shape, bits, coder_of[key], n_bytes, tensor.n_elements))
    rows.sort(key=lambda row: -row.bytes)
    return Breakdown(round(sum(row.bytes for row in rows + rest)), rows + rest)


def _row(name: str, shape: list[int], bits: int, coder: str, n_bytes: float, n_elements: int) -> Row:
    return Row(name, shape, bits, coder, n_bytes, 8 * n_bytes / n_elements if n_elements else None)
