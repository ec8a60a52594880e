"""The run folder: its lock, and the recipes that may resume in it."""

import json

import pytest

from fusedlm.config import dump_recipe, load_recipe, parse_recipe
from fusedlm.data.tokenizer import ByteTokenizer
from fusedlm.distributed import World
from fusedlm.runs.folder import RunFolder, check_resumable
from fusedlm.runs.identity import changed_files, identity_of, new_run_id, read_identity, write_identity
from tests.train.runs import tiny_recipe


class _Other(World):
    """One of two processes that does not wait for the main one."""

    def raise_together(self, error):
        assert error is None


def test_a_folder_is_locked_while_the_context_is_open(tmp_path):
    with RunFolder(tmp_path / "run"):
        with pytest.raises(ValueError, match="run is in use by another training process; wait for it or name another"):
            RunFolder(tmp_path / "run").__enter__()
        with RunFolder(tmp_path / "run", _Other(rank=1, size=2)):
            pass  # only the main process of a run locks
    with RunFolder(tmp_path / "run") as folder:
        assert not folder.holds_run()


def test_a_process_that_is_not_the_main_one_creates_nothing(tmp_path):
    with RunFolder(tmp_path / "run", _Other(rank=1, size=2)):
        assert not (tmp_path / "run").exists()


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder with --out"):
        RunFolder(tmp_path / "run").__enter__()


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe(tmp_path)


def changed(recipe, *overrides):
    return parse_recipe(dump_recipe(recipe), overrides)


NOTED = {"train.micro_batch_size=1": ("2", "1"), "runtime.recompute=mixer": ('"none"', '"mixer"')}
SILENT = ["runtime.device=auto", "train.eval_every=1", "description=another", "train.loggers=[wandb]", "data.dir=other"]
# (override, value in the run, value now)
FIXED = [
    ("runtime.compile=true", "false", "true"),
    ("runtime.dtype=bfloat16", '"auto"', '"bfloat16"'),
    ("runtime.deterministic=true", "false", "true"),
    ("runtime.backends={attention: sdpa}", "absent", '"sdpa"'),
    ("runtime.cuda_graph=true", "false", "true"),
]


@pytest.mark.parametrize("override", NOTED)
@pytest.mark.parametrize("same_device", [True, False])
def test_memory_keys_may_change_with_a_note(recipe, override, same_device):
    (note,) = check_resumable(recipe, changed(recipe, override), same_device)
    before, now = NOTED[override]
    assert note == f"{override.partition('=')[0]} was {before} and is now {now}; losses may differ by rounding"


@pytest.mark.parametrize("override", SILENT)
def test_keys_without_an_effect_on_the_steps_may_change(recipe, override):
    assert check_resumable(recipe, changed(recipe, override)) == []


@pytest.mark.parametrize("override, before, now", FIXED)
def test_runtime_keys_that_change_rounding_are_fixed_on_the_same_kind_of_device(recipe, override, before, now):
    key = override.partition("=")[0].replace("backends", "backends.attention")
    with pytest.raises(ValueError) as caught:
        check_resumable(recipe, changed(recipe, override), same_device=True)
    assert str(caught.value) == (
        f"{key} is {before} in the run to resume and {now} now; give the same value or start a new run with --out"
    )
    with pytest.raises(ValueError, match=f"{key} is {now} in the run to resume and {before} now"):
        check_resumable(changed(recipe, override), recipe, same_device=True)


@pytest.mark.parametrize("override, before, now", FIXED)
def test_runtime_keys_may_change_on_another_kind_of_device(recipe, override, before, now):
    (note,) = check_resumable(recipe, changed(recipe, override), same_device=False)
    assert f"was {before} and is now {now}; losses may differ by rounding" in note


@pytest.mark.parametrize("same_device", [True, False])
@pytest.mark.parametrize("override", ["train.optimizer.lr=0.02", "model.dropout=0", "data.document_mask=false"])
def test_other_keys_are_fixed_on_every_device(recipe, override, same_device):
    with pytest.raises(ValueError, match=override.partition("=")[0]):
        check_resumable(recipe, changed(recipe, override), same_device)


def test_another_type_of_optimizer_is_refused_by_its_type(recipe):
    with pytest.raises(ValueError, match='train.optimizer.type is "adamw" in the run to resume and "sgd" now'):
        check_resumable(recipe, changed(recipe, "train.optimizer={type: sgd, lr: 0.01}"))


def test_steps_may_increase_only(recipe):
    (note,) = check_resumable(recipe, changed(recipe, "train.steps=14"))
    assert note == "train.steps was 12 and is now 14; the schedule is recomputed for 14 steps"
    with pytest.raises(ValueError, match="train.steps=11: the run to resume has 12 steps; give at least 12"):
        check_resumable(recipe, changed(recipe, "train.steps=11"))


