"""fusedlm generate with a file of prompts."""

import json
from pathlib import Path

import pytest

import fusedlm as package

RUN = "runs/small"
PROMPTS = ["Document 3", "", "It says — naïvely — that", "two\nlines"]
GREEDY = ("--max-tokens", 8, "--temperature", 0)


def _results(outcome) -> list[dict]:
    assert (outcome.code, outcome.err) == (0, "")
    return [json.loads(line) for line in outcome.out.splitlines()]


@pytest.fixture
def alone(workspace: Path):
    model, tokenizer, _ = package.load(RUN, device="cpu")
    return [package.generate(model, tokenizer, one, max_tokens=8, temperature=0) for one in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_json_lines_give_results_in_order(workspace: Path, fusedlm, alone, batch_size):
    lines = [json.dumps(PROMPTS[0]), *(json.dumps({"prompt": one, "id": 1}) for one in PROMPTS[1:])]
    Path("prompts.jsonl").write_text("\n".join(lines) + "\n")
    found = _results(fusedlm("generate", RUN, "--prompts", "prompts.jsonl", *GREEDY, "--batch", batch_size))
    assert found == [{"prompt": one, "text": text} for one, text in zip(PROMPTS, alone, strict=True)]


@pytest.mark.parametrize("ending", ["", "\n"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_each_line_of_text_is_a_prompt(workspace: Path, fusedlm, alone, ending, line_end):
    Path("prompts.txt").write_bytes((line_end.join(PROMPTS[:3]) + ending).encode("utf-8-sig"))
    found = _results(fusedlm("generate", RUN, "--prompts", "prompts.txt", *GREEDY))
    assert found == [{"prompt": one, "text": text} for one, text in zip(PROMPTS[:3], alone[:3], strict=True)]


def test_the_seed_of_a_prompt_depends_on_its_line_alone(workspace: Path, fusedlm):
    Path("prompts.txt").write_text("It\n" * 11)
    command = ("generate", RUN, "--prompts", "prompts.txt", "--max-tokens", 24, "--batch-size")
    texts = [_results(fusedlm(*command, n)) for n in (1, 4)]
    assert texts[0] == texts[1] and len({one["text"] for one in texts[0]}) == 11


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"", "p.txt: holds no prompt"),
        ("p.txt", b"a\xff", "p.txt: byte 1 (0xff) is not UTF-8"),
        ("p.txt", b"a\0b", "p.txt: byte 1 is NUL, which is not text"),
        ("p.jsonl", b'"a"\n{"text": "b"}', "p.jsonl: line 2: must be a string, or an object"),
        ("p.jsonl", b'"a"\n\n"b"', "p.jsonl: line 2: not JSON"),
        ("p.jsonl", b"[" * 99999, "p.jsonl: line 1: not JSON"),
        ("p.jsonl", b'"\\ud800"', "prompt 0 is not valid Unicode"),
        (None, b"", "p.txt: No such file"),
    ],
)
def test_bad_prompts_are_one_line(workspace: Path, fusedlm, name, content, words):
    if name:
        Path(name).write_bytes(content)
    outcome = fusedlm("generate", RUN, "--prompts", name or "p.txt")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert words in outcome.err


@pytest.mark.parametrize("options", [(), ("--prompt", "a", "--prompts", "p.txt")])
def test_one_of_prompt_and_prompts_is_needed(workspace: Path, fusedlm, options):
    outcome = fusedlm("generate", RUN, *options)
    assert (outcome.code, outcome.err) == (2, "error: give either --prompt TEXT or --prompts FILE\n")


def test_a_graph_that_cannot_be_captured_is_one_line(workspace: Path, fusedlm):
    outcome = fusedlm("generate", RUN, "--prompt", "a", "--cuda-graph", "--device", "cpu")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == (
        "error: cuda_graph=True: needs a CUDA device, not cpu; leave it out to decode without a graph\n"
    )
    outcome = fusedlm("generate", RUN, "--prompt", "a", "--compile", "--device", "cpu")
    assert (outcome.code, outcome.out) == (2, "") and outcome.err.startswith("error: compile=True: needs a CUDA device")
    assert fusedlm("generate", RUN, "--prompt", "a", "--no-cuda-graph", "--device", "cpu").code == 0


@pytest.mark.parametrize("batch", ["0", "-3", "2.5", "many"])
def test_a_batch_is_a_positive_integer(workspace: Path, fusedlm, batch):
    Path("prompts.txt").write_text("It\n")
    outcome = fusedlm("generate", RUN, "--prompts", "prompts.txt", f"--batch={batch}")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert batch in outcome.err
