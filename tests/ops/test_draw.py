"""Drawing the next token: the kernels against the reference, and both against the definition."""

import pytest
import torch

from fusedlm.ops import draw_token
from fusedlm.ops.draw import reference
from fusedlm.testing import backend_of

kernels = pytest.importorskip("fusedlm.ops.draw.triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF, NAN = float("inf"), float("nan")


def _logits(n_rows, vocab, spread=3.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(vocab)
    logits = (spread * torch.randn(n_rows, vocab + 3, generator=g)).to(DEVICE, dtype)[:, 1:-2]  # a slice
    uniform = torch.rand(n_rows, generator=g, dtype=torch.float64).to(DEVICE)
    return logits, uniform


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7, 5e-324, 1e4])
@pytest.mark.parametrize("vocab", [1, 7, 1024, 1025, 3000])
def test_the_kernels_have_the_tokens_of_the_reference(vocab, temperature):
    logits, uniform = _logits(40, vocab)
    logits[::3, ::2] = -INF
    logits[:, vocab // 2] = 0.0
    found = kernels.draw_token(logits, uniform if temperature else None, temperature)
    assert torch.equal(found, reference.draw_token(logits, uniform, temperature))


def test_every_fraction_of_a_small_distribution():
    logits = torch.tensor([[0.125, 0.0, 0.5, 0.375]], device=DEVICE).log().expand(9, -1)
    uniform = torch.tensor([0, 0.1, 0.12499, 0.12501, 0.5, 0.62499, 0.62501, 0.99, 1.0], device=DEVICE).double()
    for run in (kernels.draw_token, reference.draw_token):
        assert run(logits, uniform, 1.0).tolist() == [0, 0, 0, 2, 2, 2, 3, 3, 3]


def test_fractions_at_the_edges_of_blocks():
    """A token that is never drawn is not drawn there either."""
    logits = torch.full((3, 4096), -INF, device=DEVICE)
    logits[:, [1023, 2048, 2050]] = torch.tensor([0.25, 0.5, 0.25], device=DEVICE).log()
    for fractions, tokens in (([0, 0.2499, 0.2501], [1023, 1023, 2048]), ([0.7499, 0.7501, 1], [2048, 2050, 2050])):
        uniform = torch.tensor(fractions, device=DEVICE, dtype=torch.float64)
        assert kernels.draw_token(logits, uniform, 1.0).tolist() == tokens


def test_equal_logits_give_the_lowest_id():
    logits = torch.zeros(2, 3000, device=DEVICE)
    logits[0, [1500, 2900, 1499]] = 1.0
    assert kernels.draw_token(logits, None, 0.0).tolist() == [1499, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(temperature):
    logits, uniform = _logits(5, 2000)
    logits[1, 1500], logits[2, 3], logits[3], logits[4, 1999] = NAN, INF, -INF, -INF
    for run in (kernels.draw_token, reference.draw_token):
        found = run(logits, uniform, temperature).tolist()
        assert found[1:4] == [-1] * 3 and min(found[0], found[4]) >= 0


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.05, 0.2, 0.4, 0.35], device=DEVICE)
    n = 400
    uniform = (torch.arange(n, device=DEVICE, dtype=torch.float64) + 0.5) / n
    found = kernels.draw_token(probabilities.log().expand(n, -1), uniform, 1.0)
    assert torch.bincount(found).tolist() == [20, 80, 160, 140]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7, 5e-324])
def test_the_kernels_on_a_gpu(temperature, dtype):
    for n_rows, vocab in ((256, 50257), (1, 50257), (999, 300)):
        logits, uniform = _logits(n_rows, vocab, dtype=dtype)
        found = kernels.draw_token(logits, uniform if temperature else None, temperature)
        assert torch.equal(found, reference.draw_token(logits.float(), uniform, temperature))


def test_the_operator_passes_opcheck():
    logits, uniform = _logits(2, 9)
    torch.library.opcheck(torch.ops.fusedlm.draw_token.default, (logits, uniform, 0.5))
    torch.library.opcheck(torch.ops.fusedlm.draw_token.default, (logits, None, 0.0))


def test_generation_draws_by_it():
    from fusedlm.generation.sampling import Sampling, draw

    logits, uniform = _logits(3, 50)
    calls = []

    def counted(*arguments):
        calls.append(arguments[2])
        return reference.draw_token(*arguments)

    with backend_of("draw_token", counted):
        for temperature, top_k in ((0.0, None), (0.5, None), (0.0, 3), (0.5, 50)):
            found = draw(logits, uniform, Sampling(1, temperature, top_k, None))
            assert torch.equal(found, reference.draw_token(logits, uniform, temperature))
    assert calls == [0.0, 0.5, 0.0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits_BV": torch.ones(3)}, r"must be \(B, V\)"),
        ({"logits_BV": torch.ones(3, 0)}, "V at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": NAN}, "temperature=nan"),
        ({"uniform_B": None}, "needs random numbers"),
        ({"uniform_B": torch.ones(3)}, "torch.float32 must be"),
        ({"uniform_B": torch.ones(2).double()}, r"must be \(3,\)"),
    ],
)
def test_bad_input(change, words):
    with pytest.raises(ValueError, match=words):
        draw_token(**({"logits_BV": torch.ones(3, 4), "uniform_B": torch.ones(3).double()} | change))
