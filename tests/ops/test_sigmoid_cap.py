"""The asymmetric cap a sigmoid((z + b) / c) in the losses: against its formula, and the kernels in float64."""

import pytest
import torch

from fusedlm.ops import SigmoidCap, linear_softcap_cross_entropy, softcap_cross_entropy
from fusedlm.ops.cross_entropy.reference import softcap
from fusedlm.testing import assert_close, backend_of
from tests.ops import test_cross_entropy as rows
from tests.ops import test_linear_cross_entropy as projected

CAP = SigmoidCap(23.0, 5.0, 7.5)
HIGH = SigmoidCap(120.0, -3.0, 9.0)  # half of it is too high for sums without the row maximum


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_is_the_log_softmax_of_rescaled_logits(z_loss):
    generator = torch.Generator().manual_seed(0)
    z = (4 * torch.randn(5, 16, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.tensor([0, 12, -100, 3, 7])

    def run(z):
        return softcap_cross_entropy(z, targets, cap=CAP, n_classes=13, z_loss=z_loss, backend="reference")

    capped = 23 / (1 + torch.exp(-(z[:, :13] + 5) / 7.5))
    normaliser = capped.exp().sum(-1).log()
    expected = normaliser - capped[torch.arange(5), targets.clamp(min=0)] + z_loss * normaliser**2
    assert_close(run(z), expected * (targets >= 0), 1e-12)
    assert torch.autograd.gradcheck(run, z)


@pytest.mark.parametrize(("shape", "cap"), [((7, 13, 13), CAP), ((8, 256, 256), HIGH), ((5, 5003, 4990), CAP)])
def test_kernels(shape, cap):
    """Short and long rows, with and without the row maximum, and z-loss, which sees the constant part of the cap."""
    logits, targets, upstream = rows._inputs(*shape)
    rest = cap, shape[2], 1e-3
    exact, same = (rows._expected(logits, targets, upstream, dtype, *rest) for dtype in (torch.float64, torch.float32))
    found = rows._losses_and_gradients(rows.kernels.softcap_cross_entropy, logits, targets, upstream, *rest)
    rows._check(found, exact, same, 2e-6)
    in_place = logits.detach().clone()
    loss = rows.kernels.loss_and_gradient_(in_place, targets, upstream, *rest)
    rows._check((loss, in_place), exact, same, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_any_size(dtype):
    """Also those at the center, -5, and where the cap is flat."""
    sizes = torch.tensor([-3e4, -300.0, -40.0, -5.0, -4.99, 0.0, 0.5, 40.0, 300.0, 3e4])
    logits = sizes[torch.randint(len(sizes), (12, 4100), generator=torch.Generator().manual_seed(1))]
    logits = logits.to(rows.DEVICE, dtype).requires_grad_()
    targets, upstream = torch.arange(12, device=rows.DEVICE), torch.ones(12, device=rows.DEVICE)
    exact, same = (rows._expected(logits, targets, upstream, t, CAP, 4100, 0.0) for t in (torch.float64, dtype))
    found = rows._losses_and_gradients(rows.kernels.softcap_cross_entropy, logits, targets, upstream, CAP, 4100)
    rows._check(found, exact, same, 2e-6 if dtype == torch.float32 else 2**-8 * 1.1)


def test_logits_near_the_center():
    """To the last digits of float32, of which the difference of 1 and twice a number near a half keeps few."""
    logits, targets, upstream = rows._inputs(9, 64, 64)
    logits = (logits.detach().nan_to_num() / 16 + 3.0).requires_grad_()
    rest = HIGH, 64, 0.0
    exact = rows._expected(logits, targets, upstream, torch.float64, *rest)
    found = rows._losses_and_gradients(rows.kernels.softcap_cross_entropy, logits, targets, upstream, *rest)
    assert_close(found[0], exact[0], 2e-7)
    assert_close(found[1], exact[1], 4e-7)


def test_reduced_and_compiled():
    logits, targets, _ = rows._inputs(7, 13, 13)
    options = {"cap": CAP, "reduction": "mean", "z_loss": 1e-3}
    leaf = logits.detach().nan_to_num().double().requires_grad_()
    exact = softcap_cross_entropy(leaf, targets, backend="reference", **options)
    (gradient,) = torch.autograd.grad(exact, leaf)
    with backend_of("softcap_cross_entropy", rows.kernels.softcap_cross_entropy, name="kernel"):
        for function in (
            softcap_cross_entropy,
            torch.compile(softcap_cross_entropy, fullgraph=True, backend="aot_eager"),
        ):
            leaf = logits.detach().nan_to_num().requires_grad_()
            loss = function(leaf, targets, backend="kernel", **options)
            assert_close(loss, exact, 1e-6)
            assert_close(torch.autograd.grad(loss, leaf)[0], gradient, 2e-6)


def test_chunks(monkeypatch):
    monkeypatch.setattr(projected.chunked, "chunk_rows", lambda n, *_, held=0: min(16, max(1, n)))
    inputs = projected._inputs(*projected.SHAPES[1])
    projected._check(inputs, CAP, 64, 1e-3, floor=2e-6)
    x, weight, targets, token_weights = inputs
    with torch.no_grad():
        found = projected.chunked.linear_softcap_cross_entropy(x, weight, targets, token_weights, CAP, 64, 1e-3)
        exact = linear_softcap_cross_entropy(
            x.double(), weight, targets, token_weights, cap=CAP, n_classes=64, z_loss=1e-3, backend="reference"
        )
    assert_close(found[0], exact[0], 1e-6)


def test_operators_take_lists():
    logits, targets, _ = rows._inputs(3, 40, 33)
    clean = logits.detach().nan_to_num().requires_grad_()
    arguments = (clean, targets, list(CAP), 33, 1e-3)
    torch.library.opcheck(torch.ops.fusedlm.softcap_cross_entropy.default, arguments)


@pytest.mark.parametrize("cap", [0.0, -1.0, SigmoidCap(0.0, 5.0, 7.5), SigmoidCap(23.0, 5.0, -7.5)])
def test_a_cap_is_positive(cap):
    with pytest.raises(ValueError, match="a cap of logits must be positive"):
        softcap_cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), cap=cap)
    with pytest.raises(ValueError, match="a cap of logits must be positive"):
        linear_softcap_cross_entropy(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), cap=cap)
    assert softcap(torch.tensor([-5.0, 1e9, -1e9]), CAP).tolist() == [11.5, 23.0, 0.0]
