"""Wrong arguments, bad files and full disks: one line that names the cause, exit code 2, and no file lost."""

import gzip
import hashlib
import lzma
import resource
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard

from fusedlm.data.tokenizer import train_bpe

RUN = "runs/small"
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")

CASES = []


def case(name: str, named: str, *marks):
    """Register a function that damages the working directory and returns arguments; the error must contain `named`."""

    def register(function):
        CASES.append(pytest.param(function, named, id=name, marks=marks))
        return function

    return register


def arguments(name: str, line: str, named: str, *marks):
    """The same without damage; {run} is the finished run."""
    CASES.append(pytest.param(lambda: line.format(run=RUN).split(" "), named, id=name, marks=marks))


def recipe(name: str, old: str, new: str, named: str):
    """The same with a change to the text of small.yaml."""

    def damage():
        text = Path("small.yaml").read_text()
        assert old in text
        Path("bad.yaml").write_text(text.replace(old, new))
        return ["train", "bad.yaml", "--out", "new"]

    CASES.append(pytest.param(damage, named, id=f"recipe-{name}"))


def source(name: str, config: str, named: str, **files: bytes):
    """Training on a source whose files, by extension file.EXT, have these bytes."""

    def damage():
        for extension, content in files.items():
            Path(f"file.{extension.replace('_', '.')}").write_bytes(content)
        return ["train", "small.yaml", f"data.source={config}", "--out", "new"]

    CASES.append(pytest.param(damage, named, id=f"data-{name}"))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def prepared(pattern: str) -> Path:
    return next(Path("prepared").glob(f"*/{pattern}"))


def mixture(name: str, named: str, *overrides: str):
    """Training on two sources, a of text.txt and b of other.txt."""

    def damage():
        Path("other.txt").write_text("---\n".join(f"Other text {i}, as long as the first one.\n" for i in range(20)))
        a, b = (f"{{source: {{type: text, path: {name}.txt, separator: '---'}}}}" for name in ("text", "other"))
        given = f"data.sources={{a: {a}, b: {b}}}"
        return ["train", "small.yaml", "data.source=null", given, *overrides, "--out", "new"]

    CASES.append(pytest.param(damage, named, id=f"mixture-{name}"))


# Recipes
arguments("recipe-missing", "train none.yaml", "none.yaml")
arguments("recipe-is-a-folder", "train runs", "runs")
recipe("unknown-key", "seq_len: 16", "seq_length: 16", "train.seq_length: unknown key; did you mean 'seq_len'")
recipe("wrong-type", "dim: 16", "dim: sixteen", "model.dim: got 'sixteen'")
recipe("impossible-heads", "dim: 16", "dim: 17", "n_heads=2 does not divide dim=17")
recipe("unknown-mixer", "type: gdn", "type: lstm", "'lstm'")
recipe("unknown-block", "pattern: gm", "pattern: gx", "'x'")
recipe("missing-section", "train:", "# train:", "train: required")
recipe("key-twice", "name: small", "name: small\nname: large", "'name' is given twice")
recipe("truncated", "kv_rank: 8, rope_dim: 4}", "kv_rank: 8, ro", "YAML line")
recipe("name-with-slash", "name: small", "name: a/b", "'a/b'")
recipe("zero-steps", "steps: 2", "steps: 0", "train.steps: got 0")
recipe("nan-rate", "steps: 2", "steps: 2, optimizer: {type: adamw, lr: .nan}", "train.optimizer.lr: got nan")


@case("recipe-binary", "bad.yaml")
def _():
    Path("bad.yaml").write_bytes(bytes(range(256)))
    return ["train", "bad.yaml"]


@case("recipe-empty", "bad.yaml")
def _():
    Path("bad.yaml").touch()
    return ["plan", "bad.yaml"]


