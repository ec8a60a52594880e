"""benchmarks/lengths.py with measured steps replaced, and the section of docs/results.md that its records become."""

import json

import pytest
import torch

from benchmarks import lengths
from scripts.lengths_section import PLOT, draw_lengths, lengths_section

RECIPE = "recipes/gpt-350m.yaml"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function of arguments that gives the record. Steps of 64 tokens do not fit at all, of 32 only recomputed."""
    recipes = []

    def measure(recipe, **_):
        recipes.append(recipe)
        n, recompute = recipe.train.seq_len, recipe.runtime.recompute
        if n == 64 or (n == 32 and recompute == "none"):
            raise torch.OutOfMemoryError
        return dict.fromkeys(lengths.KEPT, 1.0) | {"tokens_per_second": 1000.0 * n, "parameters": 3_000_000}

    def run(*arguments):
        out = tmp_path / "record.json"
        monkeypatch.setattr("sys.argv", ["benchmarks/lengths.py", RECIPE, *arguments, "--out", str(out)])
        monkeypatch.setattr(lengths, "measure", measure)
        lengths.main()
        return json.loads(out.read_text(encoding="utf-8")), recipes

    return run


def test_rows_of_each_mixer_and_length(run):
    record, recipes = run("--mixers", "gdn", "recipe", "--lengths", "16", "32", "64", "--tokens", "32")
    found = [(r["mixer"], r["length"], r["recompute"], r.get("reason")) for r in record["rows"]]
    of_each = [(16, "none", None), (32, "mixer", None), (64, "mixer", "out of memory")]
    assert found == [(mixer, *rest) for mixer in ("gdn", "recipe") for rest in of_each]
    first = recipes[0]
    assert first.model.blocks["a"].mixer.type == "gdn" and recipes[-1].model.blocks["a"].mixer.type == "attention"
    assert (first.train.micro_batch_size, recipes[1].train.micro_batch_size) == (2, 1)  # 32 tokens, or one sequence
    assert record["command"].startswith(f"python benchmarks/lengths.py {RECIPE} --mixers gdn recipe")


def test_every_mixer_has_options_of_the_recipe(run):
    record, recipes = run("--lengths", "16", "--tokens", "16")
    assert [r["mixer"] for r in record["rows"]] == [recipe.model.blocks["a"].mixer.type for recipe in recipes]
    assert {r["mixer"] for r in record["rows"]} == {
        *("attention", "mla", "diff_mla", "cmd_mla", "gdn", "mamba2", "sdla")
    }


def test_unknown_mixers_are_named(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--mixers", "gnd")
    assert stop.value.code == 2 and "unknown mixer gnd; one of attention, mla" in capsys.readouterr().err


def test_records_become_a_section_and_a_plot(run, tmp_path):
    record, _ = run("--mixers", "gdn", "recipe", "--lengths", "16", "32", "64", "--tokens", "32")
    record["note"] = "Made elsewhere."
    page = lengths_section([record, record])
    assert page.count("\nMade elsewhere.\n") == 1
    assert f"    {record['command']}\n" in page and f"images/{PLOT}" in page
    assert "| mixer | parameters | 16 | 32 | 64 |" in page
    assert "| gdn | 3 M | 16,000 | 32,000* | out of memory |" in page
    assert "| gpt-350m | 3 M | 16,000 | 32,000* | out of memory |" in page
    later = json.loads(json.dumps(record))
    later["environment"]["date"], later["rows"] = "9999-01-01", [record["rows"][0] | {"tokens_per_second": 7.0}]
    assert "| gdn | 3 M | 7 | 32,000* |" in lengths_section([later, record])
    draw_lengths([record], tmp_path)
    assert (tmp_path / PLOT).stat().st_size > 10_000
    assert lengths_section([]) == ""
