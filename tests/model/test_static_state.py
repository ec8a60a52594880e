"""A static state: one-token steps give what a growing state gives, in the same memory, with no wait for the device."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusedlm.model.waiting import waiting_module
from fusedlm.nn.cache import TokenCache, WindowCache
from fusedlm.nn.rope import YaRN, rope_table
from fusedlm.testing import MIXER_CASES, assert_close, part_model
from tests.laws.models import ALL_MODELS, random_model, some_tokens

PROMPTS = [7, 1, 12, 3]  # lengths
STEPS = 9
BOUND = 1e-12


class HostReads(TorchDispatchMode):
    """Counts the operators that give the host a number from a tensor, or a shape that depends on one."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def _prefilled(model, max_tokens=None, seed=1):
    tokens = some_tokens(len(PROMPTS), max(PROMPTS), seed)
    state = model.init_state(len(PROMPTS), max_tokens)
    model(tokens, state=state, lengths=PROMPTS)
    return state


def _addresses(state):
    return [tensor.data_ptr() for part in state.parts() for tensor in part.tensors()]


@ALL_MODELS
@torch.no_grad()
def test_steps_are_those_of_a_growing_state(make):
    model = random_model(make)
    growing, static = _prefilled(model), _prefilled(model)
    static.make_static(max(PROMPTS) + STEPS)
    addresses = _addresses(static)
    steps = some_tokens(len(PROMPTS), STEPS, 2)
    for step in steps.split(1, dim=1):
        assert_close(model(step, state=static).logits, model(step, state=growing).logits, BOUND)
    assert _addresses(static) == addresses
    assert static.lengths_B.tolist() == growing.lengths
    assert static.next_position_B.tolist() == growing.next_position_B.tolist()


@ALL_MODELS
@torch.no_grad()
def test_a_step_needs_nothing_from_the_device(make, monkeypatch):
    monkeypatch.setattr("fusedlm.nn.embedding.check_ids", lambda *_: None)  # on the CPU alone
    model = random_model(make)
    state = _prefilled(model)
    state.make_static(max(PROMPTS) + 2)
    waits = waiting_module(model, torch.device("cpu"), torch.float64) is not None
    with HostReads() as reads:
        model(some_tokens(len(PROMPTS), 1, 2), state=state)
    assert bool(reads.found) == waits


@ALL_MODELS
@torch.no_grad()
def test_another_batch_takes_the_place_of_the_first(make):
    model = random_model(make)
    static = _prefilled(model, seed=5)
    static.make_static(max(PROMPTS) + STEPS)
    for step in some_tokens(len(PROMPTS), STEPS, 2).split(1, dim=1):
        model(step, state=static)
    addresses = _addresses(static)
    static.load(_prefilled(model))
    growing = _prefilled(model)
    for step in some_tokens(len(PROMPTS), STEPS, 3).split(1, dim=1):
        assert_close(model(step, state=static).logits, model(step, state=growing).logits, BOUND)
    assert _addresses(static) == addresses


@pytest.mark.parametrize("case", [case for cases in MIXER_CASES.values() for case in cases])
@torch.no_grad()
def test_a_static_state_takes_more_room(case):
    model = random_model(lambda: part_model(case, vocab_size=61))
    growing, static = _prefilled(model), _prefilled(model)
    static.make_static(max(PROMPTS) + 1)
    for i, step in enumerate(some_tokens(len(PROMPTS), STEPS, 2).split(1, dim=1)):
        if i in (1, 4):
            static.make_static(max(PROMPTS) + (4 if i == 1 else STEPS))
        assert_close(model(step, state=static).logits, model(step, state=growing).logits, BOUND)
    caches = [part for part in static.parts() if isinstance(part, TokenCache)]
    assert all(cache.rows.shape[1] == max(PROMPTS) + STEPS for cache in caches)


@ALL_MODELS
@torch.no_grad()
def test_a_row_that_does_not_grow_leaves_the_others_as_they_are(make):
    model = random_model(make)
    growing, static = _prefilled(model), _prefilled(model)
    static.make_static(max(PROMPTS) + 3)  # less than the steps, which only row 1 takes
    static.growing_B.copy_(torch.tensor([0, 1, 0, 0]))
    for step in some_tokens(len(PROMPTS), STEPS, 2).split(1, dim=1):
        expected = model(step, state=growing, lengths=[0, 1, 0, 0]).logits
        assert_close(model(step, state=static).logits[1], expected[1], BOUND)
    assert static.lengths_B.tolist() == [7, 1 + STEPS, 12, 3]


