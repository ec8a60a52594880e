"""Recipes by name: packaged, copied, listed, completed; and the package run as a module."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import fusedlm as package
from fusedlm.config import load_recipe
from fusedlm.config.experiment import load_experiment

REPOSITORY = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (REPOSITORY / "recipes").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (REPOSITORY / "recipes/experiments").glob("*.yaml"))


@pytest.fixture
def empty(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["demo", "demo.yaml"])
def test_a_packaged_recipe_is_found_by_name(empty: Path, fusedlm, name):
    outcome = fusedlm("train", name, "train.steps=77", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert yaml.safe_load(outcome.out.split("\n\n")[0].split("plan of")[0])["train"]["steps"] == 77


def test_a_packaged_experiment_is_found_with_its_base(empty: Path, fusedlm):
    outcome = fusedlm("compare", "ultra-cpu", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "6 runs" in outcome.out and "sdla" in outcome.out


def test_every_command_that_takes_a_recipe_takes_a_name(empty: Path, fusedlm):
    assert fusedlm("plan", "ultra-cpu", "--json").code == 0
    prepared = fusedlm("data", "prepare", "demo", "data.source={type: text, path: absent}")
    assert (prepared.code, "absent" in prepared.err) == (2, True)
    probe = fusedlm("eval", "demo", "--probe", "mqar", "--out", "probes", "--steps", 0)
    assert (probe.code, "steps" in probe.err) == (2, True)


def test_a_file_in_the_working_directory_wins(empty: Path, fusedlm):
    text = (REPOSITORY / "recipes/demo.yaml").read_text()
    Path("demo.yaml").write_text(text.replace("name: demo", "name: copied"))
    assert "name: copied" in fusedlm("train", "demo", "--dry-run").out
    assert "name: copied" in fusedlm("train", "demo.yaml", "--dry-run").out
    Path("demo").write_text(text.replace("name: demo", "name: bare"))
    assert "name: bare" in fusedlm("train", "demo", "--dry-run").out


def test_a_folder_of_the_name_of_a_recipe_does_not_hide_it(empty: Path, fusedlm):
    Path("demo").mkdir()
    assert fusedlm("train", "demo", "--dry-run").code == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "dmeo"], ["recipe dmeo: No such file", "did you mean demo?"]),
        (["train", "zzz"], ["zzz: No such file", "fusedlm recipes lists them"]),
        (["train", "./demo"], ["recipe demo: No such file"]),
        (["compare", "demo"], ["experiment demo: No such file or directory, and no packaged experiment"]),
        (["recipes", "copy", "nothing"], ["nothing: No such file"]),
        (["recipes", "copy", "../demo"], ["../demo: a packaged recipe is NAME"]),
        (["recipes", "copy", "demo", "absent/x.yaml"], ["absent/x.yaml"]),
    ],
)
def test_an_unknown_name_is_one_line(empty: Path, fusedlm, arguments, words):
    outcome = fusedlm(*arguments)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert all(word in outcome.err for word in words), outcome.err


def test_the_list_has_every_recipe_and_what_it_needs(empty: Path, fusedlm):
    outcome = fusedlm("recipes")
    assert outcome.code == 0
    rows = {words[0]: " ".join(words[1:]) for line in outcome.out.splitlines() if (words := line.split())}
    assert set(RECIPES) <= set(rows)
    assert rows["demo"] == "3.32 M nothing to download"
    assert rows["shakespeare"] == "10.7 M data/tinyshakespeare.txt, a GPU"
    assert rows["experiments:"] == ", ".join(EXPERIMENTS)


def test_copies(empty: Path, fusedlm):
    assert fusedlm("recipes", "copy", "demo").out == "demo.yaml\n"
    assert fusedlm("recipes", "copy", "demo", "mine.yaml").code == 0
    assert load_recipe("mine.yaml") == load_recipe("demo.yaml") == load_recipe(REPOSITORY / "recipes/demo.yaml")
    Path("demo.yaml").write_text("mine")
    again = fusedlm("recipes", "copy", "demo")
    assert (again.code, Path("demo.yaml").read_text()) == (2, "mine")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_copied_experiment_brings_its_base(empty: Path, fusedlm, name):
    assert fusedlm("recipes", "copy", f"experiments/{name}").code == 0
    assert load_experiment(f"{name}.yaml")[1] == load_experiment(REPOSITORY / f"recipes/experiments/{name}.yaml")[1]


def test_an_installed_package_has_its_recipes_inside(empty: Path, fusedlm, monkeypatch):
    config = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    included = config["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"recipes": "fusedlm/recipes"}
    shutil.copytree(REPOSITORY / "recipes", empty / "site/fusedlm/recipes")
    monkeypatch.setattr("fusedlm.cli.packaged.PACKAGE", empty / "site/fusedlm")
    assert fusedlm("compare", "ultra-cpu", "--dry-run").code == 0
    shutil.rmtree(empty / "site/fusedlm/recipes")
    assert "has no recipes" in fusedlm("train", "demo").err


def _python(*arguments, **environment) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_the_package_runs_as_a_module(empty: Path):
    done = _python("-m", "fusedlm", "--version")
    assert (done.returncode, done.stdout) == (0, f"fusedlm {package.__version__}\n")
    assert _python("-m", "fusedlm", "train", "dmeo").returncode == 2


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fusedlm tr", ["train"]),
        ("fusedlm train d", ["demo", "draft.yaml", "data/"]),
        ("fusedlm compare ultra", ["ultra-cpu"]),
        ("fusedlm train recipes/d", []),
    ],
)
def test_a_shell_completes_commands_and_recipes(empty: Path, line, offered):
    Path("draft.yaml").touch()
    Path("data").mkdir()
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_FUSEDLM_COMPLETE": "complete_bash"}
    done = _python("-m", "fusedlm", **words)
    assert (done.stderr, sorted(done.stdout.split())) == ("", sorted(offered))


@pytest.mark.parametrize("device", ["auto", "cpu", torch.device("cpu"), "cpu:0", "meta"])
def test_a_model_is_built_where_it_is_asked_for(device):
    recipe = load_recipe(REPOSITORY / "recipes/demo.yaml", ["model.dim=24", "runtime.device=cpu"])
    kind = "meta" if device == "meta" else "cuda" if device == "auto" and torch.cuda.is_available() else "cpu"
    assert package.build_model(recipe.model, vocab_size=300, device=device).embedding.weight.device.type == kind


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "'gpu' is not one of auto, cpu, cuda"), (0.5, "'0.5'"), ("mps", "'mps'"), ("cuda:99", "'cuda:99'")],
)
def test_a_device_that_does_not_exist_is_one_line(finished: Path, device, words):
    with pytest.raises(ValueError, match=words):
        package.load(finished / "runs/small", device=device)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0)])
def test_a_run_is_loaded_where_it_is_asked_for(finished: Path, device):
    assert package.load(finished / "runs/small", device=device)[0].embedding.weight.device == torch.device("cpu")


@pytest.mark.multi_gpu
def test_a_run_is_loaded_on_the_second_gpu(finished: Path):
    model, tokenizer, _ = package.load(finished / "runs/small", device="cuda:1")
    assert model.embedding.weight.device == torch.device("cuda:1")
