"""The reference against the formula, the kernels against the reference in float64: loss and gradient."""

import itertools
from functools import partial

import pytest
import torch

from fusedlm.ops import softcap_cross_entropy
from fusedlm.ops.cross_entropy import reference
from fusedlm.testing import assert_close, backend_of, error_ratio

kernels = pytest.importorskip("fusedlm.ops.cross_entropy.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernel_backend():
    """The kernels as the backend "kernel" of the public function, on the CPU too."""
    with backend_of("softcap_cross_entropy", kernels.softcap_cross_entropy, name="kernel"):
        yield


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("cap", [None, 3.0, 30.0])
@pytest.mark.parametrize("classes, padded", [(2, 2), (13, 16), (64, 64)])
def test_is_the_log_softmax_of_capped_logits(cap, classes, padded, z_loss):
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(11, padded, generator=g, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, classes, (11,), generator=g)
    targets[3] = -100

    def run(z):
        return softcap_cross_entropy(z, targets, cap=cap, n_classes=classes, z_loss=z_loss, backend="reference")

    loss = run(logits)
    for row, target in enumerate(targets.tolist()):
        z = logits[row, :classes].detach()
        z = z if cap is None else cap * torch.tanh(z / cap)
        normaliser = z.exp().sum().log()
        expected = 0.0 if target < 0 else (normaliser - z[target] + z_loss * normaliser**2).item()
        assert loss[row].item() == pytest.approx(expected, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[3].abs().max() == 0 and not gradient[:, classes:].any()
    assert torch.autograd.gradcheck(run, logits)


def test_bfloat16_logits_are_summed_in_float32():
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(5)
    nll = softcap_cross_entropy(logits, targets, cap=15.0)
    assert nll.dtype == torch.float32
    expected = softcap_cross_entropy(logits.double(), targets, cap=15.0)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=0)


def test_bad_input():
    with pytest.raises(ValueError, match=r"\(4, 9\) and targets \(3,\)"):
        softcap_cross_entropy(torch.zeros(4, 9), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="reduction 'total' must be"):
        softcap_cross_entropy(torch.zeros(4, 9), torch.zeros(4, dtype=torch.int64), reduction="total")


CAPS = [None, 3.0, 15.0, 90.0]  # with the last the kernel needs the row maximum, as without a cap
SHAPES = [
    (7, 13, 13),
    (5, 5003, 4990),
    (3, 25000, 24990),
    (3, 70000, 69990),
    (2, 262144, 262144),
    (9, 2, 2),
    (8, 256, 256),
    (4, 4096, 4096),
    (0, 10, 10),
]


def _inputs(rows, width, classes, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows * width)
    logits = (8 * torch.randn(rows, width, generator=g)).to(dtype)
    logits[:, classes:] = float("nan")  # padding is never read
    targets = torch.randint(0, classes, (rows,), generator=g)
    if rows > 2:
        targets[1] = -100
        logits[1] = float("nan")
    upstream = torch.randn(rows, generator=g)
    return logits.to(DEVICE).requires_grad_(), targets.to(DEVICE), upstream.to(DEVICE)


def _losses_and_gradients(function, logits, targets, upstream, *rest):
    loss = function(logits, targets, *rest)
    (gradient,) = torch.autograd.grad((loss * upstream).sum(), logits)
    return loss.detach(), gradient


def _expected(logits, targets, upstream, dtype, *rest):
    clean = logits.detach().nan_to_num().to(dtype).requires_grad_()
    return _losses_and_gradients(reference.softcap_cross_entropy, clean, targets, upstream, *rest)


def _check(found, exact, same, floor):
    """Within four times the error of the reference in the same precision, or within the floor."""
    for name, a, e, s in zip(("loss", "gradient"), found, exact, same, strict=True):
        if e.numel():
            assert_close(a, e, max(4 * error_ratio(s, e), floor), name)
        assert a.isfinite().all()


# In the interpreter each shape has every cap with one of the two, in turns, and the largest, which takes seconds, one.
KERNEL_CASES = [
    (SHAPES[i], CAPS[j], z_loss)
    for i, j, z_loss in itertools.product(range(len(SHAPES)), range(len(CAPS)), (0.0, 1e-3))
    if torch.cuda.is_available() or (i + j) % 2 == (z_loss > 0) and (SHAPES[i][2] < 2**18 or CAPS[j] == 15.0)
]


@pytest.mark.parametrize(("shape", "cap", "z_loss"), KERNEL_CASES)
def test_kernel(shape, cap, z_loss):
    logits, targets, upstream = _inputs(*shape)
    rest = cap, shape[2], z_loss
    exact = _expected(logits, targets, upstream, torch.float64, *rest)
    same = _expected(logits, targets, upstream, torch.float32, *rest)
    found = _losses_and_gradients(kernels.softcap_cross_entropy, logits, targets, upstream, *rest)
    _check(found, exact, same, 2e-6)
    in_place = logits.detach().clone()
    loss = kernels.loss_and_gradient_(in_place, targets, upstream, *rest)
    _check((loss, in_place), exact, same, 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 16, 1024, 4100, 9000])