SPARE = 5


@ALL_MODELS
@torch.no_grad()
def test_tokens_that_are_taken_back(make, monkeypatch):
    """Appends of several tokens, of rows of any lengths, and rollback: those of a growing state, in the same memory and
    with no wait for the device; rows may keep none of them, and the state may be more than once around a ring."""
    monkeypatch.setattr("fusedlm.nn.embedding.check_ids", lambda *_: None)  # on the CPU alone
    model = random_model(make)
    growing, static = _prefilled(model), _prefilled(model)
    static.make_static(max(PROMPTS) + 8 * SPARE, SPARE)
    addresses = _addresses(static)
    waits = waiting_module(model, torch.device("cpu"), torch.float64) is not None
    keeps = torch.tensor([[1, 5, 0, 3], [5, 2, 4, 1], [0, 0, 0, 0], [4, 4, 4, 4], [1, 2, 3, 5]])
    for turn, keep in enumerate(keeps):
        draft, lengths = some_tokens(len(PROMPTS), 4, 20 + turn), torch.tensor([4, 4, 3, 4])
        last = some_tokens(len(PROMPTS), 1, 40 + turn)
        keep_B = keep.clamp(max=lengths + 1)
        logits = []
        for state, given in ((growing, lengths.tolist()), (static, lengths)):
            with HostReads() as reads:
                mark = state.mark()
                first = model(draft, state=state, lengths=given).logits
                second = model(last, state=state).logits
                state.rollback(mark, keep_B)
            logits.append(torch.cat([first[:, :3], second], dim=1))
        assert bool(reads.found) == waits
        assert_close(logits[1], logits[0], BOUND)
        assert static.lengths_B.tolist() == static.next_position_B.tolist() == growing.lengths
        assert _addresses(static) == addresses
    mark = static.mark()
    model(last, state=static)
    static.release(mark)
    model(last, state=growing)
    for step in some_tokens(len(PROMPTS), 3, 60).split(1, dim=1):
        assert_close(model(step, state=static).logits, model(step, state=growing).logits, BOUND)


@pytest.mark.parametrize("case", [case for cases in MIXER_CASES.values() for case in cases])
@torch.no_grad()
def test_a_state_after_rollback_is_that_of_a_straight_run(case):
    """Tensor by tensor, and not only by what is computed from them; caches up to the tokens of each row."""
    model = random_model(lambda: part_model(case, vocab_size=61))
    kept, keep = some_tokens(len(PROMPTS), 4, 2), torch.tensor([4, 0, 2, 3])
    static, straight = _prefilled(model), _prefilled(model)
    for state in (static, straight):
        state.make_static(max(PROMPTS) + 2 * SPARE, SPARE)
    mark = static.mark()
    model(torch.cat([kept, some_tokens(len(PROMPTS), 1, 3)], dim=1), state=static)
    static.rollback(mark, keep)
    for i, token in enumerate(kept.split(1, dim=1)):
        straight.growing_B.copy_(i < keep)
        before = [tensor.clone() for part in straight.parts() for tensor in part.tensors()]
        model(token, state=straight)
        for tensor, old in zip((t for part in straight.parts() for t in part.tensors()), before, strict=True):
            tensor[i >= keep] = old[i >= keep]  # growing_B lets rows that stop compute on; here they must not
    assert static.lengths_B.tolist() == straight.lengths_B.tolist()
    for own, other in zip(static.parts(), straight.parts(), strict=True):
        for a, b in zip(own.tensors(), other.tensors(), strict=True):
            for row, n in enumerate(static.lengths_B.tolist()):
                places = slice(None)
                if isinstance(own, TokenCache):
                    places = slice(n)
                elif isinstance(own, WindowCache):
                    places = torch.arange(max(0, n - own.window + 1), n) % a.shape[1]
                assert_close(a[row][places], b[row][places], BOUND)


def _static(model, capacity=20):
    state = _prefilled(model)
    state.make_static(capacity)
    return state


