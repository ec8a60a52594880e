"""Atomic writing: content, modes, links, collisions, leftovers, and errors that change nothing."""

import multiprocessing
import os
import stat

import pytest

from fusedlm import files
from fusedlm.files import remove_leftovers, write_atomic


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_text_is_utf_8_and_new_files_follow_the_umask(tmp_path):
    write_atomic(tmp_path / "page", "é\r\n")
    assert (tmp_path / "page").read_bytes() == b"\xc3\xa9\r\n"
    assert mode(tmp_path / "page") == 0o640


def test_a_replaced_file_keeps_its_mode(tmp_path):
    (tmp_path / "page").write_text("old")
    (tmp_path / "page").chmod(0o664)
    write_atomic(tmp_path / "page", b"new")
    assert (tmp_path / "page").read_text() == "new" and mode(tmp_path / "page") == 0o664


def test_a_file_that_holds_the_content_is_not_written(tmp_path):
    path = tmp_path / "page"
    write_atomic(path, "same")
    before = path.stat()
    write_atomic(path, "same")
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    write_atomic(path, "sale")
    assert path.read_text() == "sale" and path.stat().st_ino != before.st_ino


def test_content_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def spy_fsync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.pread(descriptor, 9, 0))
        fsync(descriptor)

    def spy_replace(source, target):
        events.append("rename")
        replace(source, target)

    # A descriptor that can be read, to see what the file holds when it is flushed.
    monkeypatch.setattr(os, "O_WRONLY", os.O_RDWR)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_atomic(tmp_path / "page", "text")
    assert events == [b"text", "rename", "folder"]


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("precious")
    names = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: next(names))
    link = tmp_path / f".fusedlm-{'0' * 16}.tmp"
    link.symlink_to(tmp_path / "precious")
    write_atomic(tmp_path / "page", "text")
    assert (tmp_path / "precious").read_text() == "precious" and link.is_symlink()
    assert (tmp_path / "page").read_text() == "text"


def test_a_link_is_replaced_and_its_target_kept(tmp_path):
    (tmp_path / "target").write_text("target")
    (tmp_path / "page").symlink_to(tmp_path / "target")
    write_atomic(tmp_path / "page", "text")
    assert (tmp_path / "target").read_text() == "target"
    assert (tmp_path / "page").read_text() == "text" and not (tmp_path / "page").is_symlink()


def _write_often(path, content):
    for _ in range(15):
        write_atomic(path, content)
        write_atomic(path, content[::-1])


def test_processes_that_write_one_file_do_not_collide(tmp_path):
    context = multiprocessing.get_context("fork")
    contents = [str(i) * 1000 for i in range(4)]
    processes = [context.Process(target=_write_often, args=(tmp_path / "page", content)) for content in contents]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "page").read_text() in contents
    assert [entry.name for entry in tmp_path.iterdir()] == ["page"]


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    leftover = tmp_path / f".fusedlm-{'a' * 16}.tmp"
    own = ["page.tmp", ".fusedlm-notes.tmp", f".fusedlm-{'A' * 16}.tmp", f".fusedlm-{'a' * 16}.tmp.txt"]
    for name in own:
        (tmp_path / name).write_text("of the user")
    (tmp_path / f".fusedlm-{'b' * 16}.tmp").mkdir()
    (tmp_path / f".fusedlm-{'c' * 16}.tmp").symlink_to("page.tmp")
    before = sorted(entry.name for entry in tmp_path.iterdir())
    leftover.write_text("half")
    write_atomic(tmp_path / "page", "text")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*before, "page"])
    assert all((tmp_path / name).read_text() == "of the user" for name in own)


def test_a_file_that_is_being_written_is_no_leftover(tmp_path):
    descriptor, temporary = files._create(tmp_path)
    remove_leftovers(tmp_path)
    assert temporary.exists()
    os.close(descriptor)  # as when the process is killed
    remove_leftovers(tmp_path)
    assert not temporary.exists()


@pytest.mark.parametrize("kind", ["folder", "fifo", "missing folder", "full disk"])
def test_errors_name_the_file_and_change_nothing(tmp_path, monkeypatch, kind):
    path = tmp_path / "page"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "missing folder":
        path = tmp_path / "absent" / "page"
    else:
        path.write_text("old")

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
    before = {entry.name: entry.stat().st_ino for entry in tmp_path.iterdir()}
    with pytest.raises(OSError, match=f"{path} could not be written: ") as caught:
        write_atomic(path, "new")
    assert "\n" not in str(caught.value)
    assert {entry.name: entry.stat().st_ino for entry in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_listed_can_be_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    write_atomic(tmp_path / "page", "text")
    assert (tmp_path / "page").read_text() == "text"


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "page", "text")
    assert list(tmp_path.iterdir()) == []