@pytest.mark.parametrize("cap", [3.0, 15.0])
def test_adjacent_logits_of_any_size(cap, width, dtype):
    """They share divisions, by products that must neither overflow nor underflow."""
    g = torch.Generator().manual_seed(width)
    sizes = torch.tensor([-3e4, -300.0, -40.0, -2.0, 0.0, 0.5, 40.0, 300.0, 3e4])
    logits = sizes[torch.randint(len(sizes), (12, width), generator=g)]
    logits[:4], logits[4] = sizes[torch.tensor([0, 3, 6, 8])][:, None], sizes[-1]  # and full rows of one size
    logits = logits.to(DEVICE, dtype).requires_grad_()
    targets, upstream = torch.arange(12, device=DEVICE) % width, torch.ones(12, device=DEVICE)
    floor = 2e-6 if dtype == torch.float32 else 2**-8 * 1.1  # a rounding, where few elements are most of a gradient
    exact = _expected(logits, targets, upstream, torch.float64, cap, width, 0.0)
    same = _expected(logits, targets, upstream, dtype, cap, width, 0.0)
    found = _losses_and_gradients(kernels.softcap_cross_entropy, logits, targets, upstream, cap, width)
    _check(found, exact, same, floor)
    in_place = logits.detach().clone()
    loss = kernels.loss_and_gradient_(in_place, targets, upstream, cap, width)
    _check((loss, in_place), exact, same, floor)


@pytest.mark.parametrize("width", [8, 25000])
@pytest.mark.parametrize("z", [-20.0, -10.0, -1.0, 20.0])
def test_the_gradient_of_a_target_where_the_cap_is_flat(z, width):
    """To the last digits of float32, of which the difference of 1 and a tanh keeps few."""
    logits = torch.zeros(3, width, device=DEVICE)
    logits[:, 1] = z
    targets, upstream = torch.ones(3, dtype=torch.int64, device=DEVICE), torch.ones(3, device=DEVICE)
    _, exact = _expected(logits, targets, upstream, torch.float64, 3.0, width, 0.0)
    _, found = _losses_and_gradients(
        kernels.softcap_cross_entropy, logits.requires_grad_(), targets, upstream, 3.0, width
    )
    in_place = logits.detach().clone()
    kernels.loss_and_gradient_(in_place, targets, upstream, 3.0, width)
    assert_close(found[:, 1], exact[:, 1], 2e-6)
    assert_close(in_place[:, 1], exact[:, 1], 2e-6)


@pytest.mark.parametrize("cap", CAPS)
def test_the_loss_of_a_single_class_is_zero(cap):
    """Up to the rounding of the two numbers, about 10, whose difference it is."""
    logits, targets, upstream = _inputs(3, 1, 1)
    found = _losses_and_gradients(kernels.softcap_cross_entropy, logits, targets, upstream, cap, 1)
    in_place = logits.detach().clone()
    both = kernels.loss_and_gradient_(in_place, targets, upstream, cap, 1)
    assert all(x.abs().max() < 1e-5 for x in (*found, both, in_place))


