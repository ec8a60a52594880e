"""README and docs as a reader meets them: every command and every Python block is run, on a CPU, as written.

Commands stand in ```sh blocks, or indented, where two spaces begin an explanation. Blocks of one page run in order and
in one namespace, in a folder with a small run in runs/demo. What is not run as written is in the tables below, each
with its reason.
"""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fusedlm.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent
GENERATED = {"results.md", "decisions.md"}  # records of commands that were run, not advice
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *(page for page in sorted((REPOSITORY / "docs").glob("*.md")) if page.name not in GENERATED),
]

SMALL = (
    "data.source={type: text, path: speeches}",
    "data.validation=null",
    "data.split={type: hash, fraction: 0.3}",
    "data.tokenizer={type: bpe, vocab_size: 280}",
    "model.dim=48",
    "train.steps=2",
    "train.seq_len=96",
    "train.batch_size=2",
    "train.eval_every=1",
    "train.checkpoint_every=0",
    "train.eval_tokens=64",
)
# What is appended to commands that begin so, the longest prefix counting: the smallest settings, in place of hours.
APPENDED = {
    "fusedlm train": SMALL,
    "fusedlm train recipes/gpt-350m.yaml --dry-run": (),
    "fusedlm data prepare": SMALL,
    "fusedlm eval runs/demo --probe mqar": ("--steps", "1", "--samples", "2", "--pairs", "2,3"),
    "fusedlm eval recipes/demo.yaml --probe mqar": ("--steps", "1", "--samples", "2", "--pairs", "2,3"),
    "fusedlm eval runs/demo --probe needle": ("--samples", "1", "--lengths", "1", "--text", "long.txt"),
    "fusedlm eval runs/demo --probe needle --steps": ("--steps", "1", "--samples", "1", "--lengths", "1"),
    "fusedlm eval runs/demo --probe extend": ("--samples", "2", "--factors", "2", "--text", "long.txt"),
    "fusedlm generate": ("--max-tokens", "4"),
    "fusedlm quantize runs/demo --format int4 --storage integers": ("--tokens", "1024"),
    "fusedlm quantize runs/demo --format int6 --calibrate": ("--tokens", "1024"),
    "fusedlm quantize runs/demo --format mixed": ("--tokens", "1024"),
    "fusedlm golf": (*SMALL, "--tokens", "192"),
    # A comparison starts a process per run: it is planned here, and run in tests/cli/test_compare.py.
    "fusedlm compare": ("--dry-run",),
}
# Commands that are not run, by how they begin.
NOT_RUN = {
    "make demo": "trains for minutes; its commands are checked to be those of the tutorial",
    "make golf": "trains for minutes; tests/cli/test_golf.py runs its command",
    "make test": "runs this test",
    "make docs": "needs mkdocs; tests/test_site.py builds the site where that is installed",
    "make graph": "draws a picture of the repository",
    "curl": "needs the network",
    "fusedlm serve": "serves until it is stopped; tests/cli/test_serve.py starts and stops one",
    "fusedlm eval runs/demo --tasks": "fetches data sets; tests/harness/test_tasks.py has files",
    "python benchmarks/": "measures for hours",
    "python -m tests.fuzz": "takes minutes; tests/fuzz/test_sample.py runs a sample",
    "python -m tests.kills": "takes minutes; tests/train/test_resume.py kills at chosen moments",
    "python scripts/kill_check.py": "takes minutes; tests/distributed/test_killed.py kills at chosen moments",
    "python scripts/recipe_keys.py": "writes into the repository; tests/config/test_reference.py compares the page",
    "source .venv/bin/activate": "there is no .venv in the folder of this test",
    "sha256sum": "checks a file that is downloaded",
    "fusedlm compare recipes/experiments/ultra-cpu.yaml --report-only": "reports runs of the line before, not run here",
    "fusedlm train recipes/shakespeare.yaml": "needs a GPU with a compiler and downloaded text",
}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("fusedlm", "make", "git", "curl", "pip", "python", "source", "sha256sum", "printf", "cp", "mkdir")


@dataclass(frozen=True)
class Block:
    """language: python, sh, or none of them. line: of the page."""

    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    """All code blocks of a page, fenced or indented, in order."""
    found = []
    for match in _FENCE.finditer(text):
        found.append(Block(match[1], match[2], text.count("\n", 0, match.start()) + 1))
    rest = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for number, line in enumerate(rest.splitlines(), 1):
        if line.startswith("    ") and line.strip():
            found.append(Block("indented", line[4:], number))
    return sorted(found, key=lambda block: block.line)