arguments("override-without-value", "train small.yaml train.steps", "'train.steps'")
arguments("override-unknown", "plan small.yaml model.dims=32", "did you mean 'dim'")
arguments("override-ill-typed", "data prepare small.yaml data.shard_tokens=many", "'many'")
arguments("no-vocabulary", "plan small.yaml data.tokenizer={{type:\u00a0file}}", "data.tokenizer")

# Several sources
mixture("and-a-source", "give exactly one of the two", "data.source={type: sotu}")
mixture("missing-file", "none.txt", "data.sources.a.source.path=none.txt")
mixture("unknown-name", "stages.0.weights.c: no such source; known: a, b", "data.stages=[{weights: {c: 1}}]")
mixture("two-weights", "sources.a.weight=2", "data.sources.a.weight=2", "data.stages=[{weights: {a: 1, b: 1}}]")
mixture("boundary", "of 64 tokens must be", "data.stages=[{until: 1.0e-9, weights: {a: 1}}, {weights: {b: 1}}]")
mixture("epochs", "the run would read a 0.", "data.sources.a.max_epochs=0.001")
mixture("too-short", "data.sources.a: seq_len=4096 is longer than the text", "train.seq_len=4096")
mixture("name-of-a-source", "must be letters, digits", "data.sources={a/b: {source: {type: sotu}}}")
mixture("packing", "data.packing: got 'tight'", "data.packing=tight")

# Data
source("missing", "{type: text, path: none.txt}", "none.txt")
source("no-match", "{type: text, path: 'none/*.txt'}", "none/*.txt")
source("empty-file", "{type: text, path: file.txt}", "file.txt", txt=b"")
source("white-space", "{type: text, path: file.txt}", "file.txt", txt=b" \n\n")
source("not-utf8", "{type: text, path: file.txt}", "file.txt", txt=b"caf\xe9 " * 50)
source("binary", "{type: text, path: file.txt}", "file.txt", txt=bytes(range(256)) * 20)
source("one-document", "{type: text, path: file.txt}", "file.txt", txt=b"a single document " * 20)
source(
    "truncated-gz",
    "{type: text, path: file.txt.gz}",
    "file.txt.gz",
    txt_gz=gzip.compress(bytes(range(97, 123)) * 99)[:-9],
)
source("damaged-xz", "{type: text, path: file.txt.xz}", "file.txt.xz", txt_xz=lzma.compress(b"text " * 99)[:-20])
source("empty-zst", "{type: text, path: file.txt.zst}", "file.txt.zst", txt_zst=b"")
source(
    "truncated-zst",
    "{type: text, path: file.txt.zst}",
    "file.txt.zst",
    txt_zst=zstandard.compress(bytes(i * i % 127 for i in range(999)))[:-50],
)
source("not-gzip", "{type: text, path: file.txt.gz}", "file.txt.gz", txt_gz=b"plain text")
source("separator", '{type: text, path: text.txt, separator: "a\\nb"}', "'a\\nb'")
source("broken-jsonl", "{type: jsonl, path: file.jsonl}", "file.jsonl", jsonl=b'{"text": "a b c"}\n{"text": "d')
source("jsonl-without-field", "{type: jsonl, path: file.jsonl}", "'text'", jsonl=b'{"body": "a"}\n')
source("jsonl-field-not-text", "{type: jsonl, path: file.jsonl}", "file.jsonl", jsonl=b'{"text": 3}\n')
source("not-parquet", "{type: parquet, path: file.parquet}", "file.parquet", parquet=b"PAR1 and no more")


@case("data-parquet-without-column", "'body'")
def _():
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), "file.parquet")
    return ["train", "small.yaml", "data.source={type: parquet, path: file.parquet, column: body}", "--out", "new"]


@case("data-empty-folder", "empty")
def _():
    Path("empty").mkdir()
    return ["data", "prepare", "small.yaml", "data.source.path=empty"]


@case("tokenizer-missing", "none.json")
def _():
    return ["train", "small.yaml", "data.tokenizer={type: file, path: none.json}", "--out", "new"]


