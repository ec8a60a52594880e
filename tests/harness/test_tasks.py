"""Tasks from files, without the network, from the command line to the report."""

import json
import shutil

import pytest
import torch

from fusedlm.data.tokenizer import ByteTokenizer
from fusedlm.harness import evaluate_tasks
from fusedlm.harness.tasks import find_tasks
from fusedlm.runs.tasks import add_tasks, read_tasks
from fusedlm.testing import part_model, randomise_
from tests.cli.conftest import finished, fusedlm  # noqa: F401

QUESTIONS = [
    {"query": f"What is {i} and {i}?", "choices": [str(2 * i), str(2 * i + 1), "a longer answer"], "gold": i % 3}
    for i in range(9)
]
CONTINUATIONS = [{"context": f"{i} times {i} is", "continuation": str(i * i)} for i in range(6)]
YAML = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl, validation: questions.jsonl}}
test_split: test
fewshot_split: validation
output_type: generate_until
doc_to_text: "{{query}}\\n"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def _lines(entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "questions.jsonl").write_text(_lines(QUESTIONS))
    (tmp_path / "last_words.jsonl").write_text(_lines(CONTINUATIONS))
    (tmp_path / "own.yaml").write_text(YAML)
    return tmp_path


def test_results_are_those_of_each_choice_alone(files):
    tokenizer = ByteTokenizer()
    model = randomise_(part_model("{type: gdn, n_heads: 2, chunk_size: 8}", vocab_size=257)).eval()
    options = {"max_length": 200, "device": torch.device("cpu"), "dtype": torch.float32}
    names = [str(files / name) for name in ("questions.jsonl", "last_words.jsonl")]
    results, samples = evaluate_tasks(model, tokenizer, names, n_shots=2, limit=7, **options)
    assert [(r.task, r.n_samples, r.n_shots) for r in results] == [("questions", 7, 2), ("last_words", 6, 2)]

    def nll(context, continuation):
        ids = [tokenizer.eot_id, *tokenizer.encode(context)]
        own = tokenizer.encode(continuation)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids + own])).logits[0].double().log_softmax(-1)
        return sum(logprobs[len(ids) - 1 + i, token].item() for i, token in enumerate(own))

    right = 0
    for sample in samples["questions"]:
        values = [nll(*arguments) for arguments in sample["arguments"]]
        assert [response[0] for response in sample["filtered_resps"]] == pytest.approx(values, abs=1e-3)
        assert sample["arguments"][0][0].count("What is") == 3  # with two examples
        right += max(range(3), key=values.__getitem__) == sample["doc"]["gold"]
    metrics = results[0].metrics
    assert metrics["acc"] == pytest.approx(right / 7) and "acc_norm" in metrics
    p = metrics["acc"]
    assert metrics["acc_stderr"] == pytest.approx((p * (1 - p) / 6) ** 0.5)


def test_the_command_writes_results_and_report(files, finished, tmp_path, fusedlm):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(finished / "runs/small", run)
    names = ",".join(str(files / name) for name in ("questions.jsonl", "own.yaml"))
    for _ in range(2):
        found = fusedlm("eval", run, "--tasks", names, "--window", 120, "--shots", 1, "--limit", 4)
        assert found.code == 0 and found.err == "", found.err
    assert "questions" in found.out and "exact_match" in found.out and "±" in found.out
    entries = read_tasks(run)
    assert [(e["task"], e["samples"], e["shots"]) for e in entries] == [("questions", 4, 1), ("own", 4, 1)]
    assert entries[0]["max_length"] == 120 and entries[0]["checkpoint"] == 2
    page = (run / "report.html").read_text()
    assert "<h2>Tasks</h2>" in page and f"{entries[0]['metrics']['acc']:.4f}" in page
    assert fusedlm("eval", run, "--tasks", files / "last_words.jsonl", "--json", "--window", 64).code == 0
    assert len(read_tasks(run)) == 3


def test_what_is_refused(files, finished, fusedlm, monkeypatch):  # noqa: F811
    import lm_eval.tasks

    # Its own tasks, whose thousands of files take seconds to read, are not needed to refuse a name.
    manager = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: manager(include_defaults=False))
    (files / "odd.jsonl").write_text('{"query": "x", "choices": ["a"], "gold": 1}\n')
    (files / "empty.jsonl").write_text("")
    (files / "mixed.jsonl").write_text(_lines([QUESTIONS[0], CONTINUATIONS[0]]))
    (files / "bad.yaml").write_text("task: [")
    (files / "tags.yaml").write_text("task: x\nf: !function utils.f\n")
    (files / "broken.yaml").write_text("task: x\noutput_type: multiple_choice\ndataset_path: nowhere/none\n")
    run = finished / "runs/small"
    for arguments, said in (
        (["--tasks", files / "odd.jsonl"], "odd.jsonl line 1: gold=1 must be the index of one of 1 choices"),
        (["--tasks", files / "empty.jsonl"], "holds no question"),
        (["--tasks", files / "mixed.jsonl"], "line 2: other keys than in the lines before"),
        (["--tasks", files / "none.jsonl"], "No such file or directory"),
        (["--tasks", files / "bad.yaml"], "not YAML"),
        (["--tasks", files / "tags.yaml"], "not YAML without tags"),
        (["--tasks", files / "broken.yaml"], "cannot be loaded"),
        (["--tasks", "no_such_task"], "lm-eval has no task of this name"),
        (["--tasks", "arc_easy,arc_easy"], "given twice"),
        (["--tasks", files / "questions.jsonl", "--probe", "mqar"], "--probe is not an option of --tasks"),
        (["--shots", 2], "--shots is an option of --tasks"),
        (["--tasks", files / "questions.jsonl", "--limit", 0], "--limit 0: must be at least 1"),
        (["--tasks", files / "questions.jsonl", "--window", 1], "--window 1: must be at least 2"),
    ):
        found = fusedlm("eval", run, *arguments)
        assert found.code == 2 and said in found.err and found.err.count("\n") == 1, (arguments, found)


def test_a_damaged_file_of_results_is_named(tmp_path):
    entry = {"task": "x", "checkpoint": 1, "weights": "raw", "samples": 2, "shots": 0, "limit": None}
    entry["metrics"] = {"acc": 1}
    add_tasks(tmp_path, [entry])
    add_tasks(tmp_path, [entry | {"metrics": {"acc": 0}}, entry | {"limit": 3}])
    assert [e["metrics"]["acc"] for e in read_tasks(tmp_path)] == [0, 1]
    for text in ("{", "{}", "[1]", '[{"task": "x"}]'):
        (tmp_path / "tasks.json").write_text(text)
        with pytest.raises(ValueError, match=r"tasks\.json: not .*; remove the file"):
            read_tasks(tmp_path)


def test_find_tasks_leaves_names_alone(files):
    assert find_tasks(["hellaswag"]) == ["hellaswag"]
    task = find_tasks([str(files / "own.yaml")])[0]
    assert task["dataset_kwargs"]["data_files"]["test"] == str(files / "questions.jsonl")
