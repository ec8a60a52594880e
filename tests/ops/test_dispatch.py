"""Backend selection: from the tensors of a call, cached, logged once, forced, explained, recorded."""

import importlib
import logging
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedlm.ops
from fusedlm.ops import (
    OPS,
    MXTensor,
    QuantizedWeight,
    causal_attention,
    explain,
    gated_scan,
    relu2_mlp,
    softcap_cross_entropy,
)
from fusedlm.ops.common import Backend, Call, Op, check_backends, resolve, runs_fused
from fusedlm.ops.common.dispatch import forget, recorded, runs_anywhere
from fusedlm.ops.low_precision.formats import GRIDS
from fusedlm.ops.low_precision.reference import cast_weight
from fusedlm.ops.mx.formats import FORMATS
from fusedlm.testing import backend_of

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "docs/ops.md"
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")


def _heads(width=8):
    return torch.ones(1, 3, 2, width)


def _tensors(result):
    return (result.codes, result.scales) if isinstance(result, MXTensor) else result


# A small call of every public function that selects a backend.
CALLS = {
    "token_linear": lambda run, **options: run(torch.ones(1, 4), torch.ones(3, 4), **options),
    "rmsnorm_rope": lambda run, **options: run(_heads(), torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1), **options),
    "rope_append": lambda run, **options: run(
        _heads()[:, :1],
        _heads()[:, :1],
        torch.ones(1, 1, 4),
        _heads(),
        torch.ones(1, 3, 4),
        torch.ones(1).long(),
        torch.ones(1, 1, 1, 1),
        torch.ones(1, 1, 1, 1),
        **options,
    ),  # fmt: skip
    "cached_attention": lambda run, **options: run(_heads(), _heads(), _heads(), scale=1.0, **options),
    "causal_attention": lambda run, **options: run(_heads(), _heads(), _heads(), scale=1.0, **options),
    "packed_attention": lambda run, **options: run(
        _heads(), _heads(), _heads(), scale=1.0, positions_BT=torch.arange(3)[None], **options
    ),
    "decayed_linear_attention": lambda run, **options: run(
        _heads(), _heads(), _heads(), torch.zeros(1, 3, 2), **options
    ),
    "differential_linear_attention": lambda run, **options: run(
        torch.ones(1, 3, 4, 10),
        torch.ones(1, 3, 4, 8),
        torch.ones(1, 3, 2, 2),
        _heads(),
        torch.zeros(1, 3, 2),
        torch.ones(2),
        torch.ones(8),
        rope=(torch.ones(1, 3, 1, 1), torch.zeros(1, 3, 1, 1)),
        **options,
    ),
    "differential_combine": lambda run, **options: run(_heads(), _heads(), torch.ones(2), **options),
    "float32_linear": lambda run, **options: run(torch.ones(2, 4), torch.ones(3, 4), **options),
    "draw_token": lambda run, **options: run(torch.ones(2, 3), temperature=0, **options),
    "exclude_own_value": lambda run, **options: run(_heads(), _heads(), **options),
    "low_precision_linear": lambda run, **options: run(
        torch.ones(3, 16), torch.ones(32, 16), codes=cast_weight(torch.ones(32, 16), GRIDS["e4m3"], True), **options
    ),
    "low_precision_weight": lambda run, **options: run(torch.ones(32, 16), **options),
    "mix_inputs": lambda run, **options: run(torch.ones(3, 8), torch.ones(8), mix_x_D=torch.ones(8), **options),
    "orthogonalize": lambda run, **options: run(torch.ones(2, 128, 128), **options),
    "gated_delta_rule": lambda run, **options: run(
        _heads(), _heads(), _heads(), torch.zeros(1, 3, 2), torch.zeros(1, 3, 2), **options
    ),
    "gated_rmsnorm": lambda run, **options: run(_heads(), _heads(), torch.ones(8), **options),
    "gated_scan": lambda run, **options: run(torch.ones(1, 3, 2), torch.ones(1, 3, 2), **options),
    "latent_decode": lambda run, **options: run(
        torch.ones(1, 1, 2, 6), torch.ones(1, 3, 6), rank=4, scale=1.0, **options
    ),
    "linear_softcap_cross_entropy": lambda run, **options: run(
        torch.ones(3, 8), torch.ones(5, 8), torch.arange(3), **options
    ),
    "linear_distillation": lambda run, **options: run(
        torch.ones(3, 8), torch.ones(5, 8), torch.arange(3), None, torch.ones(3, 4), torch.ones(5, 4), **options
    ),
    "quantize_mx": lambda run, **options: _tensors(run(torch.ones(2, 33), "mxfp6_e2m3", **options)),
    "dequantize_mx": lambda run, **options: run(
        MXTensor(torch.ones(2, 16).byte(), torch.ones(2, 1).byte(), (2, 30), FORMATS["mxfp4"]), **options
    ),
    "quantized_experts": lambda run, **options: run(
        torch.ones(3, 8),
        QuantizedWeight(torch.ones(64, 16).byte(), torch.ones(64, 1), 8, "int8", 0),
        QuantizedWeight(torch.ones(32, 16).byte(), torch.ones(32, 1), 8, "int8", 0),
        torch.tensor([[0, 1], [3, 0], [1, 3]]),
        torch.ones(3, 2),
        **options,
    ),
    "quantized_linear": lambda run, **options: run(
        torch.ones(3, 8), QuantizedWeight(torch.ones(2, 8).byte(), torch.ones(2, 1), 8, "int8", 0), **options
    ),
    "relu2_mlp": lambda run, **options: run(torch.ones(3, 64), torch.ones(128, 64), torch.ones(64, 128), **options),
    "rmsnorm_linear": lambda run, **options: run(torch.ones(3, 8), torch.ones(8), torch.ones(16, 8), **options),
    "routed_experts": lambda run, **options: run(
        torch.ones(3, 8),
        torch.ones(4, 16, 8),
        torch.ones(4, 8, 8),
        torch.tensor([[0, 1], [3, 0], [1, 3]]),
        torch.ones(3, 2),
        **options,
    ),
    "short_conv": lambda run, **options: run(torch.ones(1, 3, 8), torch.ones(4, 8), **options),
    "softcap_cross_entropy": lambda run, **options: run(torch.ones(3, 8), torch.arange(3), **options),
    "swiglu_mlp": lambda run, **options: run(torch.ones(3, 8), torch.ones(16, 8), torch.ones(8, 8), **options),
}
OP_OF = {op.function: op for op in OPS.values()}