@torch.no_grad()
def test_what_a_static_state_cannot_do_is_refused():
    model = random_model(lambda: part_model(MIXER_CASES["attention"][0], vocab_size=61))
    with pytest.raises(ValueError, match="capacity=12 must be at least 13"):
        _static(model, 12)
    with pytest.raises(ValueError, match="capacity=19 must be at least 20"):
        _static(model).make_static(19)
    with pytest.raises(ValueError, match="rows without tokens"):
        model.init_state(2).make_static(20)
    with pytest.raises(ValueError, match="takes no mark"):
        _static(model).mark()
    marked = _prefilled(model)
    marked.mark()
    with pytest.raises(ValueError, match="has a mark"):
        marked.make_static(20)
    packed = model.init_state(2)
    model(some_tokens(2, 4), documents=torch.zeros(2, 4, dtype=torch.int64), state=packed)
    with pytest.raises(ValueError, match="has documents"):
        packed.make_static(20)
    for arguments in ({"lengths": [1, 1, 1, 0]}, {"documents": torch.zeros(4, 1, dtype=torch.int64)}):
        with pytest.raises(ValueError, match="one token per row"):
            model(some_tokens(4, 1), state=_static(model), **arguments)
    with pytest.raises(ValueError, match="one token per row"):
        model(some_tokens(4, 2), state=_static(model))
    with pytest.raises(ValueError, match="6 tokens since the mark are more than the spare=5"):
        marked = _prefilled(model)
        marked.make_static(40, SPARE)
        marked.mark()
        model(some_tokens(4, 4), state=marked)
        model(some_tokens(4, 2), state=marked)
    with pytest.raises(ValueError, match="no documents, and lengths as a tensor"):
        model(some_tokens(4, 1), state=marked, lengths=[1, 1, 1, 0])
    with pytest.raises(ValueError, match="capacity=13 cannot load rows of"):
        longer = _prefilled(model)
        model(some_tokens(4, 2), state=longer)
        _static(model, 13).load(longer)
    with pytest.raises(ValueError, match="only a static state loads"):
        _prefilled(model).load(_prefilled(model))


@pytest.mark.parametrize(
    "mixer, op",
    [
        ("gdn", "gated_delta_rule"),
        ("mamba2", "decayed_linear_attention"),
        ("sdla", "differential_linear_attention"),
        ("sdla", "gated_scan"),
    ],
)
@torch.no_grad()
def test_recurrences_overwrite_static_states_alone(mixer, op, monkeypatch):
    """RecurrentState would copy a state that is not overwritten: the values are the same, the memory is moved twice."""
    module = importlib.import_module(f"fusedlm.nn.mixers.{mixer}")
    run, found = getattr(module, op), []
    monkeypatch.setattr(module, op, lambda *args, **rest: found.append(rest["in_place"]) or run(*args, **rest))
    model = part_model(MIXER_CASES[mixer][0])
    state = model.init_state(1)
    model(torch.tensor([[1, 2, 3]]), state=state)
    model(torch.tensor([[4]]), state=state)
    state.make_static(8)
    model(torch.tensor([[5]]), state=state)
    n = len(found) // 3
    assert found == [False] * 2 * n + [True] * n and n > 0


@torch.no_grad()
def test_static_steps_look_rotations_up(monkeypatch):
    """They would have the same values computed from the positions, by more kernels."""
    model = part_model(MIXER_CASES["attention"][0])
    state = model.init_state(1)
    model(torch.tensor([[1, 2, 3]]), state=state)
    state.make_static(8)
    calls = []
    for module in ("fusedlm.model.state", "fusedlm.nn.context"):
        monkeypatch.setattr(f"{module}.rope_table", lambda *args, at=module: calls.append(at) or rope_table(*args))
    for token in (4, 5):
        model(torch.tensor([[token]]), state=state)
    assert calls == ["fusedlm.model.state"]


@torch.no_grad()
def test_tables_and_places_follow_the_tokens():
    model = part_model(MIXER_CASES["attention"][0]).double()
    state = model.init_state(2)
    model(some_tokens(2, 5, 1) % model.vocab_size, state=state, lengths=[5, 3])
    yarn = YaRN(factor=4, trained_length=8)
    for capacity in (7, 9):
        state.make_static(capacity)
        state.growing_B.copy_(torch.tensor([1, 0]))
        model(torch.zeros(2, 1, dtype=torch.int64), state=state)
        lengths = torch.tensor([6 + (capacity == 9), 3])
        assert state.slots().tolist() == [lengths[0], capacity + 3]
        for dim, stretch in ((6, None), (6, yarn), (4, yarn), (0, None)):
            found = state.rope(dim, 100.0, torch.float32, stretch)
            expected = rope_table(lengths[:, None], dim, 100.0, torch.float32, stretch)
            assert all(x.shape == y.shape and x.is_contiguous() for x, y in zip(found, expected, strict=True))
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