@pytest.fixture
def begun(recipe, tmp_path):
    """A run folder whose steps were computed on a GPU."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "recipe.yaml").write_text(dump_recipe(recipe))
    (folder.path / "environment.json").write_text('{"device": "cuda"}')
    return folder


def test_the_device_of_the_run_is_that_of_environment_json(begun, recipe):
    other = changed(recipe, "runtime.compile=true")
    with pytest.raises(ValueError, match="runtime.compile is false in the run to resume"):
        begun.check_recipe(other, "cuda", None, None)
    notes = begun.check_recipe(other, "cpu", None, None)
    assert notes == [
        "the run was on cuda and is now on cpu; losses may differ by rounding",
        "runtime.compile was false and is now true; losses may differ by rounding",
    ]


@pytest.mark.parametrize("environment", [None, "", "[]", "{}", '{"device": null}'])
def test_an_unknown_device_counts_as_the_same(begun, recipe, environment):
    if environment is None:
        (begun.path / "environment.json").unlink()
    else:
        (begun.path / "environment.json").write_text(environment)
    assert begun.check_recipe(recipe, "cpu", None, None) == []
    with pytest.raises(ValueError, match="runtime.compile"):
        begun.check_recipe(changed(recipe, "runtime.compile=true"), "cpu", None, None)


def test_a_run_is_not_overwritten_without_resume(begun):
    with pytest.raises(ValueError, match="already holds a run; resume it with --resume or name another with --out"):
        begun.check_resume(resume=False)


def test_a_run_without_its_recipe_is_refused(begun):
    (begun.path / "recipe.yaml").unlink()
    assert not begun.holds_run()
    begun.metrics.write_text("")
    with pytest.raises(ValueError, match="holds a run without recipe.yaml; name another folder with --out"):
        begun.check_resume(resume=True)


def test_an_environment_that_was_changed_is_not_trusted(begun, recipe):
    other = changed(recipe, "runtime.compile=true")
    write_identity(begun.path, identity_of("0" * 32, {"environment.json": b'{"device": "cuda"}'}))
    assert len(begun.check_recipe(other, "cpu", None, read_identity(begun.path))) == 2
    (begun.path / "environment.json").write_text('{"device": "cudb"}')
    with pytest.raises(ValueError, match="runtime.compile is false in the run to resume"):
        begun.check_recipe(other, "cpu", None, read_identity(begun.path))


def test_the_recipe_of_the_checkpoint_counts(begun, recipe):
    saved = changed(recipe, "train.seed=3")
    with pytest.raises(ValueError, match="train.seed is 3 in the run to resume and 0 now"):
        begun.check_recipe(recipe, "cuda", saved, None)
    assert begun.check_recipe(saved, "cuda", saved, None) == []


def test_the_header_is_written_and_bound_by_its_checksums(tmp_path, recipe):
    with RunFolder(tmp_path / "run") as folder:
        folder.write_header(recipe, ByteTokenizer(), {"device": "cpu", "backends": {"a.attention": "sdpa"}}, "f" * 32)
    text = (folder.path / "environment.json").read_text()
    assert json.loads(text) == {"device": "cpu", "backends": {"a.attention": "sdpa"}} and text.endswith("}\n")
    assert load_recipe(folder.path / "recipe.yaml") == recipe
    identity = read_identity(folder.path)
    assert identity.run == "f" * 32
    assert sorted(identity.files) == ["environment.json", "recipe.yaml", "tokenizer.meta.json"]
    assert changed_files(folder.path, identity) == []
    (folder.path / "environment.json").write_text("{}")
    (folder.path / "recipe.yaml").unlink()
    assert changed_files(folder.path, identity) == ["environment.json", "recipe.yaml"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run": "a", "files": {}}', "[" * 100_000, "\0"])
def test_a_damaged_run_json_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match="run.json: not what was written; fusedlm train --resume writes it again"):
        read_identity(tmp_path)


def test_every_flipped_bit_of_run_json_shows(tmp_path):
    write_identity(tmp_path, identity_of(new_run_id(), {"recipe.yaml": b"name: a"}))
    content = (tmp_path / "run.json").read_bytes()
    expected = read_identity(tmp_path)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        (tmp_path / "run.json").write_bytes(changed)
        try:
            # White space between values may change.
            assert read_identity(tmp_path) == expected and content[position : position + 1].isspace()
        except ValueError as error:
            assert "run.json: not what was written" in str(error)
