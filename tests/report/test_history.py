"""Metrics as columns, smoothing, thinning."""

import json

import numpy as np
import pytest

from fusedlm.report.history import read_history, smooth, thin


def read(tmp_path, text):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "metrics.jsonl").write_bytes(data)
    return read_history(tmp_path)


def line(step, **values):
    return json.dumps({"step": step, "loss": 3.0, "tokens": 10 * step, **values}) + "\n"


def test_steps_and_validations_become_columns(tmp_path):
    text = line(1, lr=0.5) + line(2, mfu=None) + json.dumps({"step": 2, "val_bpb": 1.5, "tokens": 20}) + "\n"
    history = read(tmp_path, text)
    assert history.steps["step"].tolist() == [1, 2]
    np.testing.assert_array_equal(history.steps["lr"], [0.5, np.nan])
    assert history.validation["val_bpb"].tolist() == [1.5]
    assert history.skipped == []


def test_losses_of_layers_are_columns_of_their_own(tmp_path):
    history = read(tmp_path, line(1) + line(2, loss_routed_budget=0.5) + line(3, loss_z=1, loss_routed_budget=None))
    assert sorted(history.layer_losses) == ["routed_budget", "z"]
    np.testing.assert_array_equal(history.layer_losses["routed_budget"], [np.nan, 0.5, np.nan])
    np.testing.assert_array_equal(history.layer_losses["z"], [np.nan, np.nan, 1.0])
    assert history.steps["loss"].tolist() == [3.0, 3.0, 3.0]
    with pytest.raises(ValueError, match="metrics.jsonl line 2: loss_z='much': not a number"):
        read(tmp_path, line(1) + line(2, loss_z="much"))


def test_sources_have_the_counts_of_the_last_step(tmp_path):
    first = line(1, source_tokens_web=10, source_epochs_web=0.5, source_tokens_code=0, source_epochs_code=0.0)
    last = line(2, source_tokens_web=15, source_epochs_web=0.75, source_tokens_code=5, source_epochs_code=2.5)
    assert read(tmp_path, first + last).sources == {"code": (5, 2.5), "web": (15, 0.75)}
    assert read(tmp_path, line(1)).sources == {}


def test_loads_of_experts_are_a_table_of_layers(tmp_path):
    layers = [[0.9, 1.5, 0], [0.8, 2.0, 1]]
    history = read(tmp_path, line(1) + line(2, moe_layers=layers, moe_dead=1) + line(3, moe_layers=[[0.9, None, 0]]))
    nan = np.nan
    np.testing.assert_array_equal(history.max_loads, [[nan, nan], [1.5, 2.0], [nan, nan]])
    np.testing.assert_array_equal(history.steps["moe_dead"], [nan, 1, nan])
    assert read(tmp_path, line(1)).max_loads is None
    for damaged in ("much", [1.0], [[1.0, 2.0]], [[0.9, "much", 0]]):
        with pytest.raises(ValueError, match="metrics.jsonl line 2: moe_layers=.*: not (three numbers|a number)"):
            read(tmp_path, line(1) + line(2, moe_layers=damaged))


def test_skipped_steps_are_listed(tmp_path):
    history = read(tmp_path, line(1) + line(2, loss=None, skipped=True) + line(3))
    assert history.skipped == [2]
    assert np.isnan(history.steps["loss"][1])


def test_the_later_record_of_a_step_counts(tmp_path):
    history = read(tmp_path, line(1) + line(2, loss=5.0) + line(2, loss=4.0))
    assert history.steps["loss"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}', "\0\0\0", "\xff"])
def test_an_incomplete_last_line_is_skipped(tmp_path, torn):
    assert read(tmp_path, line(1) + torn).steps["step"].tolist() == [1]


def test_values_that_are_not_finite_count_as_missing(tmp_path):
    history = read(tmp_path, line(1, lr=float("nan"), grad_norm=float("inf"), mfu=10**400))
    assert all(np.isnan(history.steps[name][0]) for name in ("lr", "grad_norm", "mfu"))


@pytest.mark.parametrize(
    "bad",
    [
        b"garbage\n",
        b'{"step": 2, "lo\n',
        b"[1, 2]\n",
        b'"text"\n',
        b'{"loss": 3.0}\n',
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
        line(2, loss="three").encode(),
        line(2, lr=True).encode(),
        line(2, tokens=None).encode(),
        b'{"step": 2, "val_bpb": {}, "tokens": 3}\n',
    ],
)
def test_a_bad_line_is_named(tmp_path, bad):
    with pytest.raises(ValueError, match="metrics.jsonl line 2") as caught:
        read(tmp_path, line(1).encode() + bad + line(3).encode())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_missing_metrics_and_missing_steps_are_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_history(tmp_path)
    with pytest.raises(ValueError, match="no training step"):
        read(tmp_path, "")
    with pytest.raises(ValueError, match="no training step"):
        read(tmp_path, '{"step": 1, "val_bpb": 2.0, "tokens": 1}\n')


def test_smoothing_is_the_weighted_average_of_both_sides():
    values = np.array([4.0, np.nan, 1.0, 7.0])
    weights = 0.5 ** (np.abs(np.subtract.outer(np.arange(4), np.arange(4))) / 2)
    weights[:, 1] = 0
    expected = weights @ np.nan_to_num(values) / weights.sum(1)
    expected[1] = np.nan
    np.testing.assert_allclose(smooth(values, 2), expected, rtol=1e-12)


def test_smoothing_keeps_a_constant_and_a_straight_line():
    np.testing.assert_allclose(smooth(np.full(50, 3.0), 4), 3.0, rtol=1e-12)
    np.testing.assert_allclose(smooth(np.arange(201.0), 2)[50:150], np.arange(50, 150), rtol=1e-7)


def test_smoothing_missing_values_gives_missing_values():
    assert np.isnan(smooth(np.full(5, np.nan), 2)).all()


def test_thinning_keeps_extremes_and_order():
    x = np.arange(100_000.0)
    y = np.sin(x)
    y[54_321], y[777] = 50.0, np.nan
    few_x, few_y = thin(x, y)
    assert len(few_x) <= 4000 and (np.diff(few_x) > 0).all()
    assert few_y.max() == 50.0 and few_x[few_y.argmax()] == 54_321
    assert few_y.min() == np.nanmin(y)


def test_few_points_are_not_thinned():
    x = np.arange(10.0)
    assert thin(x, x)[0] is x
