"""metrics.jsonl: appending, reading, damaged lines."""

import json

import pytest

from fusedlm.runs.metrics import MetricsFile, _digest, audit_metrics, read_metrics


def test_records_can_be_read_as_soon_as_they_are_written(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", after_step=0)
    metrics.write({"step": 1, "loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == ([{"step": 1, "loss": 2.5}], [])
    metrics.close()


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", after_step=0)
    metrics.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "mfu": None})
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert line.startswith('{"step": 1, "loss": null, "grad_norm": null, "mfu": null, "check": "')


def test_nor_are_those_in_lists(tmp_path):
    """As of heads and layers in a step that was skipped."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl", after_step=0)
    metrics.write({"step": 1, "loss": 2.0, "mtp_loss": [float("nan"), 1.5], "layers": [[float("-inf")], (0.5, 2)]})
    metrics.close()
    ((record,), damaged) = read_metrics(tmp_path / "metrics.jsonl")
    assert not damaged and record["mtp_loss"] == [None, 1.5] and record["layers"] == [[None], [0.5, 2]]


def test_opening_removes_records_after_the_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 1, "loss": 0.1}\n',
        '{"step": 2, "loss": 0.30000000000000004}\n',
        '{"step": 2, "val_bpb": 1.0}\n',
    ]
    path.write_text("".join([*lines, '{"step": 3, "loss": 0.2}\n', '{"step": 4, "lo']))
    metrics = MetricsFile(path, after_step=2)
    assert path.read_text() == "".join(lines)
    metrics.write({"step": 3, "loss": 0.4})
    metrics.close()
    assert [record["step"] for record in read_metrics(path)[0]] == [1, 2, 2, 3]


def test_damaged_lines_are_reported_by_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1}\n\xff\xfe\n[]\n{"loss": 1}\n{"step": "x"}\n' + b"[" * 100_000 + b'\n{"step": 2}\ntorn'
    )
    assert read_metrics(path) == ([{"step": 1}, {"step": 2}], [2, 3, 4, 5, 6])


def test_a_missing_file_has_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == ([], [])


@pytest.fixture
def written(tmp_path):
    """A file of six steps, with validations at 2, 4 and 6; its path and its check after step 4."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, after_step=0)
    for step in range(1, 7):
        metrics.write({"step": step, "loss": 1 / step, "levels": (1, 2), "of": {3: None}})
        if step % 2 == 0:
            metrics.write({"step": step, "val_bpb": 2.5, "name": "é"})
        if step == 4:
            check = metrics.check
    metrics.close()
    return path, check


def edited(path, edit):
    lines = path.read_text().splitlines(keepends=True)
    edit(lines)
    path.write_text("".join(lines))
    return audit_metrics(path).problems


def remove(first, last=None):
    def edit(lines):
        del lines[first - 1 : last or first]

    return edit


def change(number, old, new):
    def edit(lines):
        assert old in lines[number - 1]
        lines[number - 1] = lines[number - 1].replace(old, new)

    return edit


def swap(lines):
    lines[4], lines[5] = lines[5], lines[4]


def repeat(lines):
    lines.insert(4, lines[3])


def forge(lines):
    """A line whose check fits it, but not the lines after it."""
    record = json.loads(lines[3]) | {"loss": 0.1}
    del record["check"]
    check = _digest(json.loads(lines[2])["check"], record)
    lines[3] = json.dumps(record | {"check": check}) + "\n"


@pytest.mark.parametrize(
    ("edit", "problems"),
    [
        (change(4, '"loss": 0.3', '"loss": 0.2'), ["line 4 (step 3) was changed, or a line before it was removed"]),
        (change(9, "2.5", "2.4"), ["line 9 (step 6) was changed, or a line before it was removed"]),
        (change(1, '{"step": 1, ', '{ "step": 1,'), []),
        (remove(4), ["step 3 is missing"]),
        (remove(2, 7), ["steps 2 to 5 are missing"]),
        (remove(1), ["step 1 is missing"]),
        (remove(3), ["line 3 (step 3) was changed, or a line before it was removed"]),
        (remove(5), ["step 4 is missing"]),
        (change(9, "check", "chess"), ["line 9 (step 6) was changed, or a line before it was removed"]),
        (swap, ["step 4 is missing", "line 6 (step 4) was changed, or a line before it was removed"]),
        (repeat, ["step 3 is recorded after step 3"]),
        (forge, ["line 5 (step 4) was changed, or a line before it was removed"]),
        (change(8, '"step": 6', '"step": 8'), ["steps 6 to 7 are missing"]),
    ],
)
def test_changed_and_missing_lines_are_found(written, edit, problems):
    found = edited(written[0], edit)
    assert found[: len(problems)] == problems and bool(found) == bool(problems)


def test_every_flipped_bit_shows(written):
    path, _ = written
    content = path.read_bytes()
    records, damaged = read_metrics(path)
    assert damaged == [] and audit_metrics(path).problems == []
    for position in range(0, len(content) - 1, 3):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        audit = audit_metrics(path)
        assert audit.damaged or audit.problems or audit.records == records, position


def test_the_position_of_a_checkpoint_is_found_by_its_check(written):
    """A validation that was recorded after the checkpoint of its step is removed: it is repeated."""
    path, check = written
    before = path.read_bytes().splitlines(keepends=True)
    checks = [json.loads(line)["check"] for line in before]
    for number in (5, 6):
        metrics = MetricsFile(path, 4, checks[number - 1])
        metrics.close()
        assert metrics.problems == [] and metrics.check == checks[number - 1]
        assert path.read_bytes() == b"".join(before[:number])
        path.write_bytes(b"".join(before))
    assert check == checks[5]


def test_records_that_a_checkpoint_has_and_the_file_has_not(written):
    path, check = written
    lines = path.read_bytes().splitlines(keepends=True)
    assert audit_metrics(path, 4, check).problems == []
    assert audit_metrics(path, 4, "0" * 16).problems == ["the records up to step 4 are not those of its checkpoint"]
    path.write_bytes(b"".join(lines[:4]))
    assert audit_metrics(path).problems == []
    assert audit_metrics(path, 4, check).problems == ["step 4 is missing"]
    path.unlink()
    assert audit_metrics(path, 4, check).problems == ["steps 1 to 4 are missing"]


def test_lines_of_an_earlier_version_are_kept_and_bound_by_the_lines_after_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    old = '{"step": 1, "loss": 1.0}\n{"step": 2,  "loss": 1.0}\n'
    path.write_text(old)
    metrics = MetricsFile(path, after_step=2)
    metrics.write({"step": 3, "loss": 0.5})
    metrics.close()
    assert metrics.problems == [] and path.read_text().startswith(old)
    assert audit_metrics(path).problems == []
    assert edited(path, change(1, "1.0", "1.1")) == ["line 3 (step 3) was changed, or a line before it was removed"]


def test_a_file_that_has_nothing_to_remove_is_not_written(written):
    path, _ = written
    before = path.stat().st_ino
    MetricsFile(path, after_step=6).close()
    assert path.stat().st_ino == before
