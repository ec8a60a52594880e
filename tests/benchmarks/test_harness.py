"""What a benchmark says of contenders that are right and wrong, and that their turns change."""

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness


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


@pytest.mark.parametrize("upstream", [None, torch.ones(1000)], ids=["forward", "both"])
def test_a_contender_that_is_wrong_gets_no_time(upstream):
    problem = _problem(upstream, right=lambda x: 2 * (x / 2).sin() * (x / 2).cos(), wrong=lambda x: x.sin() + 1e-3)
    eager, right, wrong = harness.measure(problem, torch.device("cpu"), quick=True)
    assert eager.milliseconds > 0 and right.milliseconds > 0 and right.reason is None
    assert wrong.reason == "wrong" and wrong.milliseconds is None
    assert [one.name for one in (eager, right, wrong)] == ["eager", "right", "wrong"]


def test_a_gradient_that_is_wrong_is_seen():
    problem = _problem(torch.ones(1000), detached=lambda x: x.sin().detach() + x.cos() - x.cos().detach())
    assert harness.measure(problem, torch.device("cpu"), quick=True)[1].reason == "wrong"


def test_a_part_is_timed_beside_the_whole():
    problem = _problem()
    problem.alone = ("half", lambda x: x[:500].sin())
    found = harness.measure(problem, torch.device("cpu"), quick=True)
    assert found[-1].name == "half" and found[-1].milliseconds > 0 and not found[-1].errors


def test_contenders_take_turns_that_change(monkeypatch):
    """On a device whose clock is the host's."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    memory = torch.zeros(1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", lambda *size, **options: memory)
    calls = []

    def contender(name, seconds):
        return lambda: (calls.append(name), time.sleep(seconds))

    functions = [contender("a", 0.001), contender("b", 0.003), contender("c", 0.0)]
    a, b, c = harness._side_by_side(functions, SimpleNamespace(type="cuda"), quick=True)
    assert c < a < b and a >= 1 and b >= 3
    turns = ["".join(calls[i : i + 3]) for i in range(9, len(calls), 3)]  # behind three warm-ups of each
    assert len(turns) >= 9 and {"".join(sorted(turn)) for turn in turns} == {"abc"}
    assert len(set(turns)) > 2