def test_kernel_on_a_slice_and_one_weight_for_all_rows():
    logits, targets, _ = _inputs(6, 50, 50)
    larger = torch.full((6, 77), float("nan"), device=DEVICE)
    larger[:, :50] = logits.detach()
    sliced = larger[:, :50].requires_grad_()
    weight = torch.tensor(0.25, device=DEVICE)
    expected = _expected(logits, targets, weight, torch.float64, 15.0, 50)
    found = _losses_and_gradients(kernels.softcap_cross_entropy, sliced, targets, weight, 15.0, 50)
    _check(found, expected, expected, 2e-6)
    loss = kernels.loss_and_gradient_(larger[:, :50], targets, weight.expand(6), 15.0, 50)
    _check((loss, larger[:, :50]), expected, expected, 2e-6)
    assert larger[:, 50:].isnan().all(), "memory between rows is not written"


def _reduced(logits, targets, factor, function=softcap_cross_entropy, **options):
    """A reduced loss, and the gradient of factor times it with respect to half of the logits."""
    leaf = logits.detach().nan_to_num().requires_grad_()
    loss = function(2 * leaf, targets, cap=15.0, **options)
    return loss.detach(), torch.autograd.grad(factor * loss, leaf)[0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(7, 13, 13), (5, 9000, 8990)])
def test_reduced_with_a_gradient(shape, reduction, factor, in_place, compiled, kernel_backend):
    logits, targets, _ = _inputs(*shape)
    targets[0] = 7  # ignored here
    options = {"reduction": reduction, "n_classes": shape[2], "z_loss": 1e-3, "ignore_index": 7}
    function = softcap_cross_entropy
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    targets = targets.masked_fill(targets < 0, 1)
    found = _reduced(logits, targets, factor, function, in_place=in_place, backend="kernel", **options)
    exact = _reduced(logits.double(), targets, factor, backend="reference", **options)
    same = _reduced(logits, targets, factor, backend="reference", **options)
    _check(found, exact, same, 2e-6)
    assert not found[1][0].any(), "the ignored row"


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(7, 13, 13), (5, 9000, 8990), (70_001, 3, 3)], ids=str)
def test_reduced_without_a_gradient(shape, reduction, kernel_backend, poisoned):
    """The last has more rows than the programs of a reduction load at a time."""
    logits, targets, _ = _inputs(*shape)
    targets[::3] = -100
    logits = logits.detach().nan_to_num()
    options = {"cap": 15.0, "n_classes": shape[2], "z_loss": 1e-3, "reduction": reduction}
    found = softcap_cross_entropy(logits, targets, backend="kernel", **options)
    same, exact = (softcap_cross_entropy(z, targets, backend="reference", **options) for z in (logits, logits.double()))
    assert not found.requires_grad
    assert_close(found, exact, max(4 * error_ratio(same, exact), 1e-6))


@pytest.mark.parametrize("cap", [None, 15.0])
@pytest.mark.parametrize("width", [40, 5000])
def test_the_kernel_before_the_loss_has_ended(width, cap):
    """With PDL kernels start before the previous one ends; they must still read what it writes last."""
    n = 4096 if DEVICE == "cuda" else 8
    logits, targets, _ = _inputs(n, width, width)
    clean, weights = logits.detach().nan_to_num(), torch.rand(n, device=DEVICE)
    expected, others = None, torch.randn_like(clean)
    for _ in range(4):
        for reduction in ("mean", "sum"):
            z = others.mul_(0.5).add_(clean).requires_grad_()  # different logits every time, in the same memory
            loss = kernels.softcap_cross_entropy(z, targets, cap, width, 0.0, reduction)
            (gradient,) = torch.autograd.grad(loss, z)
            others = z.detach()
            leaf = others.double().requires_grad_()
            expected = reference.softcap_cross_entropy(leaf, targets, cap, width, 0.0, reduction)
            assert_close(loss, expected.detach(), 1e-5)
            assert_close(gradient, torch.autograd.grad(expected, leaf)[0], 1e-5)
        again = others.clone()
        losses = kernels.loss_and_gradient_(again, targets, weights, cap, width)
        alone = reference.softcap_cross_entropy(others.double(), targets, cap, width, 0.0, "none")
        assert_close(kernels.weighted_sum(losses, weights), (alone * weights).sum(), 1e-5)


