"""The reference against the formula, the kernels against the reference in float64: loss and gradient."""

import pytest
import torch

from fusedlm.ops import softcap_cross_entropy
from fusedlm.ops.common import Setting
from fusedlm.ops.softcap_cross_entropy import reference
from fusedlm.ops.softcap_cross_entropy.op import SOFTCAP_CROSS_ENTROPY
from fusedlm.testing import assert_close, error_ratio

kernels = pytest.importorskip("fusedlm.ops.softcap_cross_entropy.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("cap", [None, 3.0, 30.0])
@pytest.mark.parametrize("classes, padded", [(2, 2), (13, 16), (64, 64)])
def test_is_the_log_softmax_of_capped_logits(cap, classes, padded, z_loss):
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(11, padded, generator=g, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, classes, (11,), generator=g)
    targets[3] = -100

    def run(z):
        return softcap_cross_entropy(z, targets, cap=cap, n_classes=classes, z_loss=z_loss)

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


def test_shapes_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"\(4, 9\) and targets \(3,\)"):
        softcap_cross_entropy(torch.zeros(4, 9), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="reduction 'total' must be"):
        softcap_cross_entropy(torch.zeros(4, 9), torch.zeros(4, dtype=torch.int64), reduction="total")


CAPS = [None, 3.0, 15.0, 90.0]  # with the last the kernel looks for the maximum, as without a cap
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
    """Within four times what the reference in the same precision is wrong by, which by luck may be little."""
    for name, a, e, s in zip(("loss", "gradient"), found, exact, same, strict=True):
        if e.numel():
            assert_close(a, e, max(4 * error_ratio(s, e), floor), name)
        assert a.isfinite().all()


@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("shape", SHAPES)
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
def test_neighbours_of_any_size(cap, width, dtype):
    """Logits share divisions, of products that must neither overflow nor vanish."""
    g = torch.Generator().manual_seed(width)
    sizes = torch.tensor([-3e4, -300.0, -40.0, -2.0, 0.0, 0.5, 40.0, 300.0, 3e4])
    logits = sizes[torch.randint(len(sizes), (12, width), generator=g)]
    logits[:4], logits[4] = sizes[torch.tensor([0, 3, 6, 8])][:, None], sizes[-1]  # and whole rows of one size
    logits = logits.to(DEVICE, dtype).requires_grad_()
    targets, upstream = torch.arange(12, device=DEVICE) % width, torch.ones(12, device=DEVICE)
    floor = 2e-6 if dtype == torch.float32 else 2**-8 * 1.1  # a rounding, where few numbers are most of a gradient
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
    """To float32's last digits, of which the difference of 1 and a tanh keeps few."""
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
def test_of_one_class_the_loss_is_nothing(cap):
    """But for the rounding of the two numbers, some 10, that it is the difference of."""
    logits, targets, upstream = _inputs(3, 1, 1)
    found = _losses_and_gradients(kernels.softcap_cross_entropy, logits, targets, upstream, cap, 1)
    in_place = logits.detach().clone()
    both = kernels.loss_and_gradient_(in_place, targets, upstream, cap, 1)
    assert all(x.abs().max() < 1e-5 for x in (*found, both, in_place))


def test_kernel_on_rows_apart_and_one_weight_for_all():
    logits, targets, _ = _inputs(6, 50, 50)
    wide = torch.full((6, 77), float("nan"), device=DEVICE)
    wide[:, :50] = logits.detach()
    apart = wide[:, :50].requires_grad_()
    weight = torch.tensor(0.25, device=DEVICE)
    expected = _expected(logits, targets, weight, torch.float64, 15.0, 50)
    found = _losses_and_gradients(kernels.softcap_cross_entropy, apart, targets, weight, 15.0, 50)
    _check(found, expected, expected, 2e-6)
    loss = kernels.loss_and_gradient_(wide[:, :50], targets, weight.expand(6), 15.0, 50)
    _check((loss, wide[:, :50]), expected, expected, 2e-6)
    assert wide[:, 50:].isnan().all(), "what lies between rows is not touched"


def _reduced(logits, targets, factor, implementation, **options):
    """A reduced loss times a factor, and its gradient by way of an operation on a leaf."""
    leaf = logits.detach().nan_to_num().requires_grad_()
    loss = softcap_cross_entropy(2 * leaf, targets, cap=15.0, implementation=implementation, **options)
    return loss.detach(), torch.autograd.grad(factor * loss, leaf)[0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("factor", [1.0, -2.5])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(7, 13, 13), (5, 9000, 8990)])
