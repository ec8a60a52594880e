"""metrics.jsonl: appending, reading, damaged lines."""

from fusedlm.runs.metrics import MetricsFile, read_metrics


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