@pytest.fixture
def sine():
    """An op whose fast backend takes even widths of float32 when determinism is not required, and counts questions."""
    asked = []

    def supports(call: Call, *, width: int) -> str | None:
        asked.append((call, width))
        if call.dtype != torch.float32:
            return "needs float32"
        if width % 2:
            return f"needs an even width, not {width}"
        return "is not deterministic" if call.deterministic else None

    op = Op("sine", [Backend("fast", torch.sin, supports), Backend("reference", torch.cos, fused=False)], width=8)
    op.asked = asked
    yield op
    del OPS["sine"]
    forget()


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_auto_is_resolved_from_dtype_and_sizes(sine):
    x = torch.zeros(2)
    assert resolve("sine", "auto", x, width=4) is torch.sin
    assert resolve("sine", "auto", x, width=5) is torch.cos
    assert resolve("sine", "auto", x.double(), width=4) is torch.cos
    assert resolve("sine", "auto", x.double(), dtype=torch.float32, width=4) is torch.sin
    assert resolve("sine", "reference", x, width=4) is torch.cos


def test_auto_is_resolved_from_deterministic_mode(sine, deterministic):
    assert resolve("sine", "auto", torch.zeros(2), width=4) is torch.cos


def test_auto_is_resolved_from_the_device(sine):
    resolve("sine", "auto", torch.zeros(2), width=4)
    resolve("sine", "auto", torch.zeros(2, device="meta"), width=4)
    assert [call.device.type for call, _ in sine.asked] == ["cpu", "meta"]


