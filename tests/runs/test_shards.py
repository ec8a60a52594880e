"""Tables in shards: which files, and their tensors together."""

import json
import re

import pytest
import torch

from fusedlm.distributed import World
from fusedlm.runs.shards import DamagedTable, StoredTensors, own_files, shard_name, table_files, table_of
from fusedlm.runs.tensor_file import write_tensor_file

FULL = {"rows": torch.arange(15.0).reshape(5, 3), "columns": torch.arange(8).reshape(2, 2, 2), "gain": torch.ones(4)}
# Of each file: tensors, and what the metadata says about those that are parts.
FILES = [
    (
        {"rows": FULL["rows"][:3], "columns": FULL["columns"][:, :1], "gain": FULL["gain"]},
        {"rows": [[5, 3], [0, 0]], "columns": [[2, 2, 2], [0, 0, 0]]},
    ),
    (
        {"rows": FULL["rows"][3:], "columns": FULL["columns"][:, 1:]},
        {"rows": [[5, 3], [3, 0]], "columns": [[2, 2, 2], [0, 1, 0]]},
    ),
]


def stored(folder, files=FILES) -> StoredTensors:
    """A table of these files, in the reverse order of the parts."""
    found = StoredTensors()
    for rank, (tensors, pieces) in reversed(list(enumerate(files))):
        path = folder / shard_name("model", rank, len(files))
        write_tensor_file(path, tensors, {"pieces": pieces if isinstance(pieces, str) else json.dumps(pieces)})
        found.add(path)
    found.check()
    return found


def test_parts_are_full_tensors_together(tmp_path):
    found = stored(tmp_path)
    assert list(found) == sorted(FULL) and len(found) == 3
    assert all(torch.equal(found[name], tensor) for name, tensor in FULL.items())
    with pytest.raises(KeyError):
        found["none"]


def _changed(tensors: dict | None = None, pieces: dict | str | None = None) -> list:
    """FILES with another second one."""
    if not isinstance(pieces, str):
        pieces = FILES[1][1] | (pieces or {})
    return [FILES[0], (FILES[1][0] | (tensors or {}), pieces)]


def test_a_tensor_may_be_cut_along_two_dimensions(tmp_path):
    full = torch.arange(24).reshape(4, 3, 2)
    blocks = {(e, r): full[e : e + 2, r : r + 2] for e in (0, 2) for r in (0, 2)}
    files = [({"experts": block.clone()}, {"experts": [[4, 3, 2], [*start, 0]]}) for start, block in blocks.items()]
    assert torch.equal(stored(tmp_path, files)["experts"], full)
    moved = [*files[:3], (files[3][0], {"experts": [[4, 3, 2], [2, 1, 0]]})]
    (tmp_path / "moved").mkdir()
    with pytest.raises(DamagedTable, match="tensor 'experts' .* is not complete"):
        stored(tmp_path / "moved", moved)


DAMAGE = {
    "a part is missing": (FILES[:1], "shard-00001-of-00001.safetensors: tensor 'columns' of shape (2, 2, 2) is not"),
    "too few rows": (_changed({"rows": torch.zeros(1, 3)}), "tensor 'rows' of shape (5, 3) is not complete"),
    "too many rows": (_changed({"rows": torch.zeros(3, 3)}), "tensor 'rows' of shape (5, 3) is not complete"),
    "other columns": (_changed({"rows": torch.zeros(2, 1)}), "tensor 'rows' of shape (5, 3) is not complete"),
    "other dtype": (_changed({"rows": torch.zeros(2, 3).half()}), "tensor 'rows' is another one"),
    "another start": (_changed(pieces={"rows": [[5, 3], [2, 0]]}), "tensor 'rows' of shape (5, 3) is not complete"),
    "another shape": (_changed(pieces={"rows": [[6, 3], [3, 0]]}), "tensor 'rows' is another one"),
    "another dimension": (_changed(pieces={"rows": [[5, 3], [0, 3]]}), "tensor 'rows' of shape (5, 3) is not complete"),
    "one twice": (_changed({"gain": FULL["gain"]}), "tensor 'gain' of shape (4,) is not complete"),
    "outside": ([({"rows": torch.ones(1)}, {"rows": [[1], [3]]})], "tensor 'rows' of shape (1,) is not complete"),
    "not JSON": (_changed(pieces="{"), "its parts are not described as they were written"),
    "a list": (_changed(pieces="[]"), "its parts are not described as they were written"),
    "no numbers": (_changed(pieces={"rows": [["a"], [0]]}), "its parts are not described as they were written"),
    "too few numbers": (_changed(pieces={"rows": [[5, 3]]}), "its parts are not described as they were written"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_parts_that_do_not_fit_are_refused_with_the_file(tmp_path, name):
    files, message = DAMAGE[name]
    with pytest.raises(DamagedTable, match=re.escape(message)) as caught:
        stored(tmp_path, files)
    assert str(caught.value).startswith(f"{tmp_path}/model.shard-0000") and "\n" not in str(caught.value)


def test_the_files_of_a_table_are_known_by_their_names():
    shards = [shard_name("model", rank, 3) for rank in range(3)]
    assert shards[1] == "model.shard-00002-of-00003.safetensors"
    others = ["optimizer.shard-00001-of-00009.safetensors", "state.json", "model.shard-2-of-9.safetensors"]
    assert table_files("model", [*others, *shards]) == shards
    assert table_files("model", [*others, shards[1]]) == shards, "the missing ones too, which reading then names"
    assert table_files("model", ["model.safetensors", *shards]) == ["model.safetensors"]
    assert table_files("model", others) == ["model.safetensors"]
    assert [table_of(name) for name in (shards[2], "ema.safetensors", "state.json")] == ["model", "ema", None]


def test_a_table_without_shards_is_one_file_of_the_main_process():
    tables = {"model": {"a": torch.ones(2)}, "rng": {}}
    assert [(file.name, file.tensors, file.metadata) for file in own_files(tables, World(0, 2))] == [
        ("model.safetensors", tables["model"], {}),
        ("rng.safetensors", {}, {}),
    ]
    assert own_files(tables, World(1, 2)) == []