def test_reduced_with_the_gradient_made_beside_it(shape, reduction, factor, in_place, compiled):
    logits, targets, _ = _inputs(*shape)
    targets[0] = 7  # by which number rows are ignored here
    options = {"reduction": reduction, "n_classes": shape[2], "z_loss": 1e-3, "ignore_index": 7}
    run = _reduced
    if compiled:
        torch._dynamo.reset()

        def run(logits, targets, factor, implementation, **options):
            leaf = logits.detach().nan_to_num().requires_grad_()
            function = torch.compile(softcap_cross_entropy, fullgraph=True, backend="aot_eager")
            loss = function(2 * leaf, targets, cap=15.0, implementation=implementation, **options)
            return loss.detach(), torch.autograd.grad(factor * loss, leaf)[0]

    targets = targets.masked_fill(targets < 0, 1)
    found = run(logits, targets, factor, kernels.softcap_cross_entropy, in_place=in_place, **options)
    exact = _reduced(logits.double(), targets, factor, None, **options)
    same = _reduced(logits, targets, factor, None, **options)
    _check(found, exact, same, 2e-6)
    assert not found[1][0].any(), "the ignored row"


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(7, 13, 13), (5, 9000, 8990), (70_001, 3, 3)], ids=str)
def test_reduced_without_a_gradient(shape, reduction, poisoned):
    """The last has more rows than the programs that count them and sum them up take at once."""
    logits, targets, _ = _inputs(*shape)
    targets[::3] = -100
    logits = logits.detach().nan_to_num()
    options = {"cap": 15.0, "n_classes": shape[2], "z_loss": 1e-3, "reduction": reduction}
    found = softcap_cross_entropy(logits, targets, implementation=kernels.softcap_cross_entropy, **options)
    exact = softcap_cross_entropy(logits.double(), targets, **options)
    assert not found.requires_grad
    assert_close(found, exact, max(4 * error_ratio(softcap_cross_entropy(logits, targets, **options), exact), 1e-6))


@pytest.mark.parametrize("cap", [None, 15.0])
@pytest.mark.parametrize("width", [40, 5000])
def test_what_is_in_front_of_the_loss_is_finished(width, cap):
    """Kernels may be launched before the one in front of them ends; what that writes last is read all the same."""
    n = 4096 if DEVICE == "cuda" else 8
    logits, targets, _ = _inputs(n, width, width)
    clean, weights = logits.detach().nan_to_num(), torch.rand(n, device=DEVICE)
    expected, others = None, torch.randn_like(clean)
    for _ in range(4):
        for reduction in ("mean", "sum"):
            z = others.mul_(0.5).add_(clean).requires_grad_()  # other logits every time, in the same memory
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


def test_in_place_writes_into_the_logits_and_only_when_allowed():
    logits, targets, _ = _inputs(7, 13, 13)
    for in_place in (False, True):
        z = logits.detach().nan_to_num().requires_grad_() * 1.0
        before = z.detach().clone()
        loss = softcap_cross_entropy(
            z, targets, cap=15.0, reduction="sum", in_place=in_place, implementation=kernels.softcap_cross_entropy
        )
        assert torch.equal(z.detach(), before) != in_place
        with torch.no_grad():
            z = before.clone()
            again = softcap_cross_entropy(
                z, targets, cap=15.0, reduction="sum", in_place=True, implementation=kernels.softcap_cross_entropy
            )
        assert torch.equal(z, before) and torch.equal(again, loss.detach())


def test_a_reduced_loss_is_differentiated_once():
    logits, targets, _ = _inputs(7, 13, 13)
    z = logits.detach().nan_to_num().requires_grad_()
    loss = softcap_cross_entropy(z, targets, reduction="sum", implementation=kernels.softcap_cross_entropy)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="reduction='none'"):
        loss.backward()


def test_a_mean_over_nothing_is_nan():
    logits, targets, _ = _inputs(3, 5, 5)
    for implementation in (None, kernels.softcap_cross_entropy):
        targets.fill_(-100)
        assert softcap_cross_entropy(logits, targets, reduction="mean", implementation=implementation).isnan()


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("width", [40, 25000])
def test_a_logit_that_is_no_number_is_seen(width, cap):
    """In the loss and in the gradient, of its row and of no other."""
    logits, targets, upstream = _inputs(5, width, width)
    logits = logits.detach().nan_to_num().requires_grad_()
    logits.data[2, 7] = float("nan")
    loss, gradient = _losses_and_gradients(kernels.softcap_cross_entropy, logits, targets, upstream, cap, width)
    in_place = logits.detach().clone()
    both = kernels.loss_and_gradient_(in_place, targets, upstream, cap, width)
    for found, left in ((loss, gradient), (both, in_place)):
        assert found.isnan().tolist() == [False, False, True, False, False]
        assert left[2].isnan().all() and left[[0, 1, 3, 4]].isfinite().all()


def test_a_target_that_is_no_class_is_seen():
    logits, _, _ = _inputs(2, 10, 10)
    loss = kernels.softcap_cross_entropy(logits, torch.tensor([3, 10], device=DEVICE), None, 10)
    assert loss[0].isfinite() and loss[1].isnan()


def test_operators_keep_their_promises():
    logits, targets, upstream = _inputs(3, 40, 33)
    clean = logits.detach().nan_to_num().requires_grad_()
    torch.library.opcheck(torch.ops.fusedlm.softcap_cross_entropy.default, (clean, targets, 15.0, 33, 1e-3))
    sums = torch.ops.fusedlm.softcap_cross_entropy(clean, targets, 15.0, 33, 1e-3)[1].detach()
    arguments = (upstream, clean.detach(), targets, sums, 15.0, 33, 1e-3)
    torch.library.opcheck(torch.ops.fusedlm.softcap_cross_entropy_backward.default, arguments)
    arguments = (clean.detach(), targets, True, 15.0, 33, 1e-3)
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


def test_which_runs_where():
    on_cpu = SOFTCAP_CROSS_ENTROPY.choose("auto", Setting(torch.device("cpu"), torch.float32))
    assert on_cpu.name == "reference" and "triton: needs a CUDA device" in on_cpu.reason
    with pytest.raises(ValueError, match="'triton' cannot run: needs a CUDA device, not cpu"):
        SOFTCAP_CROSS_ENTROPY.choose("triton", Setting(torch.device("cpu"), torch.float32))


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