def commands(block: Block) -> list[str]:
    """The commands of a block, without prompts and explanations."""
    if block.language not in ("sh", "indented"):
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    prompted = [line.removeprefix("$ ") for line in lines]
    plain = [re.split(r"\s\s+|\s#\s", line.strip())[0] for line in prompted]
    return [line for line in plain if line.split(" ")[0] in _PROGRAMS]


def arguments(command: str) -> list[str]:
    """Those that the test gives to fusedlm."""
    prefix = max((prefix for prefix in APPENDED if command.startswith(prefix)), key=len, default=None)
    return [*shlex.split(command)[1:], *APPENDED.get(prefix, ())]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder as a clone looks to a reader, with a run in runs/demo."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "benchmarks", "README.md"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "speeches").mkdir()
    for i in range(24):
        text = " ".join(f"My fellow citizens, speech {i} says that {i} times {j} makes {i * j}." for j in range(8))
        (folder / f"speeches/{i}.txt").write_text(text)
    sentences = [
        f"In the year {1800 + i} the state of the Union was {'good' if i % 3 else 'sound'}." for i in range(150)
    ]
    (folder / "long.txt").write_text(" ".join(sentences))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys.modules["fusedlm.cli.train"], "_SAMPLE_TOKENS", 4, raising=False)
        assert main(["train", "recipes/demo.yaml", *SMALL, "--out", "runs/demo"]) == 0
        yield folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, trained: Path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    namespace = {}
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}:{block.line}"
        if block.language == "python":
            exec(compile(block.text, where, "exec"), namespace)
        for command in commands(block):
            if any(command.startswith(prefix) for prefix in NOT_RUN):
                continue
            if command.startswith("fusedlm"):
                code = main(arguments(command))
                assert code == 0, f"{where}: {command}\n{capsys.readouterr().err}"
            else:
                done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
                assert done.returncode == 0, f"{where}: {command}\n{done.stderr}"
    assert not torch.is_inference_mode_enabled()


def test_blocks_say_what_they_are():
    """A block without a language would be neither run nor shown as what it is; placeholders cannot be run."""
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            assert block.language in ("python", "sh", "yaml", "text", "indented"), f"{page.name}:{block.line}"
            for command in commands(block):
                skipped = any(command.startswith(prefix) for prefix in NOT_RUN)
                assert skipped or not re.search(r"\b[A-Z]{3,}\b(?!\.md)", re.sub(r"'.*?'|\".*?\"", "", command)), (
                    f"{page.name}:{block.line}: {command}"
                )


def test_the_tables_have_no_entry_that_nothing_needs():
    written = [command for page in PAGES for block in blocks(page.read_text("utf-8")) for command in commands(block)]
    unused = [prefix for prefix in (*NOT_RUN, *APPENDED) if not any(one.startswith(prefix) for one in written)]
    assert unused == []
    assert len(written) > 30


def test_make_targets_exist_and_the_demo_is_that_of_the_tutorial():
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    pages = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
    found = [command for text in pages.values() for block in blocks(text) for command in commands(block)]
    named = {command.split()[1] for command in found if command.startswith("make ")}
    assert {"demo", "test"} <= named <= targets
    recipe = makefile.partition("\ndemo:")[2].partition("\n\n")[0]
    demo = re.findall(r"^\t\.venv/bin/(fusedlm .+)$", recipe, re.MULTILINE)
    assert len(demo) == 3 and all(command in pages["tutorial.md"] for command in demo)


def test_collected_blocks():
    page = "Text\n\n```sh\nfusedlm a b  # why\nprintf 'x' > y\n```\n\n    $ fusedlm c      explains\n    out\n\n"
    page += "```text\nmake\n```\n"
    found = blocks(page)
    assert [(block.language, block.line) for block in found] == [
        ("sh", 3),
        ("indented", 8),
        ("indented", 9),
        ("text", 11),
    ]
    assert [commands(block) for block in found] == [["fusedlm a b", "printf 'x' > y"], ["fusedlm c"], [], []]
    assert arguments("fusedlm generate runs/demo --prompt 'a b'")[1:] == [
        "runs/demo",
        "--prompt",
        "a b",
        "--max-tokens",
        "4",
    ]
