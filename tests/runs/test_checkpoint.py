"""Checkpoint folders: content, damage, atomicity, pruning."""

import errno
import hashlib
import io
import os
import resource
import shutil

import pytest
import torch

from fusedlm.runs import checkpoint as checkpoint_module
from fusedlm.runs.checkpoint import Checkpoints, DamagedCheckpoint, RemovedCheckpoint

TENSORS = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3), "scale": torch.tensor(2.0)},
    "rng": {"cpu": torch.arange(8, dtype=torch.uint8)},
    "nothing": {},
}
TEXTS = {"state.json": '{"step": 1}\n'}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


def test_what_is_saved_reads_back(checkpoints):
    path = checkpoints.save(12, TENSORS, TEXTS)
    assert path.name == "step-00000012"
    assert {entry.name for entry in path.iterdir()} == {
        "model.safetensors",
        "rng.safetensors",
        "nothing.safetensors",
        "state.json",
        "manifest.json",
    }
    checkpoints.verify(12)
    for stem, table in TENSORS.items():
        read = checkpoints.read_tensors(12, stem)
        assert read.keys() == table.keys()
        assert all(torch.equal(read[name], table[name]) for name in table)
    assert checkpoints.read_json(12, "state.json") == {"step": 1}


def test_tensors_that_are_not_contiguous_are_saved_in_their_shape(checkpoints):
    transposed = torch.arange(6.0).reshape(2, 3).T
    checkpoints.save(1, {"model": {"weight": transposed}}, {})
    assert torch.equal(checkpoints.read_tensors(1, "model")["weight"], transposed)