def test_in_place_overwrites_the_logits_only_when_allowed(kernel_backend):
    logits, targets, _ = _inputs(7, 13, 13)
    for in_place in (False, True):
        z = logits.detach().nan_to_num().requires_grad_() * 1.0
        before = z.detach().clone()
        options = {"cap": 15.0, "reduction": "sum", "backend": "kernel"}
        loss = softcap_cross_entropy(z, targets, in_place=in_place, **options)
        assert torch.equal(z.detach(), before) != in_place
        with torch.no_grad():
            z = before.clone()
            again = softcap_cross_entropy(z, targets, in_place=True, **options)
        assert torch.equal(z, before) and torch.equal(again, loss.detach())


def test_a_reduced_loss_is_differentiated_once(kernel_backend):
    logits, targets, _ = _inputs(7, 13, 13)
    z = logits.detach().nan_to_num().requires_grad_()
    loss = softcap_cross_entropy(z, targets, reduction="sum", backend="kernel")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="reduction='none'"):
        loss.backward()


def test_a_mean_over_no_targets_is_nan(kernel_backend):
    logits, targets, _ = _inputs(3, 5, 5)
    targets.fill_(-100)
    for backend in ("reference", "kernel"):
        assert softcap_cross_entropy(logits, targets, reduction="mean", backend=backend).isnan()


IGNORE_7 = [([7, 7, 2], [0, 1]), ([3, 7, 9], [1]), ([0, 5, 8], [])]  # targets, rows that ignore_index=7 ignores


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("width", [10, 5000])
@pytest.mark.parametrize("targets, ignored", IGNORE_7, ids=str)
def test_another_ignore_index_ignores_that_target(targets, ignored, width, reduction, kernel_backend):
    """As in torch."""
    logits, _, _ = _inputs(2, width, width)
    logits = torch.cat([logits, -logits[:1]]).detach() / 8
    targets = torch.tensor(targets, device=DEVICE)
    leaf = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, targets, ignore_index=7, reduction=reduction)
    gradient = torch.autograd.grad(expected.sum(), leaf)[0]
    for backend in ("reference", "kernel"):
        leaf = logits.clone().requires_grad_()
        loss = softcap_cross_entropy(leaf, targets, ignore_index=7, reduction=reduction, backend=backend)
        assert_close(loss, expected, 2e-6, backend)
        found = torch.autograd.grad(loss.sum(), leaf)[0]
        assert_close(found, gradient, 1e-5, backend)
        assert [row for row in range(3) if not found[row].any()] == ignored


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("width", [10, 5000])
def test_with_another_ignore_index_minus_100_is_an_error(width, reduction, kernel_backend):
    """As in torch, where it is an IndexError on the CPU; the kernel gives the NaN of any other wrong target."""
    logits, _, _ = _inputs(2, width, width)
    targets = torch.tensor([3, -100])
    options = {"ignore_index": 7, "reduction": reduction}
    for function in (torch.nn.functional.cross_entropy, partial(softcap_cross_entropy, backend="reference")):
        with pytest.raises(IndexError, match="-100 is out of bounds"):
            function(logits.cpu(), targets, **options)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            loss = softcap_cross_entropy(logits, targets.to(DEVICE), backend="kernel", **options)
        assert loss.isnan().tolist() == ([False, True] if reduction == "none" else True)
    assert softcap_cross_entropy(logits.cpu(), targets, reduction="mean", backend="reference").isfinite()


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("width", [40, 25000])
def test_nan_stays_in_its_row(width, cap):
    """In the loss and in the gradient."""
    logits, targets, upstream = _inputs(5, width, width)
    logits = logits.detach().nan_to_num().requires_grad_()
    logits.data[2, 7] = float("nan")
    loss, gradient = _losses_and_gradients(kernels.softcap_cross_entropy, logits, targets, upstream, cap, width)
    in_place = logits.detach().clone()
    both = kernels.loss_and_gradient_(in_place, targets, upstream, cap, width)
    for losses, gradients in ((loss, gradient), (both, in_place)):
        assert losses.isnan().tolist() == [False, False, True, False, False]
        assert gradients[2].isnan().all() and gradients[[0, 1, 3, 4]].isfinite().all()


