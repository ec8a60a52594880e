"""How a benchmark judges contenders, and that timed calls are interleaved."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness
from benchmarks.run import _chosen, _wanted

CPU = torch.device("cpu")


def _problem(upstream=None, **contenders):
    x = torch.linspace(-1, 1, 1000).requires_grad_()

    def exact():
        leaf = x.detach().double().requires_grad_()
        y = leaf.sin()
        return [y.detach()] if upstream is None else [y.detach(), *torch.autograd.grad(y, leaf, upstream.double())]

    return harness.Problem(
        op="sine", shape="1000", dtype=torch.float32, leaves=[x], upstream=upstream, exact=exact,
        contenders={"eager": torch.sin, **contenders}, sample=lambda found: found, n_bytes=8000,
    )  # fmt: skip


def _measure(problem):
    return harness.measure(problem, CPU, quick=True)


@pytest.mark.parametrize("upstream", [None, torch.ones(1000)], ids=["forward", "both"])
def test_a_less_exact_peer_has_its_time_and_its_error(upstream):
    problem = _problem(upstream, exact=lambda x: 2 * (x / 2).sin() * (x / 2).cos(), inexact=lambda x: x.sin() + 1e-3)
    eager, exact, inexact = measured = _measure(problem)
    assert [one.name for one in measured] == ["eager", "exact", "inexact"]
    assert all(one.milliseconds > 0 and one.reason is None for one in measured)
    assert eager.error_over_bound <= 1 and exact.error_over_bound <= 1
    relative = 1e-3 * 1000**0.5 / torch.linspace(-1, 1, 1000).sin().norm().item()
    assert max(inexact.errors) == pytest.approx(relative, rel=1e-3)
    assert inexact.error_over_bound == pytest.approx(relative / problem.min_bound, rel=1e-3)


def test_a_kernel_of_ours_that_is_less_exact_is_wrong():
    fast, slow = _measure(_problem(fusedlm_fast=lambda x: x.sin() + 1e-3, fusedlm_slow=torch.sin))[1:]
    assert fast.reason == "wrong" and fast.milliseconds is None and fast.error_over_bound > 1
    assert slow.reason is None and slow.milliseconds > 0


def test_an_inexact_gradient_counts():
    problem = _problem(torch.ones(1000), detached=lambda x: x.sin().detach() + x.cos() - x.cos().detach())
    detached = _measure(problem)[1]
    assert detached.errors[0] < 1e-6 < detached.errors[1] and detached.error_over_bound > 1


def _with_nan(x):
    return x.sin().index_fill(0, torch.tensor([998]), float("nan"))


@pytest.mark.parametrize(
    "contender, reason",
    [
        (_with_nan, "NaN or infinity"),
        (lambda x: x.sin() / 0, "NaN or infinity"),
        (lambda x: x.sin()[:999], r"wrong shape: [(999,)], not [(1000,)]"),
        (lambda x: x.sin()[0], r"wrong shape: [()], not [(1000,)]"),
        (lambda x: (x.sin(), x.sin()), r"wrong shape: [(1000,), (1000,)], not [(1000,)]"),
    ],
)
def test_nan_and_wrong_shapes_are_never_timed(contender, reason):
    peer, right = _measure(_problem(peer=contender, right=torch.sin))[1:]
    assert peer.reason == reason and peer.milliseconds is None and peer.errors == []
    assert right.milliseconds > 0
    json.dumps(asdict(peer), allow_nan=False)


def test_nan_outside_of_the_sample_is_seen():
    problem = _problem(peer=_with_nan)
    problem.sample = lambda found: [x[:100] for x in found]
    exact = problem.exact
    problem.exact = lambda: [x[:100] for x in exact()]
    assert _measure(problem)[1].reason == "NaN or infinity"


def test_a_part_of_the_work_is_timed_too():
    problem = _problem()
    problem.part = ("half", lambda x: x[:500].sin())
    found = _measure(problem)
    assert found[-1].name == "half" and found[-1].milliseconds > 0 and not found[-1].errors


def test_a_part_may_use_some_leaves_alone_and_a_contender_may_not():
    def both(x, y):
        return x + y

    leaves = [torch.ones(1000).requires_grad_() for _ in range(2)]
    problem = replace(
        _problem(torch.ones(1000)), leaves=leaves, contenders={"eager": both}, exact=lambda: [torch.ones(1000)] * 3,
        sample=lambda found: [x / x.max() for x in found], part=("first", lambda x, y: x.sin()),
    )  # fmt: skip
    assert _measure(problem)[-1].milliseconds > 0
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        _measure(replace(problem, contenders={"eager": both, "forgets one": lambda x, y: x.sin()}))


def test_bounds_of_each_result():
    ours = lambda x: x.sin() + 1e-3 * x.detach()  # noqa: E731  inexact alone in what it returns
    problem = _problem(torch.ones(1000), fusedlm=ours)
    assert _measure(problem)[1].reason == "wrong"
    problem.min_bound = [1e-2, 1e-5]
    assert _measure(problem)[1].reason is None
    problem.min_bound = [1e-5, 1e-2]
    assert _measure(problem)[1].reason == "wrong"


def test_shapes_by_their_first_or_last_sizes():
    shapes = [(32, 2048, 16, 64), (32, 2048, 16, 128), (1, 65536, 16, 64), (132, 2048, 16, 1128)]
    assert _wanted(shapes, []) == shapes
    assert _wanted(shapes, ["32x2048"]) == shapes[:2]
    assert _wanted(shapes, ["128"]) == [shapes[1]]
    assert _wanted(shapes, ["1x65536x16x64", "16x128"]) == [shapes[1], shapes[2]]


def test_chosen_contenders_follow_eager():
    contenders = {"eager": 1, "torch compile": 2, "peer": 3, "fusedlm": 4}
    assert _chosen(contenders, ["fusedlm", "peer"]) == {"eager": 1, "peer": 3, "fusedlm": 4}
    assert list(_chosen(contenders, ["eager"])) == ["eager"]


def test_calls_are_interleaved_in_an_order_that_changes(monkeypatch):
    """On a stand-in for a GPU, whose clock is moved by the calls."""
    now = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]

        def elapsed_time(self, end):
            return end.at - self.at

    memory = torch.zeros(1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: memory)
    calls = []

    def contender(name, milliseconds):
        def call():
            calls.append(name)
            now[0] += milliseconds

        return call

    functions = [contender("a", 1.0), contender("b", 3.0), contender("c", 0.5)]
    assert harness._interleaved(functions, SimpleNamespace(type="cuda"), quick=True) == [1.0, 3.0, 0.5]
    turns = ["".join(calls[i : i + 3]) for i in range(9, len(calls), 3)]  # after three warm-up calls of each
    assert len(turns) >= 9 and {"".join(sorted(turn)) for turn in turns} == {"abc"}
    assert len(set(turns)) > 2
