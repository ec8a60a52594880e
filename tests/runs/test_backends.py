"""Backends that a recipe names: used where they can run, an error or a warning where they cannot."""

import json
import logging

import pytest
import torch

from fusedlm.cli import main
from fusedlm.cli.plan import make_plan
from fusedlm.config import dump_recipe, parse_recipe
from fusedlm.config.runtime import RuntimeConfig
from fusedlm.ops.common import OPS, Backend
from fusedlm.ops.common.dispatch import forget, recorded
from fusedlm.runs import load
from fusedlm.runs.backends import use_backends
from fusedlm.testing import part_model
from fusedlm.train import train
from tests.runs.edits import edit_header, edit_recipe
from tests.train.runs import SHORT, losses, tiny_recipe

CPU, FLOAT = torch.device("cpu"), torch.float32
CUDNN = "runtime.backends={attention: cudnn}"
MIXER, FFN = "{type: attention, n_heads: 2}", "{type: relu2, hidden: 32}"


def used(model) -> dict[str, str]:
    """The backend of each op that a forward pass runs."""
    with recorded() as calls, torch.no_grad():
        model(torch.arange(6)[None], targets=torch.arange(6)[None])
    return {op: backend for op, backend, _ in calls}


def test_named_backends_are_used():
    model = part_model(MIXER, FFN)
    selections = use_backends(model, RuntimeConfig(backends={"attention": "reference"}), CPU, FLOAT, strict=True)
    assert selections["a.attention"].backend == used(model)["attention"] == "reference"
    use_backends(model, RuntimeConfig(), CPU, FLOAT, strict=True)
    assert used(model)["attention"] == "sdpa"


def test_a_strict_backend_that_cannot_run_is_an_error_with_the_reason():
    with pytest.raises(ValueError) as caught:
        use_backends(part_model(MIXER), RuntimeConfig(backends={"attention": "cudnn"}), CPU, FLOAT, strict=True)
    assert str(caught.value) == (
        "runtime.backends.attention=cudnn: cannot run here (needs a CUDA device, not cpu); use auto"
    )


def test_other_backends_that_cannot_run_are_replaced_with_a_warning(caplog):
    model = part_model(MIXER, FFN)
    named = {"attention": "cudnn", "relu2_mlp": "triton", "linear_softcap_cross_entropy": "reference"}
    selections = use_backends(model, RuntimeConfig(backends=named), CPU, FLOAT, strict=False)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert warnings[0] == (
        "runtime.backends.attention=cudnn: cannot run here (needs a CUDA device, not cpu); auto is used"
    )
    assert "runtime.backends.relu2_mlp=triton" in warnings[1]
    assert selections["head.linear_softcap_cross_entropy"].reason == "requested"
    assert used(model)["attention"] == "sdpa"


def test_a_backend_of_an_op_that_the_model_does_not_have_is_ignored(caplog):
    use_backends(part_model(MIXER), RuntimeConfig(backends={"relu2_mlp": "triton"}), CPU, FLOAT, strict=True)
    assert not caplog.records


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("named", [{"attentoin": "sdpa"}, {"attention": "fast"}])
def test_unknown_ops_and_backends_are_errors(named, strict):
    with pytest.raises(ValueError, match=f"runtime.backends.{next(iter(named))}: "):
        use_backends(part_model(MIXER), RuntimeConfig(backends=named), CPU, FLOAT, strict=strict)


def test_deterministic_runs_pass_over_backends_that_are_not(tmp_path, monkeypatch):
    """environment.json has the backends that ran."""

    def supports(call, **sizes):
        return "its backward is not deterministic" if call.deterministic else None

    sdpa = OPS["attention"].backends["sdpa"]
    sdpa.load()
    loose = {"loose": Backend("loose", sdpa.run, supports)}
    monkeypatch.setattr(OPS["attention"], "backends", loose | OPS["attention"].backends)
    forget()
    try:
        for deterministic, expected in (("false", "loose"), ("true", "sdpa")):
            overrides = ["data.document_mask=false", f"runtime.deterministic={deterministic}"]
            with recorded() as calls:
                train(tiny_recipe(tmp_path, *SHORT, *overrides), tmp_path / deterministic)
            environment = json.loads((tmp_path / deterministic / "environment.json").read_text())
            assert environment["backends"]["a.attention"] == expected
            assert {backend for op, backend, _ in calls if op == "attention"} == {expected}
    finally:
        forget()


@pytest.fixture(scope="module")
def gpu_run(tmp_path_factory):
    """A run whose recipe names a backend that needs a GPU, as if it had been trained on one."""
    folder = tmp_path_factory.mktemp("gpu")
    recipe = tiny_recipe(folder, *SHORT)
    train(recipe, folder / "run")
    edit_recipe(folder / "run", lambda text: dump_recipe(parse_recipe(text, [CUDNN])))
    edit_header(folder / "run", "environment.json", lambda text: json.dumps(json.loads(text) | {"device": "cuda"}))
    return folder / "run"


def test_a_run_of_a_gpu_loads_on_the_cpu_with_a_warning(gpu_run, caplog):
    model, _, recipe = load(gpu_run, device="cpu")
    assert recipe.runtime.backends == {"attention": "cudnn"}
    assert "runtime.backends.attention=cudnn: cannot run here" in caplog.text
    assert used(model)["attention"] == "sdpa"


def test_backends_can_be_overridden_when_a_run_is_loaded(gpu_run, caplog):
    model, _, recipe = load(gpu_run, device="cpu", overrides=["runtime.backends.attention=reference"])
    assert not caplog.records
    assert recipe.runtime.backends == {"attention": "reference"} and used(model)["attention"] == "reference"
    with pytest.raises(ValueError, match="runtime.backends.attention=cudnn: cannot run here"):
        load(gpu_run, device="cpu", overrides=["runtime.backends.attention=cudnn"])


def test_a_recipe_for_a_gpu_can_be_planned_on_the_cpu(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path, CUDNN)
    assert make_plan(recipe) == make_plan(tiny_recipe(tmp_path))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
    assert "attention: cudnn" in capsys.readouterr().out


def test_training_with_a_backend_that_cannot_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"runtime.backends.attention=cudnn: cannot run here \(needs a CUDA device"):
        train(tiny_recipe(tmp_path, *SHORT, CUDNN), tmp_path / "run")
    assert not (tmp_path / "run/recipe.yaml").exists()


def test_training_without_strict_backends_replaces_it(tmp_path, caplog):
    train(tiny_recipe(tmp_path, *SHORT, CUDNN), tmp_path / "run", strict_backends=False)
    assert "runtime.backends.attention=cudnn: cannot run here" in caplog.text
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["backends"]["a.attention"] == "sdpa"
    train(tiny_recipe(tmp_path, *SHORT), tmp_path / "plain")
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
