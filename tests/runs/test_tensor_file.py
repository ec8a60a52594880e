"""Safetensors files that are written in chunks."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from fusedlm.runs import tensor_file
from fusedlm.runs.tensor_file import Cancelled, write_tensor_file

_FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
_INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
TABLES = {
    "every dtype": {str(d): torch.arange(5).to(d).reshape(5, 1) for d in (*_FLOATS, *_INTEGERS, torch.bool)},
    "shapes": {"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3), "b": torch.ones(2, 3, 4), "a": torch.ones(7)},
    "names": {'with "quotes"': torch.ones(1), "with\nline": torch.ones(2), "héad/ü": torch.ones(3)},
    "nothing": {},
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("metadata", [None, {"pieces": '{"a": [[3], 0, 1]}\né'}])
def test_the_file_is_the_one_of_the_safetensors_package(tmp_path, name, metadata):
    found = write_tensor_file(tmp_path / "ours", TABLES[name], metadata)
    save_file(TABLES[name], tmp_path / "theirs", metadata)
    content = (tmp_path / "ours").read_bytes()
    assert content == (tmp_path / "theirs").read_bytes()
    assert found == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_many_chunks_of_tensors_that_are_not_contiguous(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_CHUNK_BYTES", 7)
    tensors = {"t": torch.arange(30.0).reshape(5, 6).T, "every second": torch.arange(9)[::2]}
    write_tensor_file(tmp_path / "ours", tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_that_is_not_wanted_any_more_ends_at_the_next_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_CHUNK_BYTES", 100)
    asked = []

    def cancelled():
        asked.append(1)
        return len(asked) > 3

    with pytest.raises(Cancelled):
        write_tensor_file(tmp_path / "file", {"a": torch.zeros(1000)}, cancelled=cancelled)
    assert (tmp_path / "file").stat().st_size < 500


def test_a_file_that_exists_is_not_replaced(tmp_path):
    (tmp_path / "file").write_text("of the user")
    with pytest.raises(FileExistsError):
        write_tensor_file(tmp_path / "file", {"a": torch.zeros(1)})
    assert (tmp_path / "file").read_text() == "of the user"


def test_a_dtype_without_a_name_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match=r"tensor 'odd' is torch.complex128"):
        write_tensor_file(tmp_path / "file", {"odd": torch.zeros(1, dtype=torch.complex128)})
    assert not (tmp_path / "file").exists()