def test_a_backend_is_selected_once_per_kind_of_call(sine, deterministic):
    def resolve_all():
        for deterministic in (True, False):
            torch.use_deterministic_algorithms(deterministic)
            for x in (torch.zeros(2), torch.zeros(2).double(), torch.zeros(2, device="meta")):
                for width in (4, 5):
                    resolve("sine", "auto", x, width=width)

    resolve_all()
    assert len(sine.asked) == len(set(sine.asked)) == 12
    resolve_all()
    resolve("sine", "auto", torch.ones(3, 3), width=4)
    assert len(sine.asked) == 12
    forget()
    resolve_all()
    assert len(sine.asked) == 24


def test_a_selection_is_logged_once(sine, caplog):
    with caplog.at_level(logging.INFO, logger="fusedlm.ops"):
        for width in (4, 4, 5, 4, 5):
            resolve("sine", "auto", torch.zeros(2), width=width)
    assert [record.name for record in caplog.records] == ["fusedlm.ops"] * 2
    assert caplog.messages == [
        "sine on cpu, float32: fast (the fastest)",
        "sine on cpu, float32: reference (fast: needs an even width, not 5)",
    ]


def test_a_forced_backend_that_cannot_run_is_an_error_every_time(sine):
    for _ in range(2):
        with pytest.raises(ValueError, match="^op sine: backend 'fast' cannot run: needs an even width, not 5"):
            resolve("sine", "fast", torch.zeros(2), width=5)
    assert resolve("sine", "fast", torch.zeros(2), width=4) is torch.sin


def test_an_op_that_no_backend_can_run_is_an_error(sine):
    del sine.backends["reference"]
    with pytest.raises(ValueError, match=r"op sine: no backend can run here \(fast: needs float32\)"):
        resolve("sine", "auto", torch.zeros(2).double(), width=4)


def test_runs_fused_is_that_of_the_backend_that_runs(sine):
    assert runs_fused("sine", "auto", torch.zeros(2), width=4)
    assert not runs_fused("sine", "auto", torch.zeros(2), width=5)
    assert not runs_fused("sine", "reference", torch.zeros(2), width=4)


def test_sizes_of_a_compiled_call_may_change(sine):
    """torch.compile makes a size symbolic once it has changed; a backend is selected for each value all the same."""

    def function(x):
        return resolve("sine", "auto", x, width=x.shape[0])(x)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    with recorded() as found:
        for width in (4, 5, 6, 7):
            x = torch.ones(width)
            assert torch.equal(compiled(x), x.sin() if width % 2 == 0 else x.cos())
    assert [(backend, sizes["width"]) for _, backend, sizes in found] == [
        ("fast", 4),
        ("reference", 5),
        ("fast", 6),
        ("reference", 7),
    ]


@pytest.mark.parametrize("changed", ["sizes", "slope"])
def test_a_compiled_feed_forward_takes_other_sizes_and_slopes(changed):
    torch._dynamo.reset()
    compiled = torch.compile(relu2_mlp, fullgraph=True, backend="aot_eager")
    for i in range(3):
        hidden, slope = (8 + 8 * i, 0.5) if changed == "sizes" else (8, 0.5 / 2**i)
        inputs = torch.randn(3, 4), torch.randn(hidden, 4), torch.randn(4, hidden)
        torch.testing.assert_close(compiled(*inputs, slope=slope), relu2_mlp(*inputs, slope=slope))


def test_explain_says_what_would_run_and_why_others_cannot(sine):
    found = explain("sine", "cpu", torch.float32, width=4)
    assert (found.op, found.backend, found.reason, found.unsupported) == ("sine", "fast", "the fastest", {})
    found = explain("sine", "cpu", torch.float32, width=3)
    assert found.backend == "reference" and found.unsupported == {"fast": "needs an even width, not 3"}
    lines = str(found).splitlines()
    assert lines == [
        "sine: reference (fast: needs an even width, not 3)",
        "  fast cannot run: needs an even width, not 3",
    ]
    assert explain("sine", "cpu", torch.float32, deterministic=True).unsupported == {"fast": "is not deterministic"}
    found = explain("sine", "cpu", backend="reference")
    assert found.backend == "reference" and found.reason == "requested"
    with pytest.raises(ValueError, match="backend 'fast' cannot run: needs float32"):
        explain("sine", "cpu", torch.bfloat16, backend="fast")


