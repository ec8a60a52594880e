"""Distillation from the inputs of two heads: the definition, every gradient, caps, padding, chunks."""

import pytest
import torch

from fusedlm.ops import SigmoidCap, linear_distillation
from fusedlm.ops.distillation import chunked
from fusedlm.testing import assert_close, error_ratio

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESCALED = SigmoidCap(scale=23.0, shift=5.0, width=7.5)
CAPS = [(None, None), (15.0, None), (None, RESCALED), (RESCALED, 4.0)]
# tokens, rows of the student's and of the teacher's weight, classes, widths of both
SHAPES = [(7, 13, 16, 13, 5, 3), (40, 70, 64, 64, 16, 24), (1, 2, 2, 1, 1, 1), (33, 130, 101, 101, 24, 8)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "chunk_rows", lambda n_tokens, n_classes: min(16, max(1, n_tokens)))


def inputs(n, rows, teacher_rows, classes, dim, teacher_dim, dtype=torch.float64):
    g = torch.Generator().manual_seed(n * rows)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(DEVICE, dtype)

    targets = torch.randint(0, classes, (n,), generator=g)
    targets[1:2] = -100
    return [
        normal(n, dim).requires_grad_(), normal(rows, dim, scale=4 / dim**0.5).requires_grad_(), targets.to(DEVICE),
        normal(n).abs(), normal(n, teacher_dim), normal(teacher_rows, teacher_dim, scale=4 / teacher_dim**0.5),
    ]  # fmt: skip