def test_flipped_bits_truncated_and_missing_files_are_detected(checkpoints):
    path = checkpoints.save(1, TENSORS, TEXTS)
    for name in [entry.name for entry in path.iterdir()]:
        original = (path / name).read_bytes()
        for position in {0, len(original) // 3, len(original) // 2, len(original) - 1}:
            for bit in (0, 5):
                changed = bytearray(original)
                changed[position] ^= 1 << bit
                (path / name).write_bytes(changed)
                with pytest.raises(DamagedCheckpoint, match="step-00000001"):
                    checkpoints.verify(1)
        for cut in (original[: len(original) // 2], b"", original + b"\n"):
            (path / name).write_bytes(cut)
            with pytest.raises(DamagedCheckpoint, match="step-00000001"):
                checkpoints.verify(1)
        (path / name).unlink()
        with pytest.raises(DamagedCheckpoint, match=f"{name}: No such file"):
            checkpoints.verify(1)
        (path / name).write_bytes(original)
        checkpoints.verify(1)


def test_only_the_named_files_are_verified(checkpoints):
    path = checkpoints.save(1, TENSORS, TEXTS)
    (path / "rng.safetensors").write_bytes(b"")
    checkpoints.verify(1, only=("model.safetensors",))
    with pytest.raises(DamagedCheckpoint, match="absent.json: not in the manifest"):
        checkpoints.verify(1, only=("absent.json",))


def test_saving_the_same_step_again_replaces_it(checkpoints):
    checkpoints.save(1, TENSORS, TEXTS)
    checkpoints.save(1, TENSORS, {"state.json": '{"step": 2}\n'})
    checkpoints.verify(1)
    assert checkpoints.read_json(1, "state.json") == {"step": 2}
    assert [entry.name for entry in checkpoints.directory.iterdir()] == ["step-00000001"]


def test_leftovers_of_an_interrupted_save_are_removed(checkpoints):
    checkpoints.save(1, TENSORS, TEXTS)
    temporary = checkpoints.temporary(2)
    temporary.mkdir()
    (temporary / "model.safetensors").write_bytes(b"half")
    assert checkpoints.steps() == [1]
    checkpoints.clean()
    assert [entry.name for entry in checkpoints.directory.iterdir()] == ["step-00000001"]


def test_a_replacement_interrupted_between_its_renames_is_undone(checkpoints):
    path = checkpoints.save(1, TENSORS, TEXTS)
    path.rename(checkpoints.temporary(1, "replaced"))
    checkpoints.clean()
    checkpoints.verify(1)


def test_prune_keeps_the_newest_and_the_best(checkpoints):
    for step in (10, 20, 30, 40, 50):
        checkpoints.save(step, TENSORS, TEXTS)
    checkpoints.prune(keep=2, best=20)
    assert checkpoints.steps() == [20, 40, 50]
    checkpoints.prune(keep=5, best=None)
    assert checkpoints.steps() == [20, 40, 50]


def test_steps_are_ordered_as_numbers(checkpoints):
    for step in (100_000_000, 99_999_999, 7):
        checkpoints.save(step, {}, TEXTS)
    assert checkpoints.steps() == [7, 99_999_999, 100_000_000]


def test_setting_a_step_aside_twice_keeps_both(checkpoints):
    for _ in range(2):
        checkpoints.save(1, TENSORS, TEXTS)
        checkpoints.set_aside(1)
    assert checkpoints.steps() == []
    assert checkpoints.set_aside_names() == ["step-00000001.damaged", "step-00000001.damaged-2"]


def test_a_full_disk_leaves_earlier_checkpoints_intact(checkpoints):
    big = {"model": {"weight": torch.zeros(4096)}}
    checkpoints.save(1, big, TEXTS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="could not be written: .*the last one is .*step-00000001") as caught:
            checkpoints.save(2, big, TEXTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    checkpoints.verify(1)
    assert [entry.name for entry in checkpoints.directory.iterdir()] == ["step-00000001"]


def test_an_unwritable_folder_is_named(checkpoints):
    checkpoints.directory.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="step-00000001 could not be written: .*there is none before it"):
        checkpoints.save(1, TENSORS, TEXTS)


def test_an_interrupted_save_leaves_only_a_temporary_folder(checkpoints, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "write_tensor_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(1, TENSORS, TEXTS)
    assert checkpoints.steps() == []
    checkpoints.clean()
    assert list(checkpoints.directory.iterdir()) == []


def test_a_missing_folder_has_no_checkpoints(checkpoints):
    checkpoints.save(1, TENSORS, TEXTS)
    shutil.rmtree(checkpoints.directory)
    assert checkpoints.steps() == checkpoints.set_aside_names() == []
    checkpoints.clean()


def test_everything_is_synced_before_the_rename(checkpoints, monkeypatch):
    synced, fsync, rename = set(), os.fsync, os.rename
    renamed = []

    def spy_fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def spy_rename(source, target):
        missing = [path.name for path in (source, *source.iterdir()) if path.stat().st_ino not in synced]
        renamed.append((target.name, missing))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    checkpoints.save(1, TENSORS, TEXTS)
    assert renamed == [("step-00000001", [])]
    assert checkpoints.directory.stat().st_ino in synced, "the rename itself"


def test_files_follow_the_umask(checkpoints):
    before = os.umask(0o027)
    try:
        path = checkpoints.save(1, TENSORS, TEXTS)
    finally:
        os.umask(before)
    assert {oct(entry.stat().st_mode & 0o777) for entry in path.iterdir()} == {"0o640"}
    assert oct(path.stat().st_mode & 0o777) == "0o750"


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ESTALE])
@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_an_error_of_the_system_is_no_damage(checkpoints, monkeypatch, number, name):
    path = checkpoints.save(1, TENSORS, TEXTS) / name
    opened = io.open

    def fail(file, *arguments, **options):
        if file == path:
            raise OSError(number, os.strerror(number))
        return opened(file, *arguments, **options)

    monkeypatch.setattr(io, "open", fail)
    with pytest.raises(OSError) as caught:
        checkpoints.verify(1)
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    monkeypatch.undo()
    checkpoints.verify(1)


def test_a_checkpoint_that_is_gone_is_no_damage(checkpoints):
    checkpoints.save(1, TENSORS, TEXTS)
    shutil.rmtree(checkpoints.path(1))
    for read in (checkpoints.files, checkpoints.verify, lambda step: checkpoints.read_tensors(step, "model")):
        with pytest.raises(RemovedCheckpoint, match="step-00000001 was removed while it was read"):
            read(1)


def test_a_pipe_in_place_of_a_file_is_damage(checkpoints):
    for name in ("state.json", "manifest.json"):
        path = checkpoints.save(1, TENSORS, TEXTS) / name
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DamagedCheckpoint, match=f"{name}: not a file"):
            checkpoints.verify(1)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "", ".hidden", "a/b", "a\0"])
def test_a_manifest_names_files_of_its_folder_only(checkpoints, name):
    path = checkpoints.save(1, TENSORS, TEXTS)
    (checkpoints.directory / "outside").write_text("")
    table = checkpoints.files(1)
    table[name] = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0}
    (path / "manifest.json").write_text(checkpoint_module._manifest_text(table))
    with pytest.raises(DamagedCheckpoint, match="manifest.json: not the manifest that was written"):
        checkpoints.verify(1)