def test_explain_takes_a_function_or_a_name():
    for op in (causal_attention, "causal_attention", "attention"):
        assert explain(op, "cpu").op == "attention"
    with pytest.raises(ValueError, match="there is no op 'quantise_latent'; one of attention, "):
        explain(fusedlm.ops.quantise_latent, "cpu")
    with pytest.raises(ValueError, match="there is no op 'flash'"):
        explain("flash")


def test_explain_refuses_sizes_that_the_op_does_not_have():
    with pytest.raises(ValueError, match="op attention: unknown size 'width'; its sizes: head_dim, value_dim"):
        explain("attention", "cpu", width=8)
    with pytest.raises(ValueError, match="op gated_scan: unknown size 'width'; its sizes: none"):
        explain(gated_scan, "cpu", width=8)


@needs_no_gpu
def test_explain_assumes_this_machine():
    assert "needs a CUDA device, not cpu" in explain("attention").reason
    with pytest.raises(ValueError, match="device='cuda:0': torch sees no CUDA device"):
        explain("attention", "cuda:0")


@pytest.mark.parametrize("name", CALLS)
def test_a_call_runs_what_explain_says(name):
    function, op = getattr(fusedlm.ops, name), OP_OF[name]
    with recorded() as found:
        expected = CALLS[name](function)
        forced = CALLS[name](function, backend="reference")
    (_, backend, sizes), (_, reference, _) = found
    assert [op_name for op_name, _, _ in found] == [op.name] * 2
    assert backend == explain(function, "cpu", torch.float32, **sizes).backend and reference == "reference"
    torch.testing.assert_close(forced, expected)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_with_a_backend_that_cannot_run_is_an_error(name):
    """Kernels need a GPU, and these tensors are on the CPU."""
    function, op = getattr(fusedlm.ops, name), OP_OF[name]
    kernels = [b for b in op.backends if b not in ("sdpa", "reference") and op.backends[b].supports != runs_anywhere]
    assert kernels or name == "linear_distillation"
    for backend in kernels:
        with pytest.raises(ValueError, match=f"op {op.name}: backend '{backend}' cannot run: needs a CUDA device"):
            CALLS[name](function, backend=backend)
    with pytest.raises(ValueError, match=f"op {op.name}: unknown backend 'fastest'; one of auto, .*reference$"):
        CALLS[name](function, backend="fastest")


@pytest.mark.parametrize("name", CALLS)
def test_a_backend_of_ones_own_is_the_fastest(name):
    function, op = getattr(fusedlm.ops, name), OP_OF[name]
    called = []
    with backend_of(op.name, lambda *arguments: called.append(arguments) or "own"):
        assert CALLS[name](function) == CALLS[name](function, backend="test") == "own"
        assert explain(function, "cpu").backend == "test"
    assert len(called) == 2
    assert explain(function, "cpu").backend != "test" and isinstance(CALLS[name](function), torch.Tensor | tuple)


def test_a_backend_of_ones_own_is_gone_after_an_error():
    before = list(OPS["gated_scan"].backends)
    with pytest.raises(RuntimeError), backend_of("gated_scan", torch.sin, name="broken", fused=False):
        assert not runs_fused("gated_scan", "auto", torch.zeros(1))
        raise RuntimeError
    assert list(OPS["gated_scan"].backends) == before
    with pytest.raises(ValueError, match="unknown backend 'broken'"):
        CALLS["gated_scan"](gated_scan, backend="broken")


def test_recording_holds_what_is_resolved_inside():
    def call():
        softcap_cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), backend="reference")

    call()
    with recorded() as outer:
        with recorded() as inner:
            pass
        call()
        with recorded() as second:
            call()
    call()
    one = ("softcap_cross_entropy", "reference", {})
    assert (inner, second, outer) == ([], [one], [one, one])


