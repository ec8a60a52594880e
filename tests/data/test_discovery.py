"""The files that a path names: everything is read, or the run refuses and names what it could not read."""

import os
from pathlib import Path

import pytest

from fusedlm.config.data import DataConfig, HashSplit, JSONLSource, TextSource
from fusedlm.data import prepare
from fusedlm.data.discovery import find_files
from fusedlm.data.sources import open_source


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def found(folder: Path, pattern: str = "", suffixes=None) -> list[str]:
    path = f"{folder}/{pattern}" if pattern else str(folder)
    return [file.relative_to(folder).as_posix() for file in find_files(path, suffixes)]


def refusal(path: Path | str, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        find_files(str(path), None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("pattern", ["", "**", "*", "**/*", "**/*.txt"])
def test_links_to_folders_and_files_are_followed(tmp_path, pattern):
    make(tmp_path, "data/a.txt", "elsewhere/sub/b.txt", "elsewhere/c.txt")
    os.symlink("../elsewhere", tmp_path / "data" / "link")
    os.symlink("../elsewhere/c.txt", tmp_path / "data" / "d.txt")
    assert found(tmp_path / "data", pattern) == ["a.txt", "d.txt", "link/c.txt", "link/sub/b.txt"]


@pytest.mark.parametrize("pattern", ["", "**", "*", "**/*.txt"])
def test_loops_of_links_end_and_each_text_is_read_once(tmp_path, pattern, caplog):
    make(tmp_path, "data/a/x.txt", "data/b/y.txt")
    for at, target in (("a/up", ".."), ("a/again", "."), ("a/b", "../b"), ("b/a", "../a"), ("first", "b")):
        os.symlink(target, tmp_path / "data" / at)
    assert found(tmp_path / "data", pattern) == ["a/x.txt", "b/y.txt"]
    [said] = warnings(caplog)
    assert "left out links to folders that are read already (" in said and said.endswith("and 2 more)")


@pytest.mark.parametrize("pattern", ["", "*", "**/*.txt", "*/x.txt"])
@pytest.mark.parametrize("target", ["nowhere", "loop.txt"])
def test_links_to_nothing_are_refused(tmp_path, pattern, target):
    make(tmp_path, "a/x.txt")
    os.symlink(target, tmp_path / "loop.txt")
    message = refusal(tmp_path / pattern)
    assert message.startswith(f"{tmp_path}/loop.txt: a link to '{target}', which cannot be read (")
    assert message.endswith("mend or remove it")
    assert refusal(tmp_path / "loop.txt") == message


@pytest.mark.parametrize("pattern", ["", "*", "**/*.txt", "*/*"])
def test_folders_that_cannot_be_listed_are_refused(tmp_path, pattern, monkeypatch):
    make(tmp_path, "a.txt", "closed/b.txt")
    scandir = os.scandir

    def refuse(path):  # root may list everything
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert f"Permission denied: '{tmp_path}/closed'" in refusal(tmp_path / pattern, PermissionError)


def test_pipes_and_sockets_in_a_folder_are_refused(tmp_path):
    make(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe")
    for pattern in ("", "*", "pip?"):
        assert refusal(tmp_path / pattern).startswith(f"{tmp_path}/pipe: neither a file nor a folder")
    assert "neither a file, a folder nor a pipe" in error(TextSource(path="/dev/null"))


def error(source) -> str:
    with pytest.raises(ValueError) as caught:
        open_source(source)
    return str(caught.value)


def test_patterns(tmp_path):
    make(tmp_path, "a.txt", "b/c.txt", "b/d/e.txt", "b/d/f.md", ".h/i.txt", "b/.j.txt", "x[1].txt")
    for pattern, expected in {
        "*.txt": ["a.txt", "x[1].txt"],
        "**/*.txt": ["a.txt", "b/c.txt", "b/d/e.txt", "x[1].txt"],
        "**/d/*": ["b/d/e.txt", "b/d/f.md"],
        "b/**": ["b/c.txt", "b/d/e.txt", "b/d/f.md"],
        "*/": ["b/c.txt", "b/d/e.txt", "b/d/f.md"],
        "*/d/e.txt": ["b/d/e.txt"],
        "?": ["b/c.txt", "b/d/e.txt", "b/d/f.md"],
        "**/**/e.*": ["b/d/e.txt"],
        ".*/*": [".h/i.txt"],
        "b/.*": ["b/.j.txt"],
        "x[[]1].txt": ["x[1].txt"],
        "[!a-b]*.txt": ["x[1].txt"],
        "x[1].txt": ["x[1].txt"],
    }.items():
        assert found(tmp_path, pattern) == expected, pattern
    for pattern in ("*.pdf", "z/*", "**/z/*.txt", "a.txt/*"):
        assert refusal(tmp_path / pattern) == f"{tmp_path}/{pattern}: no file matches"


def test_brackets_in_the_name_of_a_folder(tmp_path):
    make(tmp_path, "d[1]/a.txt", "d1/b.txt")
    assert found(tmp_path, "d[1]/*.txt") == ["d[1]/a.txt"]
    assert found(tmp_path, "d[0-9]/*.txt") == ["d1/b.txt"]


def test_relative_patterns_and_the_home_folder(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "b/c.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("**/*.txt", None) == [Path("a.txt"), Path("b/c.txt")]
    assert find_files("~/*.txt", None) == [tmp_path / "a.txt"]
    assert find_files("~/b", None) == [tmp_path / "b" / "c.txt"]


def test_other_files_are_left_out_in_one_line(tmp_path, caplog):
    make(tmp_path, "a.jsonl", "B.JSONL.GZ", "README.md", "LICENSE", "c.csv", "d.txt")
    suffixes = (".jsonl", ".jsonl.gz")
    assert found(tmp_path, suffixes=suffixes) == ["B.JSONL.GZ", "a.jsonl"]
    listed = ", ".join(f"{tmp_path}/{name}" for name in ("LICENSE", "README.md", "c.csv"))
    expected = f"{tmp_path}: left out 4 files that are not .jsonl ({listed} and 1 more)"
    assert warnings(caplog) == [expected]
    found(tmp_path, suffixes=suffixes)
    assert warnings(caplog) == [expected]  # once


RUN = {"tokenizer.meta.json": '{"type": "bytes", "fingerprint": "' + "0" * 64 + '"}', "metrics.jsonl": '{"step": 1}\n'}
STARTED = {"environment.json": '{"fusedlm": "1", "torch": "2", "device": "cpu"}', "recipe.yaml": "name: a\n"}
EXPERIMENT = {"experiment.yaml": "name: a\n", "identity.json": '{"experiment": {}, "seeds": [0], "variants": {}}'}
PREPARED = {"manifest.json": '{\n "format": "fusedlm prepared data",\n "version": 1\n}'}
LIKE = {"environment.json": '{"torch": "2"}', "manifest.json": '{"format": 1}', "identity.json": "[]"}


@pytest.mark.parametrize("content", [RUN, STARTED, EXPERIMENT, PREPARED])
def test_what_fusedlm_wrote_is_left_out(tmp_path, content, caplog):
    make(tmp_path, "data/a.json", "data/sub/b.json")
    (tmp_path / "data" / "sub" / "own").mkdir()
    for name, text in content.items():
        (tmp_path / "data" / "sub" / "own" / name).write_text(text)
    make(tmp_path, "data/sub/own/deep/c.json")
    for pattern in ("", "**", "**/*.json", "*/*"):
        names = found(tmp_path / "data", pattern)
        assert names == (["sub/b.json"] if pattern == "*/*" else ["a.json", "sub/b.json"])
    assert all(said.endswith(f": left out what fusedlm wrote ({tmp_path}/data/sub/own)") for said in warnings(caplog))
    assert len(warnings(caplog)) == 4
    assert "of fusedlm, not text; name the text that it was made from" in refusal(tmp_path / "data" / "sub" / "own")
    assert f"no file matches; left out what fusedlm wrote ({tmp_path}/data/sub/own)" in refusal(
        tmp_path / "data" / "sub" / "*" / "*.json"
    )


def test_files_of_the_same_names_are_read(tmp_path):
    for name, text in LIKE.items():
        make(tmp_path, f"data/{name}")
        (tmp_path / "data" / name).write_text(text)
    assert found(tmp_path / "data") == sorted(LIKE)


def test_preparing_into_the_data_folder_gives_the_same_text_again(tmp_path):
    make(tmp_path, *(f"{i}.txt" for i in range(12)))
    settings = DataConfig(
        source=TextSource(path=str(tmp_path)), split=HashSplit(fraction=0.3), dir=str(tmp_path / "prepared")
    )
    first = prepare(settings)
    assert prepare(settings).directory == first.directory and first.manifest["files_read"] == 12


def test_a_folder_of_other_files_says_so(tmp_path):
    make(tmp_path, "README.md")
    expected = f"no .jsonl file in this directory; left out 1 file that is not .jsonl ({tmp_path}/README.md)"
    assert expected in error(JSONLSource(path=str(tmp_path)))