@case("tokenizer-not-json", "tokenizer.json")
def _():
    Path("tokenizer.json").write_text("{")
    return ["plan", "small.yaml", "data.tokenizer={type: file, path: tokenizer.json}"]


@case("tokenizer-damaged", "tokenizer.json")
def _():
    Path("tokenizer.json").write_text("{}")
    return ["train", "small.yaml", "data.tokenizer={type: file, path: tokenizer.json}", "--out", "new"]


@case("sequence-longer-than-text", "100000")
def _():
    return ["train", "small.yaml", "train.seq_len=100000", "--out", "new"]


@case("shard-flipped", "prepared")
def _():
    flip_byte(prepared("train*.bin"))
    return ["train", "small.yaml", "--out", "new"]


@case("shard-truncated", "prepared")
def _():
    cut_in_half(prepared("validation*.bin"))
    return ["eval", RUN]


@case("shard-missing", "prepared")
def _():
    prepared("train*.bin").unlink()
    return ["data", "prepare", "small.yaml"]


@case("manifest-truncated", "manifest.json")
def _():
    cut_in_half(prepared("manifest.json"))
    return ["train", "small.yaml", "--out", "new"]


# Runs and checkpoints
arguments("no-run", "eval runs/none", "runs/none")
arguments("no-run-to-consolidate", "checkpoint consolidate runs/none", "runs/none holds no run")
arguments("consolidate-no-step", "checkpoint consolidate {run} --checkpoint 7", "has no checkpoint 7")
arguments("consolidate-no-name", "checkpoint consolidate {run} --checkpoint first", "'first' is not last")
arguments("no-run-to-report", "report runs/none", "runs/none")
arguments("no-run-to-generate", "generate runs/none --prompt a", "runs/none")
arguments("run-is-a-file", "report small.yaml", "small.yaml")
arguments("run-already-there", "train small.yaml", RUN)
arguments("resume-with-other-recipe", "train small.yaml model.n_layers=1 --resume", "model.n_layers")
arguments("resume-with-fewer-steps", "train small.yaml train.steps=1 --resume", "train.steps=1")
arguments("no-such-checkpoint", "eval {run} --checkpoint 99", "99")
arguments("checkpoint-name", "eval {run} --checkpoint newest", "'newest'")
arguments("no-average", "eval {run} --weights ema", "ema")
arguments("no-mean", "generate {run} --prompt a --weights swa", "has no swa weights; train with train.swa")
arguments("weights-name", "generate {run} --prompt a --weights model", "'model'")
arguments("widths", "probe coordinates small.yaml --widths 16,wide", "'16,wide'")
arguments("one-width", "probe coordinates small.yaml --widths 16", "widths=[16]")
arguments("no-vocabulary", "probe coordinates small.yaml --widths 16,32 --vocab-size 0", "vocab_size=0")


def checkpoints() -> list[Path]:
    return sorted(Path(RUN, "checkpoints").iterdir())


@case("checkpoint-flipped", "step-00000001")
def _():
    flip_byte(checkpoints()[0] / "model.safetensors")
    return ["eval", RUN, "--checkpoint", "1"]


@case("checkpoint-truncated", "step-00000002")
def _():
    cut_in_half(checkpoints()[-1] / "model.safetensors")
    return ["generate", RUN, "--prompt", "a", "--checkpoint", "2"]


@case("checkpoint-without-manifest", "step-00000001")
def _():
    (checkpoints()[0] / "manifest.json").unlink()
    return ["eval", RUN, "--checkpoint", "1"]


@case("every-checkpoint-damaged", "step-00000001")
def _():
    for checkpoint in checkpoints():
        flip_byte(checkpoint / "model.safetensors")
    return ["eval", RUN]


@case("no-checkpoint", RUN)
def _():
    shutil.rmtree(Path(RUN, "checkpoints"))
    return ["eval", RUN]


