"""benchmarks/quantization.py on a tiny run, and the table of docs/quantization.md that its records become."""

import json
import shutil

import pytest

from benchmarks import corrections, quantization
from fusedlm.train import train
from scripts.golf_section import golf_section
from scripts.quantization_section import PAGE, RECORDS, read_records, replaced, table
from tests.train.runs import tiny_recipe

KEEP = ["train.steps=3", "train.eval_every=0", "train.checkpoint_every=0"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(tiny_recipe(folder, *KEEP), folder / "plain")
    train(tiny_recipe(folder, *KEEP, "train.qat={bits: 3, start: 0.3}"), folder / "qat3")
    return folder


def _run(monkeypatch, runs, *arguments):
    out = runs / "record.json"
    command = ["quantization.py", str(runs / "plain"), "--out", str(out), "--device", "cpu", "--tokens", "32"]
    monkeypatch.setattr("sys.argv", [*command, "--eval-tokens", "60", *arguments])
    quantization.main()
    return json.loads(out.read_text())


def test_results_are_kept_and_become_a_table(runs, monkeypatch, capsys):
    chosen = {key: quantization.VARIANTS[key] for key in ("plain", "gptq", "gptq, mixed", "qat, plain")}
    monkeypatch.setattr(quantization, "VARIANTS", chosen)
    record = _run(monkeypatch, runs, "--bits", "3", "--qat", f"3={runs / 'qat3'}", "--note", "A note.")
    results = record["results"]
    expected = ["float", "embeddings alone", "int3 plain", "int3 gptq", "int3 gptq, mixed", "int3 qat, float"]
    assert list(results) == [*expected, "int3 qat, plain"]
    assert results["int3 gptq, mixed"]["tensor_bytes"] <= results["int3 gptq"]["tensor_bytes"]
    assert len({result["bpb"] for result in results.values()}) == 7
    capsys.readouterr()
    assert _run(monkeypatch, runs, "--bits", "3", "--note", "A note.")["results"] == results
    assert capsys.readouterr().out == ""  # nothing is computed again
    lines = table(record).splitlines()
    assert lines[:2] == ["| method | int3 |", "|---|---|"] and lines[-1].endswith(" scored. A note.")
    gain = results["int3 gptq"]["bpb"] - results["float"]["bpb"]
    assert f"| gptq | {gain:+.4f} |" in lines
    with pytest.raises(SystemExit):
        _run(monkeypatch, runs, "--tokens", "64")
    assert "holds results of tiny" in capsys.readouterr().err
    shutil.copytree(runs / "plain", runs / "other")
    (runs / "record.json").unlink()
    with pytest.raises(SystemExit):
        _run(monkeypatch, runs, "--bits", "3", "--qat", f"3={runs / 'other'}")
    assert "the run was not trained with train.qat.bits=3" in capsys.readouterr().err


def test_files_replace_the_text_of_the_run_and_artifacts_are_measured(runs, monkeypatch, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("First one.\nIn two lines.\n<|endoftext|>\n" + "Too long. " * 30 + "\n<|endoftext|>\nThird.\n")
    monkeypatch.setattr(quantization, "_SMALLEST_DOCUMENT", 1)
    arguments = ["--text", text, "--calibration", text, "--text-bytes", 40, "--inputs", tmp_path / "inputs.pt"]
    monkeypatch.setattr(
        "sys.argv",
        ["quantization.py", str(runs / "plain"), "--out", str(tmp_path / "files.json"), "--device", "cpu", "--tokens"]
        + ["64", "--bits", "4", "--only", "plain", "gptq", "--packed", "--coded", "20000", *map(str, arguments)],
    )
    quantization.main()
    record = json.loads((tmp_path / "files.json").read_text())
    settings, results = record["settings"], record["results"]
    # The first and the third document, without the line ends around them.
    assert settings["documents"] == 2 and settings["scored_bytes"] == len("First one.\nIn two lines.") + len("Third.")
    assert list(results) == ["float", "embeddings alone", "int4 plain", "int4 gptq", "coded 20000"]
    coded = results["coded 20000"]
    assert 0.9 * coded["entropy_bytes"] < coded["code_bytes"] < coded["file_bytes"]
    assert coded["file_bytes"] == coded["code_bytes"] + sum(
        size for part, size in coded["part_bytes"].items() if part != "states"
    )
    assert "2 whole documents of text.txt, 30 bytes, scored." in table(record)
    page = golf_section(record, None)
    assert f"| coded, 20,000 bytes | {coded['bpb']:.4f} |" in page and f"| {coded['file_bytes']:,} |" in page

    command = ["corrections.py", str(runs / "plain"), "--inputs", str(tmp_path / "inputs.pt"), "--rank", "1"]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(tmp_path / "corrections.json")])
    corrections.main()
    found = json.loads((tmp_path / "corrections.json").read_text())
    assert 0 < found["mean"]["removed"] < 1 and found["mean"]["entropy"] > 2
    assert f"a correction of rank 1 removes {found['mean']['removed']:.1%}" in golf_section(record, found)
    monkeypatch.setattr("sys.argv", [*command, "--out", "x", "--only", "nothing"])
    with pytest.raises(SystemExit):
        corrections.main()
    assert "--only nothing: no matrix has one of these" in capsys.readouterr().err


def test_the_page_has_the_tables_of_the_records():
    page = PAGE.read_text(encoding="utf-8")
    assert replaced(page, read_records(RECORDS)) == page, "python scripts/quantization_section.py"
