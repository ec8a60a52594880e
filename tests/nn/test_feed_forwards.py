"""Feed-forwards whose kernels run against the same ones of PyTorch's operators, as a model uses them."""

import pytest
import torch

from fusedlm.model.precision import autocast
from fusedlm.ops.common import Choice
from fusedlm.testing import FFN_CASES, assert_close, part_model, randomise_

relu2_kernels = pytest.importorskip("fusedlm.ops.relu2_mlp.triton")
swiglu_kernels = pytest.importorskip("fusedlm.ops.swiglu_mlp.triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ATTENTION = "{type: attention, n_heads: 4}"
CASES = [case for cases in FFN_CASES.values() for case in cases]
TOKENS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0)).to(DEVICE)
FUNCTIONS = {"relu2_mlp": relu2_kernels.relu2_mlp, "swiglu_mlp": swiglu_kernels.swiglu_mlp}


def _models(ffn):
    """One of PyTorch's operators and one of the kernels, and which dtypes came to these."""
    torch.manual_seed(0)
    plain = randomise_(part_model(ATTENTION, ffn)).to(DEVICE)
    fused = part_model(ATTENTION, ffn).to(DEVICE)
    fused.load_state_dict(plain.state_dict())
    dtypes = []

    def seen(function):
        def run(x, *rest):
            dtypes.append(x.dtype)
            return function(x, *rest)

        return run

    for module in fused.modules():
        if hasattr(module, "whole"):
            op = module.whole.op
            module.whole = Choice(op, "triton", "for the test", seen(FUNCTIONS[op]))
    return plain, fused, dtypes


def _gradients(model):
    model.zero_grad()
    loss = model.loss(TOKENS, TOKENS.roll(-1, 1)).sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"loss": loss.detach()}


@pytest.mark.parametrize("ffn", CASES)
def test_training(ffn):
    plain, fused, dtypes = _models(ffn)
    expected = _gradients(plain)
    for name, gradient in _gradients(fused).items():
        assert_close(gradient, expected[name], 1e-5, name)
    assert dtypes


@pytest.mark.parametrize("ffn", CASES)
def test_compiled(ffn):
    torch._dynamo.reset()
    plain, fused, _ = _models(ffn)
    for module in fused.modules():
        if hasattr(module, "whole"):  # what the compiler may not see into
            module.whole = Choice(module.whole.op, "triton", "for the test", FUNCTIONS[module.whole.op])
    expected = _gradients(plain)
    fused.compile_blocks(backend="aot_eager")
    for name, gradient in _gradients(fused).items():
        assert_close(gradient, expected[name], 1e-5, name)


@pytest.mark.parametrize("ffn", CASES)
def test_computed_again(ffn):
    """Under activation checkpointing."""
    _, fused, _ = _models(ffn)
    module = fused.blocks[0].ffn.eval()
    x = torch.randn(2, 12, 32, device=DEVICE, requires_grad=True)
    leaves = [x, *(parameter for name, parameter in module.named_parameters() if "router" not in name)]
    results = []
    for run in (module, lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)):
        out = run(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("ffn", CASES)
def test_decoding(ffn):
    plain, fused, _ = _models(ffn)
    state = fused.init_state(2)
    with torch.no_grad():
        parts = [fused(tokens, state=state) for tokens in (TOKENS[:, :7], TOKENS[:, 7:8], TOKENS[:, 8:])]
        assert_close(torch.cat(parts, 1), plain(TOKENS), 1e-5)


@pytest.mark.parametrize("ffn", CASES)
def test_a_projection_that_starts_at_zero(ffn):
    """Its gradient is that of the hidden layer, the others are nothing."""
    plain, fused, _ = _models(ffn)
    for model in (plain, fused):
        for name, parameter in model.named_parameters():
            if name.endswith("down.weight"):
                torch.nn.init.zeros_(parameter)
    expected = _gradients(plain)
    for name, gradient in _gradients(fused).items():
        assert_close(gradient, expected[name], 1e-5, name)


@pytest.mark.parametrize("ffn", CASES)
def test_autocast_decides_the_dtype(ffn, monkeypatch):
    """Also of an input in float32, and so that the output has the dtype of a projection's."""
    _, fused, _ = _models(ffn)
    module, dtypes = fused.blocks[0].ffn, []
    for part in module.modules():
        if hasattr(part, "whole"):
            function = lambda x, *rest: dtypes.append(x.dtype) or torch.zeros_like(x)  # noqa: E731
            part.whole = Choice(part.whole.op, "triton", "for the test", function)
    x = torch.randn(2, 12, 32, device=DEVICE)
    with autocast(DEVICE, torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    assert set(dtypes) == {torch.bfloat16}
    dtypes.clear()
    assert module(x).dtype == torch.float32 and set(dtypes) == {torch.float32}


@pytest.mark.parametrize("ffn, op", [(CASES[0], "swiglu_mlp"), ("{type: relu2}", "relu2_mlp")])
def test_the_recipe_chooses(ffn, op):
    model = part_model(ATTENTION, ffn, extra=f"impl: {{{op}: reference}}")
    assert model.implementations[f"a.{op}"].name == "reference"
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=f"op {op}: implementation 'triton' cannot run: needs a CUDA device"):
            part_model(ATTENTION, ffn, extra=f"impl: {{{op}: triton}}")