def test_check_backends_names_the_key():
    check_backends({"attention": "sdpa", "relu2_mlp": "auto"})
    with pytest.raises(ValueError, match="^runtime.backends.attn: there is no such op; one of attention, "):
        check_backends({"attn": "sdpa"}, "runtime.backends")
    with pytest.raises(ValueError, match="^backends.relu2_mlp: op relu2_mlp: unknown backend 'cuda'; one of auto"):
        check_backends({"attention": "sdpa", "relu2_mlp": "cuda"})


def test_every_op_has_its_public_function():
    assert set(OP_OF) == set(CALLS)
    others = {"OPS", "SigmoidCap", "count_tokens", "explain", "quantise_latent", "short_conv_tail"}
    others |= {"LowPrecision", "isolate_outliers"}
    others |= {"MXTensor", "QuantizedWeight", "quantize_weight", "dequantize_weight"}
    assert set(CALLS) | others == set(fusedlm.ops.__all__)
    for name in CALLS:
        assert getattr(fusedlm.ops, name).__module__.startswith("fusedlm.ops.")


def test_every_submodule_is_importable_under_its_name():
    """No function of the same name hides one."""
    pytest.importorskip("triton")
    names = [module.name for module in pkgutil.walk_packages(fusedlm.ops.__path__, "fusedlm.ops.")]
    assert {"fusedlm.ops.attention.op", "fusedlm.ops.swiglu", "fusedlm.ops.relu2.triton"} <= set(names)
    for name in names:
        module = importlib.import_module(name)
        found = fusedlm
        for part in name.split(".")[1:]:
            found = getattr(found, part)
        assert found is module is sys.modules[name], name


def test_kernels_are_imported_when_they_are_selected():
    """Where there is no Triton, the references still run."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from fusedlm.ops import OPS, explain, swiglu_mlp; "
        "x = torch.ones(2, 4); swiglu_mlp(x, torch.ones(8, 4), torch.ones(4, 4)); print(len([explain(o) for o in OPS]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0 and int(run.stdout) == len(OPS), run.stderr


def test_the_examples_of_the_page_run():
    """One after the other, on the GPU as they are, elsewhere on the CPU."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    assert "softcap_cross_entropy(logits, targets, cap=15.0)" in code
    if not torch.cuda.is_available():
        code = code.replace('"cuda"', '"cpu"')
    exec(compile(code, str(PAGE), "exec"), {"print": lambda *_: None})


@pytest.mark.gpu
def test_auto_on_a_gpu_is_the_kernel():
    with recorded() as found:
        for name, call in CALLS.items():
            if "triton" in OP_OF[name].backends or "chunked" in OP_OF[name].backends:
                with torch.device("cuda"):
                    call(lambda *tensors, name=name, **rest: getattr(fusedlm.ops, name)(*map(_half, tensors), **rest))
    tuned = torch.cuda.get_device_capability()[0] in (9, 10)
    assert {op: backend for op, backend, _ in found} == {
        "cached_attention": "triton",
        "decayed_linear_attention": "triton",
        "differential_combine": "triton",
        "differential_linear_attention": "triton",
        "draw_token": "triton",
        "exclude_own_value": "triton",
        "gated_delta_rule": "triton",
        "gated_rmsnorm": "triton",
        "gated_scan": "triton",
        "latent_decode": "triton",
        "linear_distillation": "chunked",
        "linear_softcap_cross_entropy": "chunked",
        "mix_inputs": "triton",
        "orthogonalize": "triton" if tuned else "reference",
        "relu2_mlp": "triton" if tuned else "reference",
        "rmsnorm_linear": "packed",
        "rmsnorm_rope": "triton",
        "rope_append": "triton",
        "routed_experts": "triton",
        "short_conv": "triton",
        "softcap_cross_entropy": "triton",
        "swiglu_mlp": "triton",
        "token_linear": "triton",
    }


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16() if x.is_floating_point() else x
