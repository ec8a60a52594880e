"""Feed-forwards whose kernels run against the same layers one by one, as a model uses them."""

import contextlib

import pytest
import torch

from fusedlm.model.precision import autocast
from fusedlm.nn.ffn.relu2 import ReLU2
from fusedlm.nn.ffn.swiglu import SwiGLU
from fusedlm.testing import FFN_CASES, assert_close, backend_of, part_model, randomise_

relu2_kernels = pytest.importorskip("fusedlm.ops.relu2.triton")
swiglu_kernels = pytest.importorskip("fusedlm.ops.swiglu.triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ATTENTION = "{type: attention, n_heads: 4}"
CASES = [case for cases in FFN_CASES.values() for case in cases]
TOKENS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
KERNELS = {"relu2_mlp": relu2_kernels.relu2_mlp, "swiglu_mlp": swiglu_kernels.swiglu_mlp}


def _models(ffn):
    """The same model twice: separate layers, and what `_kernels` lets run."""
    torch.manual_seed(0)
    plain = randomise_(part_model(ATTENTION, ffn)).to(DEVICE)
    fused = part_model(ATTENTION, ffn).to(DEVICE)
    fused.load_state_dict(plain.state_dict())
    plain.use_backends(dict.fromkeys(KERNELS, "reference"))
    fused.use_backends(dict.fromkeys(KERNELS, "test"))
    return plain, fused


def _dense(model) -> list:
    """The feed-forwards that run one of the kernels; a mixture of experts may have none."""
    return [part for part in model.modules() if isinstance(part, SwiGLU | ReLU2)]


@contextlib.contextmanager
def _kernels(replacement=None):
    """The backend "test" of both ops: their kernels, on the CPU in Triton's interpreter, or a replacement of both."""
    with contextlib.ExitStack() as stack:
        for op, function in KERNELS.items():
            stack.enter_context(backend_of(op, replacement or function))
        yield


@pytest.fixture
def kernels():
    with _kernels():
        yield


def _gradients(model):
    model.zero_grad()
    loss = model.train()(TOKENS, targets=TOKENS.roll(-1, 1)).losses["nll"]
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None} | {
        "loss": loss.detach()
    }


@pytest.mark.parametrize("ffn", CASES)
def test_training(ffn):
    plain, fused = _models(ffn)
    dtypes = []

    def run(x, weight_in, weight_out, *slope):
        dtypes.append(x.dtype)
        op = "relu2_mlp" if slope else "swiglu_mlp"
        return KERNELS[op](x, weight_in, weight_out, *slope)

    expected = _gradients(plain)
    with _kernels(run):
        actual = _gradients(fused)
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert_close(gradient, expected[name], 1e-5, name)
    assert dtypes == [torch.float32] * len(_dense(fused))


@pytest.mark.parametrize("ffn", CASES)
def test_compiled(ffn, kernels):
    """With the backward pass for one case of each feed-forward; tracing that takes most of the time."""
    torch._dynamo.reset()
    plain, fused = _models(ffn)
    expected = _gradients(plain)
    first = ffn in [cases[0] for cases in FFN_CASES.values()]
    fused.compile_blocks(backend="aot_eager" if first else "eager")
    for name, gradient in _gradients(fused).items():
        assert_close(gradient, expected[name], 1e-5, name)


@pytest.mark.parametrize("ffn", CASES)
def test_recomputed(ffn, kernels):
    """Under activation checkpointing."""
    _, fused = _models(ffn)
    module = fused.blocks[0].ffn.eval()
    x = torch.randn(2, 12, 32, device=DEVICE, requires_grad=True)
    leaves = [x, *(parameter for name, parameter in module.named_parameters() if "router" not in name)]
    results = []
    for run in (module, lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)):
        out = run(x)
        out = out[0] if isinstance(out, tuple) else out
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("ffn", CASES)
def test_decoding(ffn, kernels):
    plain, fused = _models(ffn)
    state = fused.init_state(2)
    with torch.no_grad():
        parts = [fused(tokens, state=state).logits for tokens in (TOKENS[:, :7], TOKENS[:, 7:8], TOKENS[:, 8:])]
        assert_close(torch.cat(parts, 1), plain(TOKENS).logits, 1e-5)


@pytest.mark.parametrize("ffn", CASES)
def test_a_projection_that_starts_at_zero(ffn, kernels):
    """It has the gradient of the hidden layer; the others have none."""
    plain, fused = _models(ffn)
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            if name.endswith("down.weight"):
                torch.nn.init.zeros_(parameter)
    expected = _gradients(plain)
    for name, gradient in _gradients(fused).items():
        assert_close(gradient, expected[name], 1e-5, name)


@pytest.mark.parametrize("ffn", CASES)
def test_autocast_decides_the_dtype(ffn):
    """Also of an input in float32; the output has the dtype of a projection's."""
    _, fused = _models(ffn)
    module, dtypes = fused.blocks[0].ffn, []
    x = torch.randn(2, 12, 32, device=DEVICE)

    def run(x, *rest):
        dtypes.append(x.dtype)
        return torch.zeros_like(x)

    def output():
        out = module(x)
        return out[0] if isinstance(out, tuple) else out

    n_calls = len(_dense(module))
    with _kernels(run):
        with autocast(DEVICE, torch.bfloat16):
            assert output().dtype == torch.bfloat16
        assert dtypes == [torch.bfloat16] * n_calls
        dtypes.clear()
        assert output().dtype == torch.float32 and dtypes == [torch.float32] * n_calls


@pytest.mark.parametrize("ffn, op", [(CASES[0], "swiglu_mlp"), ("{type: relu2}", "relu2_mlp")])
def test_backends_are_named_per_op(ffn, op):
    model = part_model(ATTENTION, ffn)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    model.use_backends({op: "reference"})
    assert model.explain(cpu, torch.float32)[f"a.{op}"].backend == "reference"
    model.use_backends({op: "triton"})
    with pytest.raises(ValueError, match=f"op {op}: backend 'triton' cannot run: needs a CUDA device, not cpu"):
        model.explain(cpu, torch.float32)
    if torch.cuda.is_available():
        assert model.explain(cuda, torch.bfloat16)[f"a.{op}"].backend == "triton"
    with pytest.raises(ValueError, match="triton"):
        model.to(cpu)(TOKENS.cpu())
