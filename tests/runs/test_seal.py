"""Sealed records: what was written comes back, and anything else is refused."""

import json

import pytest

from fusedlm.runs.seal import seal, unseal

RECORD = {"outcome": "finished", "final": {"val_bpb": 1.25, 10: (1, 2), 9: None}}


def test_a_sealed_record_survives_json():
    text = json.dumps(seal(RECORD, "record of a-seed0"), indent=1)
    expected = {"outcome": "finished", "final": {"val_bpb": 1.25, "10": [1, 2], "9": None}}
    assert unseal(json.loads(text), "record of a-seed0") == expected


@pytest.mark.parametrize(
    "change",
    [{"outcome": "diverged"}, {"final": {"val_bpb": 1.24, "10": [1, 2], "9": None}}, {"more": 1}, {"sha256": None}],
)
def test_a_changed_record_is_refused(change):
    with pytest.raises(ValueError, match=r"^record of a-seed0: its content is not what was written"):
        unseal(seal(RECORD, "record of a-seed0") | change, "record of a-seed0")


def test_a_record_under_another_name_is_refused():
    with pytest.raises(ValueError, match="record of a-seed1: its content is not what was written"):
        unseal(seal(RECORD, "record of a-seed0"), "record of a-seed1")


def test_a_record_without_a_checksum_is_accepted_only_where_it_may_be_an_earlier_one():
    assert unseal({"outcome": "finished"}, "record", required=False) == {"outcome": "finished"}
    for record in ({"outcome": "finished"}, {}):
        with pytest.raises(ValueError, match="not what was written"):
            unseal(record, "record")


def test_the_key_of_the_checksum_is_reserved():
    with pytest.raises(ValueError, match="'sha256' is reserved"):
        seal({"sha256": "abc"}, "record")