def test_tensors_that_are_no_safetensors_are_damage(checkpoints):
    path = checkpoints.save(1, TENSORS, {"state.json": "[1]"})
    (path / "model.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(DamagedCheckpoint, match="model.safetensors: "):
        checkpoints.read_tensors(1, "model")
    with pytest.raises(DamagedCheckpoint, match="state.json: not a JSON object"):
        checkpoints.read_json(1, "state.json")


OF_THE_USER = ["step-best.tmp", "step-7.tmp", "step-000000061", "step-00000061x", "step-000000007.tmp", "notes.damaged"]
OF_THE_USER += ["step-0000001٣", "step-00000005-copy", "step-00000005.tmp", "step-00000005.replaced"]
OF_THE_USER += [".fusedlm-step-5.tmp", ".fusedlm-step-00000005", ".fusedlm-step-00000005.tmp-2"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_names_that_this_class_does_not_make_are_the_users(checkpoints, kind):
    checkpoints.save(1, TENSORS, TEXTS)
    for name in OF_THE_USER:
        path = checkpoints.directory / name
        if kind == "folder":
            path.mkdir()
            path = path / "content"
        path.write_text("of the user")
    before = {path: path.read_bytes() for path in checkpoints.directory.rglob("*") if path.is_file()}
    checkpoints.clean()
    assert checkpoints.steps() == [1] and checkpoints.set_aside_names() == []
    checkpoints.prune(keep=1, best=None)
    assert {path: path.read_bytes() for path in checkpoints.directory.rglob("*") if path.is_file()} == before


def test_a_folder_without_a_manifest_is_not_pruned_and_does_not_count(checkpoints):
    for step in (2, 3, 4):
        checkpoints.save(step, TENSORS, TEXTS)
    for step in (1, 9):
        checkpoints.path(step).mkdir()
        (checkpoints.path(step) / "state.json").write_text("of the user")
    checkpoints.prune(keep=2, best=None)
    assert checkpoints.steps() == [1, 3, 4, 9]
    assert (checkpoints.path(1) / "state.json").read_text() == "of the user"


@pytest.mark.parametrize("kind", ["file", "link"])
@pytest.mark.parametrize("name", ["step-00000002", ".fusedlm-step-00000002.tmp", ".fusedlm-step-00000002.replaced"])
def test_a_file_at_a_name_of_ours_is_kept_and_blocks_nothing(checkpoints, tmp_path, name, kind):
    checkpoints.save(1, TENSORS, TEXTS)
    (tmp_path / "precious").write_text("of the user")
    path = checkpoints.directory / name
    if kind == "link":
        path.symlink_to(tmp_path / "precious")
    else:
        path.write_text("of the user")
    checkpoints.clean()
    assert checkpoints.steps() == [1]
    checkpoints.save(2, TENSORS, TEXTS)
    checkpoints.save(2, TENSORS, TEXTS)
    checkpoints.verify(2)
    kept = checkpoints.directory / f"{name}.kept"
    assert kept.read_text() == (tmp_path / "precious").read_text() == "of the user"
    checkpoints.prune(keep=1, best=None)
    assert {entry.name for entry in checkpoints.directory.iterdir()} == {"step-00000002", kept.name}


def test_a_checkpoint_on_another_disk_is_read_and_its_link_pruned(checkpoints, tmp_path):
    for step in (1, 2):
        checkpoints.save(step, TENSORS, TEXTS)
    moved = checkpoints.path(1).rename(tmp_path / "moved")
    checkpoints.path(1).symlink_to(moved)
    checkpoints.verify(1)
    assert checkpoints.steps() == [1, 2]
    checkpoints.prune(keep=1, best=None)
    assert [entry.name for entry in checkpoints.directory.iterdir()] == ["step-00000002"]
    assert (moved / "state.json").exists()


def test_a_folder_that_cannot_be_listed_is_an_error(checkpoints, monkeypatch):
    """Not a run without checkpoints, which would start over."""
    checkpoints.save(1, TENSORS, TEXTS)

    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", fail)
    for read in (checkpoints.steps, checkpoints.set_aside_names, checkpoints.clean):
        with pytest.raises(PermissionError):
            read()


def test_a_foreign_checkpoint_is_set_aside_under_its_kind(checkpoints):
    for kind in ("foreign", "damaged", "foreign"):
        checkpoints.save(1, TENSORS, TEXTS)
        checkpoints.set_aside(1, kind)
    assert checkpoints.set_aside_names() == [
        "step-00000001.damaged",
        "step-00000001.foreign",
        "step-00000001.foreign-2",
    ]
