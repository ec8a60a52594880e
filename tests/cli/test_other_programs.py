"""Models of other programs are scored, continued and served where they are; commands on runs name the way to one."""

import json
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import yaml

from fusedlm.export.load import is_foreign

RUN = "runs/small"
OPTIONS = ("--prompt", "Document", "--max-tokens", 12, "--temperature", 0)


@pytest.fixture
def plain(fusedlm, workspace) -> str:
    """A run of a class that Transformers and llama.cpp have."""
    recipe = yaml.safe_load(Path("small.yaml").read_text())
    recipe["name"] = "plain"
    recipe["model"]["pattern"] = "a"
    attention = {"type": "attention", "n_heads": 2, "qk_norm": False}
    recipe["model"]["blocks"] = {"a": {"mixer": attention, "ffn": {"type": "swiglu"}}}
    recipe["data"]["tokenizer"] = {"type": "bpe", "vocab_size": 300}
    Path("plain.yaml").write_text(yaml.safe_dump(recipe))
    assert fusedlm("train", "plain.yaml").code == 0
    return "runs/plain"


def _bpb(fusedlm, model, *options) -> float:
    outcome = fusedlm("eval", model, *options, "--json")
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)["bpb"]


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_what_other_programs_read_is_read_where_it_is(fusedlm, plain, to):
    pytest.importorskip("gguf")
    assert fusedlm("export", plain, "--to", to, "--family", "llama", "exported").code == 0
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("exported*")}
    assert is_foreign(Path("exported")) and not is_foreign(Path(plain)) and not is_foreign(Path("nowhere"))
    assert fusedlm("generate", "exported", *OPTIONS).out == fusedlm("generate", plain, *OPTIONS).out
    text = ("--text", "text.txt")
    assert _bpb(fusedlm, "exported", *text) == pytest.approx(_bpb(fusedlm, plain, *text), rel=1e-5)
    narrow = _bpb(fusedlm, "exported", *text, "runtime.dtype=bfloat16")
    assert narrow != _bpb(fusedlm, "exported", *text) and narrow == pytest.approx(_bpb(fusedlm, plain, *text), rel=0.02)
    if to == "hf":  # our own folders name the text of the run
        assert _bpb(fusedlm, "exported") == pytest.approx(_bpb(fusedlm, plain), rel=1e-5)
    else:
        outcome = fusedlm("eval", "exported")
        assert outcome.code == 2 and outcome.err.count("\n") == 1 and "--text FILE" in outcome.err
    assert before == {path: path.stat().st_mtime_ns for path in Path().rglob("exported*")}


def test_a_folder_with_code_is_served(fusedlm, workspace):
    pytest.importorskip("uvicorn")
    assert fusedlm("export", RUN, "--to", "hf-code", "exported").code == 0
    Path("exported/chat_template.jinja").write_text("{{ messages[0].content }}")
    command = [sys.executable, "-m", "fusedlm", "serve", "exported", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        assert line.startswith("serving exported at http://127.0.0.1:"), server.communicate()
        url = line.split()[3].removesuffix(",")
        body = {"prompt": "Document", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        answer = json.load(urlopen(Request(f"{url}/v1/completions", json.dumps(body).encode()), timeout=60))
        alone = fusedlm("generate", RUN, "--prompt", "Document", "--max-tokens", 6, "--temperature", 0).out
        assert alone.startswith("Document" + answer["choices"][0]["text"])
        assert json.load(urlopen(f"{url}/v1/models", timeout=60))["data"][0]["chat"] is True
    finally:
        server.kill()
        server.communicate()


@pytest.mark.parametrize(
    "arguments,words",
    [
        ("eval exported --checkpoint best", "exported is no run and has one checkpoint and its weights"),
        ("generate exported --prompt a --weights ema", "leave out weights 'ema'"),
        ("eval exported train.steps=2", "train.steps"),
        ("eval exported --probe needle --text text.txt", "fusedlm import exported RUN"),
        ("quantize exported --format int4 --out q", "make one with: fusedlm import exported RUN"),
        ("quantize half.gguf --format int4 --out q", "half.gguf holds no run: it is a file"),
        ("export half.gguf --to hf-code other", "half.gguf holds no run: it is a file"),
        ("eval damaged --text text.txt", "damaged/config.json"),
        ("eval half.gguf --text text.txt", "half.gguf: damaged"),
    ],
)
def test_what_is_refused(fusedlm, workspace, arguments, words):
    assert fusedlm("export", RUN, "--to", "hf-code", "exported").code == 0
    Path("damaged").mkdir()
    Path("damaged/config.json").write_text("{")
    Path("half.gguf").write_bytes(b"GGUF")
    outcome = fusedlm(*arguments.split())
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and words in outcome.err, outcome
