"""Kernels of a trace beside their floors."""

import pytest

from benchmarks.harness import Ceilings
from benchmarks.kernel_table import rows_of, summary

CEILINGS = Ceilings(bytes_per_second=1e12, flops_per_second=1e14)


def _op(number, name, dims, types):
    return {"cat": "cpu_op", "name": name, "args": {"External id": number, "Input Dims": dims, "Input type": types}}


def _kernel(number, name, microseconds):
    return {"cat": "kernel", "name": name, "dur": microseconds, "args": {"External id": number}}


def test_floors():
    bf16 = "c10::BFloat16"
    events = [
        _op(1, "aten::mm", [[100, 200], [200, 50]], [bf16, bf16]),
        _kernel(1, "gemm", 2.0),
        _kernel(1, "gemm", 2.0),  # the product in two launches has the floor of one
        _op(2, "triton_poi_fused_add", [[1000], [], [1000]], ["float", "Scalar", bf16]),
        _kernel(2, "triton_poi_fused_add", 0.006),
        _op(3, "aten::copy_", [[10], [10]], ["float", "float"]),
        _kernel(3, "memcpy32", 5.0),
        _op(
            4,
            "fusedlm::linear_softcap_cross_entropy",
            [[64, 8], [500, 8], [64], [64]],
            [bf16, bf16, "long int", "float"],
        ),
        _kernel(4, "_both_kernel", 0.5),
        _op(
            5, "aten::_scaled_dot_product_cudnn_attention", [[2, 4, 16, 24], [2, 4, 16, 24], [2, 4, 16, 8]], [bf16] * 3
        ),
        _kernel(5, "sdpa", 1.0),
        _op(
            6,
            "aten::_scaled_dot_product_cudnn_attention_backward",
            [[2, 4, 16, 8], [2, 4, 16, 24], [2, 4, 16, 24], [2, 4, 16, 8]],
            [bf16] * 4,
        ),
        _kernel(6, "sdpa_backward", 1.0),
        _op(7, "fusedlm::relu2_mlp_backward", [[10, 8], [10, 8], [32, 8], [8, 32], [10, 32]], [bf16] * 5),
        _kernel(7, "_down_backward_kernel", 1.0),
        {"cat": "kernel", "name": "orphan", "dur": 1.0, "args": {}},
        {"cat": "cpu_op", "name": "no arguments"},
    ]
    rows = {row.kernel: row for row in rows_of(events, CEILINGS)}
    assert rows["gemm"].calls == 2 and rows["gemm"].milliseconds == pytest.approx(4e-3)
    assert rows["gemm"].floor_ms == pytest.approx(1e3 * 2 * 100 * 200 * 50 / 1e14)
    assert rows["triton_poi_fused_add"].share_of_floor == pytest.approx(1)
    assert rows["_both_kernel"].floor_ms == pytest.approx(1e3 * 2 * 64 * 500 * 2 / 1e12)
    assert rows["sdpa"].floor_ms == pytest.approx(1e3 * 2 * 4 * 16 * 16 * (24 + 8) / 1e14)
    assert rows["sdpa_backward"].floor_ms == pytest.approx(2.5 * rows["sdpa"].floor_ms)
    assert rows["_down_backward_kernel"].floor_ms == pytest.approx(1e3 * 2 * 10 * 8 * 32 / 1e14)
    assert rows["memcpy32"].floor_ms is None and rows["orphan"].floor_ms is None
    found = summary(list(rows.values()))
    assert found["kernel_ms"] == pytest.approx(13.506e-3)
    assert found["share_near_floor"] == pytest.approx(0.006 / 13.506)
    assert found["share_of_unknown_floor"] == pytest.approx(6 / 13.506)
    assert len(found["heaviest"]) == 8
