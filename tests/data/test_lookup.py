"""Prepared text is known by its content: renamed, swapped and unfinished folders."""

import shutil
from pathlib import Path

import pytest

from fusedlm.config.data import DataConfig, HashSplit, TextSource
from fusedlm.data import open_prepared, prepare
from fusedlm.data.lookup import find_prepared, places
from fusedlm.data.preparation import ChangedText


def config(folder: Path, fraction: float) -> DataConfig:
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("\n--\n".join(f"Document {i}" for i in range(40)))
    source = TextSource(path=str(text), separator="--")
    return DataConfig(source=source, split=HashSplit(fraction=fraction), dir=str(folder / "prepared"))


@pytest.fixture
def two(tmp_path):
    """(config, prepared) of two splits of one text."""
    return [(config(tmp_path, fraction), prepare(config(tmp_path, fraction))) for fraction in (0.2, 0.5)]


def fingerprint(prepared) -> str:
    return prepared.manifest["fingerprint"]


def test_swapped_folders_give_the_text_that_was_asked_for(two, monkeypatch):
    (_, a), (_, b) = two
    a.directory.rename(a.directory.with_name("aside"))
    b.directory.rename(a.directory)
    a.directory.with_name("aside").rename(b.directory)
    for settings, before in two:
        assert prepare(settings).manifest == before.manifest


def test_a_folder_in_the_place_of_another_is_refused(two):
    (settings, a), (_, b) = two
    shutil.rmtree(a.directory)
    b.directory.rename(a.directory)
    with pytest.raises(ValueError, match=f"{a.directory} holds another text .* folders were renamed or swapped"):
        prepare(settings)
    with pytest.raises(ValueError, match="holds another text"):
        open_prepared(a.directory, fingerprint=fingerprint(a))
    assert a.directory.is_dir()


def test_a_renamed_folder_is_not_prepared_again(two):
    (settings, a), _ = two
    renamed = a.directory.rename(a.directory.with_name("mine"))
    assert prepare(settings).directory == renamed
    assert find_prepared(fingerprint(a), [renamed]) == renamed
    assert find_prepared(fingerprint(a), [renamed.parent / "none", renamed.parent]) == renamed
    assert find_prepared("0" * 64, [renamed.parent]) is None


def test_a_folder_that_is_not_finished_is_not_found(two):
    (_, a), _ = two
    a.directory.rename(a.directory.with_name(f".{a.directory.name}.tmp"))
    assert find_prepared(fingerprint(a), [a.directory.parent]) is None


def test_a_damaged_folder_is_found_by_its_name_and_an_intact_one_first(two, tmp_path):
    (settings, a), _ = two
    copy = shutil.copytree(a.directory, tmp_path / "other" / "copy")
    (a.directory / "manifest.json").write_text("{")
    assert find_prepared(fingerprint(a), [a.directory.parent]) == a.directory
    assert find_prepared(fingerprint(a), [a.directory.parent, copy.parent]) == copy
    with pytest.raises(ValueError, match="manifest.json is not JSON; move the folder"):
        prepare(settings)


def test_text_with_another_fingerprint_is_not_prepared(two, tmp_path):
    (settings, a), _ = two
    shutil.rmtree(a.directory)
    (tmp_path / "text.txt").write_text("one\n--\ntwo")
    with pytest.raises(ChangedText, match=f"the text has changed .fingerprint {fingerprint(a)[:12]} then"):
        prepare(settings, fingerprint=fingerprint(a))
    assert len(list(a.directory.parent.glob("[!.]*"))) == 1


def test_places_follow_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = places("data/prepared", Path("/a/runs/one"))
    assert found[0] == tmp_path / "data/prepared"
    assert {Path("/a/data/prepared"), Path("/a/prepared"), Path("/a/runs/one/prepared")} < set(found)
    assert places("/old/prepared", Path("/a/runs/one"))[:2] == [Path("/old/prepared"), Path("/a/runs/one/prepared")]