@case("run-recipe-damaged", "recipe.yaml")
def _():
    cut_in_half(Path(RUN, "recipe.yaml"))
    shutil.rmtree(Path(RUN, "checkpoints"))
    return ["train", "small.yaml", "--resume"]


@case("run-recipe-missing", "recipe.yaml")
def _():
    Path(RUN, "recipe.yaml").unlink()
    return ["train", "small.yaml", "--resume"]


@case("run-tokenizer-missing", RUN)
def _():
    for path in Path(RUN).glob("tokenizer*"):
        path.unlink()
    return ["generate", RUN, "--prompt", "a"]


@case("text-changed-since", "the text has changed")
def _():
    shutil.rmtree("prepared")
    cut_in_half(Path("text.txt"))
    return ["eval", RUN]


@case("text-gone", "give other text to score with --text FILE")
def _():
    shutil.rmtree("prepared")
    Path("text.txt").unlink()
    return ["eval", RUN]


@case("text-gone-for-a-probe", "--text FILE")
def _():
    shutil.rmtree("prepared")
    Path("text.txt").unlink()
    return ["eval", RUN, "--probe", "extend"]


@case("text-changed-before-resuming", "restore the text or start a new run")
def _():
    shutil.rmtree("prepared")
    cut_in_half(Path("text.txt"))
    return ["train", "small.yaml", "train.steps=3", "--resume"]


@case("other-text-named-on-resuming", "the text has changed")
def _():
    Path("other.txt").write_text(Path("text.txt").read_text()[:-40])
    return ["train", "small.yaml", "train.steps=3", "data.source.path=other.txt", "--resume"]


@case("run-tokenizer-of-another-run", "its tokenizer is not the one that the run was trained with")
def _():
    tokenizer = train_bpe(["the text"], 257)
    tokenizer.save(RUN)
    return ["eval", RUN]


@case("text-and-data", "give only one of them")
def _():
    return ["eval", RUN, "--text", "text.txt", "--data", "prepared"]


# Values on the command line
arguments("unknown-command", "trian small.yaml", "'trian'")
arguments("unknown-option", "eval {run} --strid 3", "--strid")
arguments("missing-argument", "train", "RECIPE")
arguments("missing-prompt", "generate {run}", "--prompt")
arguments("missing-value", "eval {run} --window", "--window")
arguments("window-not-a-number", "eval {run} --window wide", "'wide'")
arguments("window-negative", "eval {run} --window -1", "-1")
arguments("stride-zero", "eval {run} --stride 0", "stride=0")
arguments("stride-past-window", "eval {run} --window 4 --stride 5", "stride=5")
arguments("stride-without-window", "eval {run} --window 0 --stride 5", "stride=5")
arguments("text-missing", "eval {run} --text none.txt", "none.txt")
arguments("text-is-a-folder", "eval {run} --text runs", "runs")
arguments("max-tokens", "generate {run} --prompt a --max-tokens 0", "max_tokens=0")
arguments("temperature-negative", "generate {run} --prompt a --temperature -1", "temperature=-1")
arguments("temperature-nan", "generate {run} --prompt a --temperature nan", "temperature=nan")
arguments("speculate", "generate {run} --prompt a --speculate 0", "speculate=0 must be an integer from 1 to 32")
arguments("speculate-text", "generate {run} --prompt a --speculate two", "'two'")
arguments("speculate-without-mtp", "generate {run} --prompt a --speculate 2", "no multi-token prediction to draft with")
arguments("top-k", "generate {run} --prompt a --top-k 0", "top_k=0")
arguments("top-k-not-a-number", "generate {run} --prompt a --top-k few", "'few'")
arguments("top-p", "generate {run} --prompt a --top-p 1.5", "top_p=1.5")
arguments("seed", "generate {run} --prompt a --seed 99999999999999999999", "99999999999999999999")
arguments("prompt-not-unicode", "generate {run} --prompt \udcff", "surrogate")
arguments("device-name", "eval {run} --device tpu", "'tpu'")
arguments("no-cuda", "eval {run} --device cuda", "cuda", NO_CUDA)
arguments("no-cuda-to-train", "train small.yaml runtime.device=cuda --out new", "cuda", NO_CUDA)
arguments(
    "backend-cannot-run",
    "train small.yaml runtime.backends.attention=cudnn --out new",
    "runtime.backends.attention=cudnn",
)
arguments("override-outside-runtime", "eval {run} model.dim=32", "'model.dim=32': only keys of section runtime")
arguments("override-outside-runtime-to-generate", "generate {run} --prompt a train.steps=5", "'train.steps=5'")
arguments("override-outside-runtime-of-a-probe", "eval {run} --probe mqar model.dim=32", "'model.dim=32'")
arguments("override-of-training", "eval {run} runtime.compile=true", "'runtime.compile=true'")
arguments("override-of-training-of-a-probe", "eval {run} --probe mqar runtime.compile=true", "'runtime.compile=true'")
arguments("override-of-the-device", "generate {run} --prompt a runtime.device=cpu", "--device")
arguments("override-dtype", "eval {run} runtime.dtype=int8", "runtime.dtype: got 'int8'")
arguments("override-unknown-op", "eval {run} runtime.backends.attend=reference", "runtime.backends.attend")
arguments("override-unknown-backend", "plan small.yaml runtime.backends.attention=fast", "unknown backend 'fast'")
arguments(
    "override-backend-cannot-run", "eval {run} --device cpu runtime.backends.attention=cudnn", "=cudnn: cannot run"
)
arguments("mfu", "plan small.yaml --mfu 45", "45")
arguments("mfu-not-a-number", "plan small.yaml --mfu half", "'half'")
arguments("device-flops", "plan small.yaml --device-flops -1", "-1")