def definition(x, weight, targets, token_weights, teacher_x, teacher_weight, cap, teacher_cap, n_classes, temperature):
    """Token by token, class by class in the open."""

    def probabilities(h, w, c):
        z = w[:n_classes] @ h
        if isinstance(c, SigmoidCap):
            z = c.scale / (1 + (-(z + c.shift) / c.width).exp())
        elif c is not None:
            z = c * (z / c).tanh()
        e = (z / temperature).exp()
        return e / e.sum()

    total = x.new_zeros(())
    for i in range(len(x)):
        if targets[i] != -100:
            p, q = probabilities(x[i], weight, cap), probabilities(teacher_x[i], teacher_weight, teacher_cap)
            total = total + token_weights[i] * temperature**2 * (q * (q.log() - p.log())).sum()
    return total


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("cap, teacher_cap", CAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_gradients_are_the_definition(shape, cap, teacher_cap, temperature, backend):
    tensors, classes = inputs(*shape), shape[3]
    expected = definition(*tensors, cap, teacher_cap, classes, temperature)
    options = {"cap": cap, "teacher_cap": teacher_cap, "n_classes": classes, "temperature": temperature}
    total, divergences = linear_distillation(*tensors, **options, backend=backend)
    assert total.dtype == divergences.dtype == torch.float64 and not divergences.requires_grad
    assert_close(total, expected, 1e-10)
    assert (divergences[1:2] == 0).all() and (divergences >= -1e-14).all()
    assert_close((divergences * tensors[3]).sum() * temperature**2, expected, 1e-10)
    found = torch.autograd.grad(3 * total, tensors[:2])
    wanted = torch.autograd.grad(3 * expected, tensors[:2])
    for name, a, b in zip(("x", "weight"), found, wanted, strict=True):
        assert_close(a, b, 1e-9, name) if classes > 1 else None
    assert (found[1][classes:] == 0).all()


def test_gradients_pass_gradcheck():
    """Of the reference: chunked ones can be used once."""
    x, weight, *rest = inputs(*SHAPES[0])
    options = {"cap": RESCALED, "teacher_cap": 9.0, "n_classes": 13, "temperature": 2.0, "backend": "reference"}
    assert torch.autograd.gradcheck(lambda x, weight: linear_distillation(x, weight, *rest, **options)[0], (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_in_low_precision(dtype):
    """Within four times the error of the reference in the same precision."""
    exact = inputs(*SHAPES[3])
    low = [t.detach().to(dtype) if t.is_floating_point() and i != 3 else t for i, t in enumerate(exact)]
    exact = [t.double() if t.is_floating_point() else t for t in low]  # of the rounded inputs
    results = []
    for tensors, backend in ((low, "chunked"), (low, "reference"), (exact, "reference")):
        leaves = [t.detach().requires_grad_() for t in tensors[:2]]
        options = {"cap": 15.0, "teacher_cap": RESCALED, "n_classes": 101, "temperature": 2.0, "backend": backend}
        total, divergences = linear_distillation(*leaves, *tensors[2:], **options)
        results.append([total.detach(), divergences, *torch.autograd.grad(total, leaves)])
    for name, a, same, e in zip(("sum", "divergences", "x", "weight"), *results, strict=True):
        assert a.dtype == same.dtype, name
        assert_close(a, e, max(4 * error_ratio(same, e), 2e-6), name)


def test_a_teacher_like_the_student_gives_no_loss_and_no_gradient():
    x, weight, targets, token_weights, *_ = inputs(*SHAPES[1])
    total, _ = linear_distillation(
        x, weight, targets, token_weights, x.clone(), weight.clone(), cap=15.0, teacher_cap=15.0, temperature=3.0
    )
    found = torch.autograd.grad(total, (x, weight))
    assert total.abs() < 1e-12 and all(g.abs().max() < 1e-12 for g in found)


def test_the_teacher_gets_no_gradient():
    *rest, teacher_x, teacher_weight = inputs(*SHAPES[1])
    teacher = teacher_x.requires_grad_(), teacher_weight.requires_grad_()
    for backend in ("chunked", "reference"):
        total, _ = linear_distillation(*rest, *teacher, n_classes=64, backend=backend)
        total.backward()
        assert teacher[0].grad is None and teacher[1].grad is None


def test_no_logits_of_all_tokens_exist(monkeypatch):
    shapes, product = [], torch.mm

    def recorded(*args, **rest):
        result = product(*args, **rest)
        shapes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(torch, "mm", recorded)
    linear_distillation(*inputs(*SHAPES[3]), n_classes=101)
    assert (16, 130) in shapes and (16, 101) in shapes
    assert all(not (rows == 33 and columns >= 101) for rows, columns in shapes)


def test_size_of_a_chunk(monkeypatch):
    monkeypatch.undo()
    assert chunked.chunk_rows(16384, 50304) == 512
    assert chunked.chunk_rows(16384, 8192) == 4096
    assert chunked.chunk_rows(100, 2**28) == 100 and chunked.chunk_rows(300, 2**28) == 256
    assert chunked.chunk_rows(0, 10) == 1


def test_gradients_can_be_used_once():
    total, _ = linear_distillation(*inputs(*SHAPES[1]), n_classes=64)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


def test_operator_passes_opcheck():
    x, weight, *rest = (t.detach() for t in inputs(*SHAPES[0]))
    torch.library.opcheck(torch.ops.fusedlm.linear_distillation.default, (x, weight, *rest, [15.0], [], 13, 2.0))


def test_full_graph():
    tensors = inputs(*SHAPES[1])

    def function(x, *rest):
        return linear_distillation(2 * x, *rest, cap=RESCALED, n_classes=64, temperature=2.0, backend="chunked")

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        total, divergences = run(*tensors)
        results.append([total.detach(), divergences, *torch.autograd.grad(total, tensors[:2])])
    for a, b in zip(*results, strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize(
    "change,word",
    [
        ({0: torch.zeros(7, 6)}, "x "),
        ({2: torch.zeros(6, dtype=torch.int64)}, "targets"),
        ({3: torch.zeros(6)}, "token_weights"),
        ({3: torch.zeros(7, requires_grad=True)}, "token_weights require"),
        ({4: torch.zeros(7, 4)}, "teacher_x"),
        ({"n_classes": None}, "13 and 16 rows"),
        ({"n_classes": 14}, "n_classes=14"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"teacher_cap": -1.0}, "cap=-1.0"),
    ],
)
def test_bad_input_is_named(change, word):
    tensors, options = inputs(*SHAPES[0]), {"n_classes": 13}
    for key, value in change.items():
        if isinstance(key, int):
            tensors[key] = value
        else:
            options[key] = value
    with pytest.raises(ValueError, match=word):
        linear_distillation(*tensors, **options)
