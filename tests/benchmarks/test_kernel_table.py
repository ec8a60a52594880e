"""Kernels of a trace and their floors."""

import importlib

import pytest

from benchmarks.harness import Ceilings
from benchmarks.kernel_table import PASSES, PRODUCTS, rows_of, summary
from fusedlm import ops

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
        _kernel(1, "gemm", 2.0),  # a product in two launches has the floor of one
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
        _kernel(4, "loss_and_gradient_kernel", 0.5),
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
    assert rows["loss_and_gradient_kernel"].floor_ms == pytest.approx(1e3 * 2 * 64 * 500 * 2 / 1e12)
    assert rows["sdpa"].floor_ms == pytest.approx(1e3 * 2 * 4 * 16 * 16 * (24 + 8) / 1e14)
    assert rows["sdpa_backward"].floor_ms == pytest.approx(2.5 * rows["sdpa"].floor_ms)
    assert rows["_down_backward_kernel"].floor_ms == pytest.approx(1e3 * 2 * 10 * 8 * 32 / 1e14)
    assert rows["memcpy32"].floor_ms is None and rows["orphan"].floor_ms is None
    found = summary(list(rows.values()))
    assert found["kernel_ms"] == pytest.approx(13.506e-3)
    assert found["share_near_floor"] == pytest.approx(0.006 / 13.506)
    assert found["share_of_unknown_floor"] == pytest.approx(6 / 13.506)
    assert len(found["heaviest"]) == 8
    groups = found["groups"]
    assert groups["matrix products"]["milliseconds"] == pytest.approx(4e-3)
    assert groups["matrix products"]["above_floor_ms"] == pytest.approx(4e-3 - rows["gemm"].floor_ms)
    assert groups["compiled"]["above_floor_ms"] == pytest.approx(0)
    assert groups["attention"]["milliseconds"] == pytest.approx(2e-3)
    assert groups["fused ops"]["milliseconds"] == pytest.approx(1.5e-3)
    assert groups["other"] == {"milliseconds": 6e-3, "above_floor_ms": 0.0, "unknown_floor_ms": 6e-3}
    assert sum(group["milliseconds"] for group in groups.values()) == pytest.approx(found["kernel_ms"])


BF16 = "c10::BFloat16"
N, D, H, V = 64, 8, 32, 500
MOVED = [  # op, sizes of its arguments, kernel, elements that it reads and writes
    ("softcap_cross_entropy", [[N, V], [N]], "forward_kernel", N * V),
    ("softcap_cross_entropy", [[N, V], [N]], "full_rows_kernel", N * V),
    ("softcap_cross_entropy_backward", [[N], [N, V], [N], [2, N]], "backward_kernel", 2 * N * V),
    ("reduced_softcap_cross_entropy", [[N, V], [N]], "loss_and_gradient_kernel", 2 * N * V),
    ("reduced_softcap_cross_entropy_", [[N, V], [N]], "full_rows_kernel", 2 * N * V),
    ("linear_softcap_cross_entropy_losses", [[N, D], [V, D], [N]], "full_rows_kernel", N * V),
    ("differential_combine", [[2, 4, 3, 8]] * 2, "_forward_kernel", 3 * 192),
    ("differential_combine_backward", [[2, 4, 3, 8]] * 3, "_backward_kernel", 5 * 192),
    ("gated_rmsnorm", [[2, 4, 3, 8], [2, 4, 3, 8], [8], [], []], "_forward_kernel", 3 * 192),
    ("gated_rmsnorm", [[2, 4, 3, 8], [2, 4, 3, 8], [8], [2, 4, 3, 8], [6]], "_forward_kernel", 4 * 192),
    ("gated_rmsnorm_backward", [[2, 4, 3, 8]] * 3 + [[8], [], []], "_backward_kernel", 5 * 192),
    ("gated_rmsnorm_backward", [[2, 4, 3, 8]] * 3 + [[8], [2, 4, 3, 8], [6]], "_backward_kernel", 6 * 192),
    ("mix_inputs", [[N, D], [D], [D], [], [], [], []], "_forward_kernel", 3 * N * D),
    ("mix_inputs", [[N, D], [D], [D], [N, D], [D], [N, D], [D]], "_forward_kernel", 5 * N * D),
    ("mix_inputs_backward", [[N, D]] * 3 + [[D], [D], [], [], [], []], "_backward_kernel", 4 * N * D),
    ("mix_inputs_backward", [[N, D]] * 3 + [[D], [D], [N, D], [D], [N, D], [D]], "_backward_kernel", 8 * N * D),
    ("exclude_own_value", [[2, 4, 6, 8], [2, 4, 3, 8]], "_forward_kernel", 2 * 384 + 192),
    ("exclude_own_value_backward", [[2, 4, 6, 8]] * 2 + [[2, 4, 3, 8]], "_backward_kernel", 3 * 384 + 2 * 192),
    ("short_conv", [[2, 4, 24], [4, 24], [2, 3, 24]], "forward_kernel", 2 * 192),
    ("short_conv_backward", [[[2, 4, 16], [2, 4, 8]], [2, 4, 24], [4, 24], []], "backward_kernel", 3 * 192),
    ("rmsnorm_linear", [[2, N, D], [D], [V, D]], "_normalise_kernel", 2 * 2 * N * D),
    ("rmsnorm_linear_backward", [[N, V], [N, D], [D], [V, D]], "_backward_kernel", 4 * N * D),
    ("swiglu_mlp", [[N, D], [2 * H, D], [D, H]], "_forward_kernel", 3 * N * H),
    ("swiglu_mlp_backward", [[N, D], [N, D], [2 * H, D], [D, H], [N, 2 * H]], "_backward_kernel", 6 * N * H),
]


@pytest.mark.parametrize("op, dims, kernel, elements", MOVED)
def test_floors_of_kernels_that_move_bytes(op, dims, kernel, elements):
    events = [_op(1, f"fusedlm::{op}", dims, [BF16] * len(dims)), _kernel(1, kernel, 1.0)]
    assert rows_of(events, CEILINGS)[0].floor_ms == pytest.approx(1e3 * 2 * elements / CEILINGS.bytes_per_second)


def test_floor_of_the_matmul_after_a_norm():
    events = [
        _op(1, "fusedlm::rmsnorm_linear", [[N, D], [D], [V, D]], [BF16] * 3),
        _kernel(1, "_scaled_matmul_kernel", 1.0),
    ]
    assert rows_of(events, CEILINGS)[0].floor_ms == pytest.approx(1e3 * 2 * N * D * V / CEILINGS.flops_per_second)


def test_the_table_names_kernels_that_exist():
    for op, names in [*PASSES.items(), *PRODUCTS.items()]:
        folder = getattr(ops, op).__module__.removesuffix(".op")
        found = importlib.import_module(f"{folder}.{'kernels' if op == 'softcap_cross_entropy' else 'triton'}")
        assert all(hasattr(found, name) for name in names), op
