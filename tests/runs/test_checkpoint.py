"""Checkpoint folders: content, damage, atomicity, pruning, and several processes that write one."""

import os
import resource
import shutil
from dataclasses import dataclass, field

import pytest
import torch

from fusedlm.distributed import World
from fusedlm.runs import checkpoint as checkpoint_module
from fusedlm.runs.checkpoint import Checkpoints, DamagedCheckpoint

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
    temporary = checkpoints.directory / "step-00000002.tmp"
    temporary.mkdir()
    (temporary / "model.safetensors").write_bytes(b"half")
    assert checkpoints.steps() == [1]
    checkpoints.clean()
    assert [entry.name for entry in checkpoints.directory.iterdir()] == ["step-00000001"]


def test_a_replacement_interrupted_between_its_renames_is_undone(checkpoints):
    path = checkpoints.save(1, TENSORS, TEXTS)
    path.rename(path.with_name("step-00000001.replaced"))
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

    monkeypatch.setattr(checkpoint_module, "save_file", interrupted)
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


@dataclass(frozen=True)
class _Rank(World):
    """A process of two that notes what exists at each barrier, in place of waiting."""

    folder: object = None
    seen: list = field(default_factory=list)

    def barrier(self):
        paths = sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))
        self.seen.append(paths)


def test_each_process_writes_its_part_and_the_main_one_the_rest(checkpoints, tmp_path):
    """Rank 1 runs inside each step of rank 0, as if both ran at once."""
    calls = []

    def write(folder, stem, tensors, world):
        calls.append((world.rank, stem, sorted(tensors)))
        (folder / f"{stem}-{world.rank}.bin").write_bytes(b"part")

    ranks = [_Rank(rank, 2, tmp_path) for rank in range(2)]
    temporary = "checkpoints/step-00000003.tmp"

    def write_both(folder, stem, tensors, world):
        write(folder, stem, tensors, world)
        write(folder, stem, tensors, ranks[1])

    checkpoints.save(3, {"model": {"a": torch.zeros(2)}}, TEXTS, write=write_both, world=ranks[0])
    assert calls == [(0, "model", ["a"]), (1, "model", ["a"])]
    before_writing, before_sealing, after = ranks[0].seen
    assert before_writing == ["checkpoints", temporary]
    assert before_sealing == [
        "checkpoints",
        temporary,
        f"{temporary}/model-0.bin",
        f"{temporary}/model-1.bin",
    ]
    assert "checkpoints/step-00000003/manifest.json" in after and temporary not in after
    assert set(checkpoints.files(3)) == {"model-0.bin", "model-1.bin", "state.json"}
    checkpoints.verify(3)


def test_a_process_that_is_not_the_main_one_writes_its_part_alone(checkpoints, tmp_path):
    def write(folder, stem, tensors, world):
        (folder / f"{stem}-{world.rank}.bin").write_bytes(b"part")

    (checkpoints.directory / "step-00000003.tmp").mkdir(parents=True)  # by the main process
    world = _Rank(1, 2, tmp_path)
    checkpoints.save(3, {"model": {}}, TEXTS, write=write, world=world)
    found = sorted(str(path.relative_to(checkpoints.directory)) for path in checkpoints.directory.rglob("*"))
    assert found == ["step-00000003.tmp", "step-00000003.tmp/model-1.bin"]
    assert len(world.seen) == 3, "as many barriers as the main process"


def test_the_default_writer_writes_full_tensors_once(checkpoints, tmp_path):
    (checkpoints.directory / "step-00000003.tmp").mkdir(parents=True)
    checkpoints.save(3, TENSORS, TEXTS, world=_Rank(1, 2, tmp_path))
    assert list((checkpoints.directory / "step-00000003.tmp").iterdir()) == []