def test_the_loss_of_an_invalid_target_is_nan():
    logits, _, _ = _inputs(2, 10, 10)
    loss = kernels.softcap_cross_entropy(logits, torch.tensor([3, 10], device=DEVICE), None, 10)
    assert loss[0].isfinite() and loss[1].isnan()


def test_operators_pass_opcheck():
    logits, targets, upstream = _inputs(3, 40, 33)
    clean = logits.detach().nan_to_num().requires_grad_()
    torch.library.opcheck(torch.ops.fusedlm.softcap_cross_entropy.default, (clean, targets, [15.0], 33, 1e-3))
    sums = torch.ops.fusedlm.softcap_cross_entropy(clean, targets, [15.0], 33, 1e-3)[1].detach()
    arguments = (upstream, clean.detach(), targets, sums, [15.0], 33, 1e-3)
    torch.library.opcheck(torch.ops.fusedlm.softcap_cross_entropy_backward.default, arguments)
    arguments = (clean.detach(), targets, True, [15.0], 33, 1e-3)
    torch.library.opcheck(torch.ops.fusedlm.reduced_softcap_cross_entropy.default, arguments)
    torch.library.opcheck(torch.ops.fusedlm.reduced_softcap_cross_entropy_.default, arguments)
    torch.library.opcheck(torch.ops.fusedlm.reduced_softcap_cross_entropy_loss.default, arguments)
    torch.library.opcheck(torch.ops.fusedlm.scale_.default, (clean.detach(), upstream[0]))


def test_full_graph():
    logits, targets, upstream = _inputs(5, 70, 70)
    clean = logits.detach().nan_to_num().requires_grad_()

    def run(z):
        return kernels.softcap_cross_entropy(2 * z, targets, 15.0, 70)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for function in (run, compiled):
        loss = function(clean)
        (gradient,) = torch.autograd.grad((loss * upstream).sum(), clean)
        if function is run:
            expected = loss.detach(), gradient
    assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("shape", [*SHAPES, (300, 50304, 50257)])
def test_kernel_in_half_precision(shape, cap, dtype):
    logits, targets, upstream = _inputs(*shape, dtype)
    rest = cap, shape[2]
    exact = _expected(logits, targets, upstream, torch.float64, *rest)
    same = _expected(logits, targets, upstream, dtype, *rest)
    found = _losses_and_gradients(kernels.softcap_cross_entropy, logits, targets, upstream, *rest)
    assert found[0].dtype == torch.float32 and found[1].dtype == dtype
    _check(found, exact, same, 2e-6)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    logits = torch.randn(2**31 // 100_000 + 2, 100_000, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 100_000, (len(logits),), device="cuda")
    last = _expected(logits[-1:], targets[-1:], torch.ones(1, device="cuda"), torch.float32, 15.0, 100_000)
    loss = kernels.loss_and_gradient_(logits, targets, torch.ones(1, device="cuda").expand(len(logits)), 15.0, 100_000)
    assert_close(loss[-1:], last[0], 1e-5)
    assert_close(logits[-1:], last[1], 1e-2)
