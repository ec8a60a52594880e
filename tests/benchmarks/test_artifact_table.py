"""docs/artifact.md has the numbers of the record."""

import json
from pathlib import Path

from benchmarks.artifact import RESULTS, arrangements, entropy, replace_table
from tests.quant.artifacts import normal_codes

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def test_the_page_has_the_numbers_of_the_record():
    record = json.loads((REPOSITORY / RESULTS).read_text(encoding="utf-8"))
    page = (REPOSITORY / "docs/artifact.md").read_text(encoding="utf-8")
    assert replace_table(page, record) == page, "python benchmarks/artifact.py RUN --page docs/artifact.md"
    for entry in record["entries"]:
        sizes = entry["code_bytes"]
        assert sizes["best of these"] <= min(sizes[coder] for coder in ("lzma", "zstd", "brotli") if coder in sizes)
        assert sizes["fusedlm pack"] < sizes["best of these"]


def test_arrangements_hold_the_same_codes():
    codes = normal_codes((7, 5), 6, 4.0)
    found = arrangements(codes)
    assert found[0] == codes.tobytes() and found[1] == codes.T.tobytes()
    assert len({bytes(sorted(data)) for data in found}) == 1
    assert entropy(codes % 2) <= 7 * 5 / 8
