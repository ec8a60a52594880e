"""What is read back from an experiment's folder is what was written, for that variant, seed and experiment."""

import json
import shutil

import pytest

from fusedlm.compare import run_experiment
from fusedlm.compare.identity import difference
from fusedlm.config.experiment import load_experiment


@pytest.fixture
def out(finished, in_process, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    return tmp_path / "out"


def edit(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree, indent=1) + "\n")


def swap(first, second):
    text = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(text)


def lower_the_loss(tree):
    tree["content"]["final"]["val_nll_per_token"] -= 1


def without_checksum(tree):
    lower_the_loss(tree)
    del tree["sha256"]


def bare(tree):
    content = tree.pop("content")
    tree.clear()
    tree.update(content)


RECORD = "records/softmax-seed0.json"
DAMAGE = {
    "edited loss": (lambda out: edit(out / RECORD, lower_the_loss), f"{RECORD}: content: its content is not what"),
    "no checksum": (lambda out: edit(out / RECORD, without_checksum), f"{RECORD}: it has no checksum"),
    "old form": (lambda out: edit(out / RECORD, bare), f"{RECORD}: it has no checksum"),
    "empty object": (lambda out: (out / RECORD).write_text("{}"), f"{RECORD}: it has no checksum"),
    "empty file": (lambda out: (out / RECORD).write_text(""), f"{RECORD}: damaged, not JSON"),
    "not an object": (lambda out: (out / RECORD).write_text("[1]"), f"{RECORD}: damaged, not a JSON object"),
    "seeds swapped": (
        lambda out: swap(out / RECORD, out / "records/softmax-seed1.json"),
        f"{RECORD}: it belongs to seed 1, not 0",
    ),
    "variants swapped": (
        lambda out: swap(out / RECORD, out / "records/latent-seed0.json"),
        "records/latent-seed0.json: it belongs to variant softmax, not latent",
    ),
    "decoding swapped": (
        lambda out: swap(out / "decoding/latent.json", out / "decoding/softmax.json"),
        "decoding/latent.json: it belongs to variant softmax, not latent",
    ),
    "empty decoding": (lambda out: (out / "decoding/latent.json").write_text("{}"), "decoding/latent.json: it has no"),
    "runs swapped": (
        lambda out: swap(out / "runs/latent-seed0/metrics.jsonl", out / "runs/latent-seed1/metrics.jsonl"),
        "runs/latent-seed0/metrics.jsonl: changed since the run ended",
    ),
    "a deleted step": (
        lambda out: (out / "runs/latent-seed0/metrics.jsonl").write_text("\n"),
        "runs/latent-seed0/metrics.jsonl: changed since",
    ),
    "another machine": (
        lambda out: edit(out / "runs/latent-seed0/environment.json", lambda tree: tree.update(device_name="GPU")),
        "runs/latent-seed0/environment.json: changed since",
    ),
    "no metrics": (lambda out: (out / "runs/latent-seed0/metrics.jsonl").unlink(), "metrics.jsonl: missing, although"),
    "identity edited": (
        lambda out: edit(out / "identity.json", lambda tree: tree.update(device="GPU")),
        "identity.json: damaged: identity of an experiment: its content is not what",
    ),
    "identity empty": (lambda out: (out / "identity.json").write_text("{}"), "identity.json: damaged: experiment="),
    "identity gone": (lambda out: (out / "identity.json").unlink(), "holds runs but no identity.json"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE)
def test_what_does_not_fit_is_one_line(out, experiment_file, in_process, damage, named):
    damage(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.suffix != ".pt"}
    for train in (False, True):
        with pytest.raises(ValueError) as caught:
            run_experiment(*load_experiment(experiment_file), out, train=train)
        text = str(caught.value)
        assert named in text and "\n" not in text and ("remove" in text or "--out" in text)
    assert in_process.calls == []
    kept = {path for path in before if path.read_bytes() == before[path]}
    assert {path.name for path in before.keys() - kept} <= {"experiment.yaml"}


def test_the_advice_for_a_damaged_record_restores_it(out, experiment_file, in_process):
    written = (out / RECORD).read_bytes()
    edit(out / RECORD, lower_the_loss)
    (out / RECORD).unlink()
    run_experiment(*load_experiment(experiment_file), out)
    assert in_process.trained() == ["softmax-seed0"]
    found, expected = json.loads((out / RECORD).read_text()), json.loads(written)
    assert found["content"]["final"] == expected["content"]["final"]


def test_records_of_another_experiment_are_refused(out, experiment_file, in_process, tmp_path):
    """The same variants and seeds, with another learning rate."""
    overrides = ["train.optimizer.lr=0.02", "experiment.decode_lengths=[]"]
    loaded = load_experiment(experiment_file, overrides)
    run_experiment(*loaded, tmp_path / "other")
    swap(out / RECORD, tmp_path / "other" / RECORD)
    with pytest.raises(ValueError, match="softmax-seed0.json: it belongs to another experiment; remove it"):
        run_experiment(*loaded, tmp_path / "other", train=False)


def legacy(out):
    """The folder as a version without checksums wrote it."""
    for path in [*out.glob("records/*"), *out.glob("decoding/*")]:
        edit(path, bare)
        edit(path, lambda tree: [tree.pop(key, None) for key in ("files", "step")])
    edit(out / "identity.json", lambda tree: tree.pop("sha256"))


def test_a_folder_without_checksums_is_accepted_once(out, experiment_file, in_process, finished, capsys):
    from rich.console import Console

    legacy(out)
    loaded = load_experiment(experiment_file)
    before = {path.name: path.read_bytes() for path in [*out.glob("records/*"), out / "identity.json"]}
    report = run_experiment(*loaded, out, train=False, console=Console(width=200))
    assert report.results.rows == finished[0].results.rows
    assert "of a version without checksums: 6 files are accepted as they are" in capsys.readouterr().out
    assert {name: (out / "identity.json").read_bytes() for name in ["identity.json"]}.items() <= before.items()
    run_experiment(*loaded, out, console=Console(width=200))
    assert "6 files are accepted" in capsys.readouterr().out and in_process.calls == []
    assert all(path.read_bytes() == before[path.name] for path in out.glob("records/*"))
    run_experiment(*loaded, out, console=Console(width=200))
    assert "accepted" not in capsys.readouterr().out
    edit(out / RECORD, lambda tree: tree["final"].update(val_bpb=0.5))
    with pytest.raises(ValueError, match="softmax-seed0.json: it has no checksum, and is not as it was accepted"):
        run_experiment(*loaded, out, train=False)


@pytest.mark.parametrize("content", ['{"softmax": null}', '{"softmax": {}}', '{"softmax": -1}', '{"softmax": NaN}'])
def test_a_calibration_that_does_not_fit_is_named(out, experiment_file, in_process, content):
    legacy(out)
    (out / "calibration.json").write_text(content)
    from fusedlm.compare.folder import ExperimentFolder

    with ExperimentFolder(out) as folder:
        folder.check(folder.saved_identity())
        with pytest.raises(ValueError, match="calibration.json: softmax=.*must be seconds per step; remove it"):
            folder.calibration()


def test_a_calibration_is_bound_to_its_recipe(out, in_process):
    from fusedlm.compare.folder import ExperimentFolder

    with ExperimentFolder(out) as folder:
        identity = folder.saved_identity()
        folder.check(identity)
        folder.write_calibration({"latent": 0.5, "softmax": 0.25})
        assert folder.calibration() == {"latent": 0.5, "softmax": 0.25}
        folder.identity["variants"]["softmax"]["train.batch_size"] = 99
        with pytest.raises(ValueError, match="calibration.json: softmax was timed for another experiment; remove it"):
            folder.calibration()


def test_keys_that_recipes_did_not_have_yet_count_as_their_defaults(out):
    now = json.loads((out / "identity.json").read_text())
    saved = json.loads(json.dumps(now))
    assert now["variants"]["latent"]["train.grad_clip"] == 1.0
    del saved["variants"]["latent"]["train.grad_clip"]
    del saved["variants"]["latent"]["model.blocks.m.mixer.xsa"]
    assert difference(saved, now) is None
    now["variants"]["latent"]["train.grad_clip"] = 0.5
    assert difference(saved, now)[0] == "train.grad_clip of variant latent"
