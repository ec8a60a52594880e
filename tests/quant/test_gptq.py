"""GPTQ, the search of clips and low-rank corrections against direct implementations in float64."""

import itertools

import pytest
import torch

from fusedlm.ops import dequantize_weight, quantize_weight
from fusedlm.ops.quantized.integer import fake_quantize, integer_codes, integer_scales, integer_values, largest_code
from fusedlm.ops.quantized.reference import WEIGHT_FORMATS
from fusedlm.quant import gptq
from fusedlm.quant.formats import RATIOS, Integers, column_scales, decoded, packed
from fusedlm.quant.gptq import inverse_factor, output_error, round_compensated, round_plain, search_scales
from fusedlm.quant.integer import IntegerMatrix
from fusedlm.quant.low_rank import correction, low_rank_bytes
from fusedlm.quant.matrix import Inputs, Method, quantize_matrix

FORMATS = [Integers(bits, group) for bits, group in ((2, None), (3, 7), (4, None), (5, 16), (8, None))]
FORMATS += [packed("mxfp4"), packed("int4", 32), packed("fp8"), packed("int8")]


def _problem(n_rows=24, width=40, n_tokens=200, mixing=0.9, seed=0):
    """A weight, and the Hessian of inputs whose columns are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_rows, width, generator=generator, dtype=torch.float64)
    own = torch.randn(n_tokens, width, generator=generator, dtype=torch.float64)
    common = torch.randn(n_tokens, 3, generator=generator, dtype=torch.float64)
    mix = torch.randn(3, width, generator=generator, dtype=torch.float64)
    sizes = torch.rand(width, generator=generator, dtype=torch.float64) + 0.2
    x = ((1 - mixing) * own + mixing * common @ mix) * sizes
    return weight.float().double(), x.T @ x / n_tokens


def _textbook(weight, hessian, scales, format, ordered=True, damping=0.01):
    """Column by column with the explicit inverse, which loses a row and a column at every step: equations 2 and 3 of
    the paper, from optimal brain surgery."""
    width = weight.shape[1]
    weight, scale = weight.clone(), column_scales(format, scales, width)
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist() if ordered else list(range(width))
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64))
    levels = torch.zeros_like(weight)
    for column in order:
        levels[:, column] = format.nearest(weight[:, column] / scale[:, column])
        error = (weight[:, column] - levels[:, column] * scale[:, column]) / inverse[column, column]
        weight -= error[:, None] * inverse[column]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column].clone()
        inverse[column], inverse[:, column], inverse[column, column] = 0, 0, 1
    return levels


def _gptq(weight, hessian, scales, format, block=128, **options):
    return round_compensated([weight], [scales], format, [inverse_factor(hessian, **options)], block=block)[0]


def _error(levels, scales, weight, hessian, format):
    error = levels * column_scales(format, scales, weight.shape[1]) - weight
    return float(output_error(error, hessian).sum())


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("ordered", [True, False])
def test_gptq_is_the_textbook(format, ordered):
    for seed, damping, block in ((0, 0.01, 128), (1, 0.1, 8), (2, 0.01, 7)):
        weight, hessian = _problem(seed=seed)
        scales = format.scales(weight, None)
        expected = _textbook(weight, hessian, scales, format, ordered, damping)
        found = _gptq(weight, hessian, scales, format, block, ordered=ordered, damping=damping)
        assert torch.equal(found, expected)
        other = _gptq(weight, hessian, scales, format, block, ordered=not ordered, damping=damping)
        assert not torch.equal(other, expected)  # the order matters here


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_compensated_errors_are_never_above_those_of_plain_rounding(format):
    for seed, mixing in itertools.product(range(4), (0.5, 0.8, 0.95)):
        weight, hessian = _problem(n_rows=64, mixing=mixing, seed=seed)
        scales = format.scales(weight, None)
        plain = _error(round_plain(weight, scales, format), scales, weight, hessian, format)
        for ordered in (True, False):
            levels = _gptq(weight, hessian, scales, format, ordered=ordered)
            assert _error(levels, scales, weight, hessian, format) < plain


def test_the_compensated_error_is_that_of_theory():
    """Rounding errors uniform in the step s give s^2 / 12 * sum of 1 / U_kk^2 per row with compensation, where U is the
    factor of the inverse, and s^2 / 12 * trace of H without: the first are the variances of columns given those after
    them, which correlation shrinks, and without correlation both are the same."""
    format, ratios = Integers(8), []
    for mixing in (0.0, 0.6, 0.95):
        weight, hessian = _problem(n_rows=1000, width=40, n_tokens=5000, mixing=mixing)
        hessian = hessian + 1e-4 * torch.eye(40, dtype=torch.float64)
        scales = 4 * format.scales(weight, None)  # so that no compensated weight is clamped
        step = scales.double().square().sum() / 12
        inverse = inverse_factor(hessian, damping=0.0)
        theory = step * inverse.upper_KK.diagonal().square().reciprocal().sum()
        found = _error(_gptq(weight, hessian, scales, format, damping=0.0), scales, weight, hessian, format)
        assert abs(found / theory - 1) < 0.05
        plain = _error(round_plain(weight, scales, format), scales, weight, hessian, format)
        assert abs(plain / (step * hessian.trace()) - 1) < 0.25
        ratios.append(found / plain)
    assert abs(ratios[0] - 1) < 0.05 and ratios[0] > 2 * ratios[1] > 4 * ratios[2]


def test_the_order_is_that_of_the_diagonal():
    weight, hessian = _problem()
    ordered, plain = inverse_factor(hessian), inverse_factor(hessian, ordered=False)
    diagonal = hessian.diagonal()[ordered.order_K]
    assert (diagonal[:-1] >= diagonal[1:]).all() and plain.order_K.tolist() == list(range(40))
    for inverse in (ordered, plain):
        permuted = hessian[inverse.order_K][:, inverse.order_K]
        damped = permuted + 0.01 * hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
        found = inverse.upper_KK.T @ inverse.upper_KK @ damped
        assert torch.equal(inverse.upper_KK, inverse.upper_KK.triu())
        assert (found - torch.eye(40, dtype=torch.float64)).abs().max() < 1e-10


def test_order_helps_where_a_few_columns_are_large():
    gains = []
    for seed in range(6):
        weight, hessian = _problem(n_rows=64, seed=seed)
        size = torch.ones(40, dtype=torch.float64)
        size[30:34] = 20.0  # rounded among the last without the order
        hessian = hessian * size * size[:, None]
        scales = Integers(3).scales(weight, None)
        errors = [
            _error(_gptq(weight, hessian, scales, Integers(3), ordered=o), scales, weight, hessian, Integers(3))
            for o in (True, False)
        ]
        gains.append(errors[0] / errors[1])
    assert max(gains) < 1.0 and sum(gains) / len(gains) < 0.8


def test_damping():
    """It shrinks the compensation: with much of it every element is rounded by itself. A singular Hessian raises it."""
    weight, hessian = _problem(n_tokens=12)  # of rank 12
    scales = Integers(4).scales(weight, None)
    plain = round_plain(weight, scales, Integers(4))
    assert torch.equal(_gptq(weight, hessian, scales, Integers(4), damping=1e6), plain)
    changed = [
        int((_gptq(weight, hessian, scales, Integers(4), damping=damping) != plain).sum())
        for damping in (10, 0.1, 0.01)
    ]
    assert changed == sorted(changed) and 0 < changed[0] < changed[2]
    assert inverse_factor(hessian).damping == 0.01
    raised = inverse_factor(hessian, damping=0.0)
    assert 0 < raised.damping < 0.01 and raised.upper_KK.isfinite().all()
    # A negative eigenvalue, as rounding can leave it, of a tenth of the mean diagonal.
    mean = hessian.diagonal().mean()
    broken = hessian - 0.1 * mean * torch.eye(40, dtype=torch.float64)
    outcome = quantize_matrix(weight, [Inputs(broken, 12)], Integers(4), Method("gptq"))
    assert outcome.damping == 1.0 and "damping raised to 1" in outcome.notes
    with pytest.raises(ValueError, match="the Hessian has NaN"):
        inverse_factor(hessian * torch.nan)


def test_columns_without_input_are_rounded_by_themselves():
    weight, hessian = _problem()
    dead = torch.tensor([3, 17])
    hessian[dead], hessian[:, dead] = 0, 0
    scales = Integers(3).scales(weight, None)
    inverse = inverse_factor(hessian)
    (levels,) = round_compensated([weight], [scales], Integers(3), [inverse])
    assert inverse.dead == 2 and torch.equal(levels[:, dead], round_plain(weight, scales, Integers(3))[:, dead])
    live = torch.tensor([i for i in range(40) if i not in (3, 17)])
    # The others are compensated as if the dead columns were not there, with the damping of all 40.
    damping = 0.01 * 38 / 40 * (hessian.trace() / 38 + 0) / (hessian.trace() / 38)
    expected = _gptq(weight[:, live], hessian[live][:, live], scales, Integers(3), damping=float(damping))
    assert torch.equal(levels[:, live], expected)
    assert inverse_factor(hessian, damping=0.0).damping == 0.0  # they do not make it singular
    nothing = inverse_factor(torch.zeros(40, 40, dtype=torch.float64))
    assert nothing.dead == 40
    (levels,) = round_compensated([weight], [scales], Integers(3), [nothing])
    assert torch.equal(levels, round_plain(weight, scales, Integers(3)))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_searched_scales_are_the_best_candidates(format):
    weight, hessian = _problem(n_rows=8)
    weight[0, 5] = 30.0  # an outlier, that is worth clipping
    found = search_scales(weight, format, hessian)
    size = format.group or 40
    for row, part in itertools.product(range(8), range(found.shape[1])):
        columns = slice(part * size, (part + 1) * size)
        errors = []
        for scales in format.candidates(weight):
            levels = round_plain(weight, scales, format)
            error = (levels * column_scales(format, scales, 40) - weight)[row, columns]
            errors.append((float(error @ hessian[columns, columns] @ error), scales[row, part]))
        least = min(errors, key=lambda pair: pair[0])
        assert least[1] == found[row, part]
    if format.group is None and format in (Integers(2), Integers(4)):
        assert (found != format.scales(weight, None)).any()


def test_groups_help_where_parts_of_rows_differ():
    weight, hessian = _problem()
    weight[:, ::2] *= torch.linspace(0.01, 1, 20, dtype=torch.float64)
    errors = []
    for group in (None, 8):
        format = Integers(4, group)
        scales = format.scales(weight, None)
        assert scales.shape == (24, 1 if group is None else 5)
        errors.append(_error(_gptq(weight, hessian, scales, format), scales, weight, hessian, format))
    assert errors[1] < 0.8 * errors[0]


def test_integers_have_scales_without_a_floor():
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)) * 1e-20
    weight[2] = 0
    for bits, group in itertools.product((2, 5, 8), (None, 7)):
        scales = integer_scales(weight, bits, group)
        codes = integer_codes(weight, scales, bits, group)
        assert scales.dtype == torch.bfloat16 and (scales[2] == 0).all() and (codes[2] == 0).all()
        assert codes.abs().amax(1)[[0, 1, 3, 4]].min() == largest_code(bits)
        error = integer_values(codes, scales, group) - weight
        assert error.norm() < 0.7 / largest_code(bits) * 24**0.5 * weight.abs().max()


@pytest.mark.parametrize("group", [None, 3])
def test_equal_elements_are_kept_by_any_clip(group):
    """They have no deviation: a scale made of it would round them to zero."""
    weight = torch.stack([torch.full((5,), 0.7), torch.zeros(5), torch.tensor([1.0, 1, 1, 1, 1 + 1e-6])])
    for clip in (None, 1.0, 12.85):
        torch.testing.assert_close(fake_quantize(weight, 6, group, clip), weight, rtol=0.01, atol=0)


def test_clips_of_standard_deviations():
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = integer_scales(weight, 6, clip=12.85)
    expected = 12.85 * weight.std(1, correction=0) / 31
    assert ((scales[:, 0].double() / expected - 1).abs() < 2**-8).all()
    by_group = integer_scales(weight, 6, group=16, clip=2.0)  # the last group has two columns
    last = 2.0 * weight[:, 48:].std(1, correction=0) / 31
    assert ((by_group[:, 3].double() / last - 1).abs() < 2**-8).all()
    coarse, fine = (integer_codes(weight, integer_scales(weight, 6, clip=c), 6) for c in (12.85, 3.0))
    assert coarse.unique().numel() < fine.unique().numel() and fine.max() == 31


def test_values_are_those_of_the_contract():
    weight = torch.randn(9, 50, generator=torch.Generator().manual_seed(0))
    for bits, group in itertools.product((2, 4, 8), (None, 16)):
        scales = integer_scales(weight, bits, group)
        codes = integer_codes(weight, scales, bits, group)
        matrix = IntegerMatrix(codes.to(torch.int8), scales, bits, group)
        assert torch.equal(matrix.values(), integer_values(codes.to(torch.int8), scales, group))
        assert torch.equal(matrix.values(), fake_quantize(weight, bits, group))
    stack = torch.randn(3, 4, 50)
    assert torch.equal(fake_quantize(stack, 3)[1], fake_quantize(stack[1], 3))


@pytest.mark.parametrize("format", WEIGHT_FORMATS)
def test_plain_rounding_is_that_of_the_format(format):
    weight = torch.randn(20, 70, generator=torch.Generator().manual_seed(0))
    outcome = quantize_matrix(weight, [Inputs()], packed(format), Method())
    expected = quantize_weight(weight, format)
    assert torch.equal(outcome.matrix.codes, expected.codes) and torch.equal(outcome.matrix.scales, expected.scales)
    assert abs(outcome.error - float((dequantize_weight(expected) - weight).square().sum())) < 1e-4


def test_corrections_are_the_best_of_their_rank():
    """By Eckart and Young the weighted error that is left is that of the singular values that are left."""
    weight, hessian = _problem(n_rows=30)
    hessian = hessian + 0.5 * torch.eye(40, dtype=torch.float64)
    error = weight - weight.round()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    sizes = torch.linalg.svdvals(error @ torch.linalg.cholesky(damped))
    for rank in (1, 4, 30):
        term = correction(error, hessian, rank)
        left = error + term.values().double()
        assert term.nbytes == low_rank_bytes(30, 40, rank) == 2 * rank * 70
        found, expected = float(output_error(left, damped).sum()), float(sizes[rank:].square().sum())
        assert abs(found - expected) < 1e-3 * float(output_error(error, damped).sum())
        unweighted = torch.linalg.svd(error)
        plain = (unweighted.U[:, :rank] * unweighted.S[:rank]) @ unweighted.Vh[:rank]
        assert rank == 30 or found < float(output_error(error - plain, damped).sum())
    for rank in (0, 31):
        with pytest.raises(ValueError, match=f"rank={rank} must be from 1 to 30"):
            correction(error, hessian, rank)
    assert (correction(torch.zeros(4, 40), hessian, 2).values() == 0).all()


def test_what_a_matrix_reports():
    weight, hessian = _problem()
    methods = {name: Method(name, "max" if name == "plain" else "search") for name in ("plain", "gptq-lite", "gptq")}
    found = {name: quantize_matrix(weight, [Inputs(hessian, 200)], Integers(3), m) for name, m in methods.items()} | {
        "corrected": quantize_matrix(weight, [Inputs(hessian, 200)], Integers(3), methods["gptq"], rank=4)
    }
    errors = [outcome.error for outcome in found.values()]
    assert errors == sorted(errors, reverse=True) and len(set(errors)) == 4
    for outcome in found.values():
        error = outcome.values().double() - weight
        assert abs(outcome.error / float(output_error(error, hessian).sum()) - 1) < 1e-5
        assert abs(outcome.weight_error / float(error.norm() / weight.norm()) - 1) < 1e-5
        assert abs(outcome.power / float(output_error(weight, hessian).sum()) - 1) < 1e-9
        assert outcome.tokens == 200 and torch.equal(decoded(outcome.matrix), outcome.matrix.values())
    assert found["plain"].damping is None and found["gptq"].damping == 0.01


@pytest.mark.parametrize("together", [1, 2, 3])
def test_a_matrix_of_a_stack_is_quantised_as_it_is_alone(together, monkeypatch):
    weight, _ = _problem()
    monkeypatch.setattr(gptq, "_TOGETHER", together * sum(weight.shape) * weight.shape[1])
    problems = [_problem(seed=seed) for seed in range(3)]
    used = torch.tensor([0.5], dtype=torch.float64)
    parts = [Inputs(hessian, 10, used, note="few") for _, hessian in problems]
    stacked = torch.cat([weight for weight, _ in problems])
    found = quantize_matrix(stacked, parts, Integers(3), Method("gptq"), rank=2)
    single = [quantize_matrix(w, [Inputs(h)], Integers(3), Method("gptq")) for w, h in problems]
    assert torch.equal(found.matrix.codes, torch.cat([one.matrix.codes for one in single]))
    assert found.low_rank is None and found.tokens == 30 and found.notes == ("few",)
    assert abs(found.error / sum(0.5 * one.error for one in single) - 1) < 1e-9


def test_embeddings_weigh_rows_and_compensate_nothing():
    weight, _ = _problem(n_rows=4)
    frequency = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    found = quantize_matrix(weight, [Inputs(None, 8, frequency)], Integers(3), Method("gptq", "search"))
    lite = quantize_matrix(weight, [Inputs(None)], Integers(3), Method("gptq-lite", "search"))
    assert torch.equal(found.matrix.codes, lite.matrix.codes) and found.damping is None
    expected = ((found.values().double() - weight).square().sum(1) * frequency).sum()
    assert abs(found.error / float(expected) - 1) < 1e-9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibrate": "awq"}, "calibrate='awq' must be one of plain, gptq-lite, gptq"),
        ({"clip": "search"}, "clip='search' needs the inputs of layers"),
        ({"calibrate": "gptq-lite"}, "gptq-lite is the search of clips"),
        ({"calibrate": "gptq", "clip": "best"}, "clip='best' must be max, search or a number"),
        ({"clip": 0.0}, "clip=0.0 must be greater than 0"),
        ({"calibrate": "gptq", "damping": -1.0}, "damping=-1.0 must be from 0"),
    ],
)
def test_refused_methods(options, words):
    with pytest.raises(ValueError, match=words):
        Method(**options)


def test_refused_matrices():
    weight, hessian = _problem()
    with pytest.raises(ValueError, match="clip=3.0: scales of fp8 are not made of standard deviations"):
        quantize_matrix(weight, [Inputs(hessian)], packed("fp8"), Method(clip=3.0))
    weight[1, 1] = torch.inf
    with pytest.raises(ValueError, match="weight has NaN or infinity"):
        quantize_matrix(weight, [Inputs(hessian)], Integers(4), Method())


def test_the_ratios_of_the_search_include_no_clip():
    assert RATIOS[0] == 1.0 and min(RATIOS) == 0.2
