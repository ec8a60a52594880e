"""The shape of the repository: layers, file sizes, and the picture of the import graph."""

import json
import re
from pathlib import Path

import pytest

from scripts.import_graph import RECORD, REPOSITORY, edges, find_imports
from scripts.lengths_section import LENGTHS, read_lengths
from scripts.results import (
    EXPERIMENTS,
    HEADLINES,
    RUNS,
    headline_table,
    read_experiments,
    read_others,
    read_records,
    replace_table,
    results_page,
)


def test_imports_run_downwards():
    assert [problem for i in find_imports(REPOSITORY) if (problem := i.problem())] == []


def test_picture_is_up_to_date():
    recorded = [tuple(pair) for pair in json.loads(RECORD.read_text())]
    assert recorded == edges(find_imports(REPOSITORY)), "the import graph has changed: make graph"


def test_published_numbers_are_those_of_the_records():
    records = read_records(REPOSITORY / RUNS)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert replace_table(readme, headline_table(records)) == readme, "python scripts/results.py"
    page = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")
    experiments = read_experiments(REPOSITORY / EXPERIMENTS)
    lengths = read_lengths(REPOSITORY / LENGTHS)
    assert page == results_page(records, experiments, read_others(REPOSITORY), lengths), "python scripts/results.py"


def test_headlines_come_from_records():
    seeds = [{"val_nll_per_token": n, "eval": {"bpb": n - 0.2}} for n in (1.45, 1.46)]
    record = {"val_bpb": 1.98765, "seeds": seeds, "mfu": 0.4567, "device": "H100"}
    for name, what, _ in HEADLINES:
        table = headline_table([record | {"name": name}])
        assert table.count("not measured yet") == len(HEADLINES) - 1
        row = next(line for line in table.splitlines() if f"recipes/{name}.yaml" in line)
        assert "H100" in row and what in row
        assert (REPOSITORY / "recipes" / f"{name}.yaml").is_file()
        assert {"shakespeare": "| 1.4550 |", "ten-minutes": "| 1.255 |"}.get(name, "") in row  # means of seeds


PAGES = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"(?<!!)\[[^]]*\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert broken == []


def test_no_file_has_two_subjects():
    long = {}
    for folder in ("fusedlm", "tests", "scripts", "benchmarks"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            if lines > 500:
                long[str(path.relative_to(REPOSITORY))] = lines
    assert long == {}


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("nn/norm.py", "import torch\nfrom fusedlm.ops.norm import rms_norm\n", None),
        ("train/loop.py", "from fusedlm.config import Recipe\n", None),
        ("train/loop.py", "from fusedlm.runs.metrics import log\n", None),
        ("train/loop.py", "from fusedlm import __version__\n", None),
        ("ops/norm/op.py", "from fusedlm.nn import RMSNorm\n", "ops imports nn"),
        ("ops/norm/op.py", "import fusedlm.nn.norm as norm\n", "ops imports nn"),
        ("model/decoder.py", "def f():\n    from fusedlm.train import train\n    train()\n", "model imports train"),
        ("model/decoder.py", "from ..train import train\n", "model imports train"),
        ("nn/mixers/gdn.py", "from ...model.decoder import Decoder\n", "nn imports model"),
        ("model/decoder.py", "from fusedlm import train\n", "model imports train"),
        ("model/decoder.py", "from fusedlm import load\n", "library face"),
        ("data/loader.py", "from fusedlm.model import build_model\n", "not in a lower layer"),
        ("nn/norm.py", "from fusedlm.config import Recipe\n", "nn takes plain arguments"),
        ("config/recipe.py", "from fusedlm.data import prepare\n", "imports none of ours"),
        ("train/loop.py", "from fusedlm.testing import assert_close\n", "for tests only"),
        ("train/loop.py", "from fusedlm.nowhere import pack\n", "has no layer"),
    ],
)
def test_import_rules(tmp_path: Path, file: str, source: str, problem: str | None):
    path = tmp_path / "fusedlm" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    problems = [p for i in find_imports(tmp_path) if (p := i.problem())]
    if problem is None:
        assert problems == []
    else:
        assert len(problems) == 1 and problem in problems[0] and f"{file}:" in problems[0]