@case("text-empty", "empty.txt")
def _():
    Path("empty.txt").touch()
    return ["eval", RUN, "--text", "empty.txt"]


@case("text-not-utf8", "latin.txt")
def _():
    Path("latin.txt").write_bytes(b"caf\xe9")
    return ["eval", RUN, "--text", "latin.txt"]


# Folders that cannot be written, disks that are full
arguments("out-unwritable", "train small.yaml --out /proc/new", "/proc/new")
arguments("out-is-a-file", "train small.yaml --out text.txt", "text.txt")
arguments("out-below-a-file", "train small.yaml --out text.txt/new", "text.txt/new")
arguments("prepared-unwritable", "data prepare small.yaml data.dir=/proc/new", "/proc/new")


@pytest.mark.parametrize(("damage", "named"), CASES)
def test_bad_input(damage, named: str, workspace: Path, fusedlm, caplog):
    command = damage()
    before = snapshot(workspace)
    outcome = fusedlm(*command)
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert named in outcome.err
    assert not caplog.records  # a warning would be a second line
    after = snapshot(workspace)
    assert {name: after.get(name) for name in before} == before


@pytest.mark.parametrize(
    ("command", "largest"),
    [
        (["data", "prepare", "small.yaml", "data.dir=fresh"], 512),
        (["train", "small.yaml", "--out", "new"], 4096),
        (["train", "small.yaml", "--resume"], 4096),
        (["report", RUN], 4096),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_full_disk(command, largest: int, workspace: Path, fusedlm):
    """The limit on file sizes makes a write fail, as a full disk does."""
    if "--resume" in command:
        shutil.rmtree(checkpoints()[-1])
    before = snapshot(workspace)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
    try:
        outcome = fusedlm(*command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    after = snapshot(workspace)
    lost = {name for name in before if after.get(name) != before[name]}
    # Resuming removes the records of steps that it recomputes, and writes the environment.
    assert lost <= {f"{RUN}/metrics.jsonl", f"{RUN}/environment.json", f"{RUN}/run.json"}
    assert fusedlm("eval", RUN).code == 0


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
