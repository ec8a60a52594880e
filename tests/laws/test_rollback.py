"""Append, go back to any cut in each row, append something else = never having appended; rows of different lengths."""

import pytest
import torch

from fusedlm.testing import assert_close, part_model
from tests.laws.models import ALL_MODELS, VOCAB, random_model, some_tokens

ROWS = 4
PREFIX, DRAFT, REST = some_tokens(ROWS, 13, 2), some_tokens(ROWS, 9, 3), some_tokens(ROWS, 11, 4)
RESERVED = PREFIX.shape[1] + DRAFT.shape[1] + REST.shape[1]


def _after(model, row, kept, documents=None):
    """Logits of REST in one row after PREFIX and the first `kept` tokens of DRAFT, in one pass without a state."""
    tokens = torch.cat([PREFIX[row], DRAFT[row, :kept], REST[row]])[None]
    if documents is not None:
        documents = torch.cat([documents[0][row], documents[1][row, :kept], documents[2][row]])[None]
    return model(tokens, documents=documents).logits[0, -REST.shape[1] :]


def _check(model, state, keep, documents=None, bound=1e-10):
    """Feed REST and compare every row."""
    options = {} if documents is None else {"documents": documents[2]}
    pieces = [
        model(REST[:, a:b], state=state, **{k: v[:, a:b] for k, v in options.items()}).logits
        for a, b in ((0, 1), (1, 2), (2, 11))
    ]
    found = torch.cat(pieces, dim=1)
    for row, kept in enumerate(keep):
        assert_close(found[row], _after(model, row, kept, documents), bound, f"row {row}, {kept} kept")


@ALL_MODELS
@pytest.mark.parametrize("reserve", [False, True])
@pytest.mark.parametrize("keep", [[4, 4, 4, 4], [0, 1, 5, 9]], ids=str)
def test_rollback(make, reserve, keep):
    _check_rollback(make, reserve, keep)


@ALL_MODELS
@pytest.mark.parametrize("reserve, keep", [(False, 0), (True, 9)])
def test_rollback_of_everything_and_nothing(make, reserve, keep):
    _check_rollback(make, reserve, [keep] * ROWS)


def _check_rollback(make, reserve, keep):
    model = random_model(make)
    state = model.init_state(ROWS, max_tokens=RESERVED if reserve else None)
    with torch.no_grad():
        model(PREFIX, state=state)
        mark = state.mark()
        for a, b in ((0, 4), (4, 5), (5, 9)):
            model(DRAFT[:, a:b], state=state)
        state.rollback(mark, keep)
        assert state.lengths == [13 + n for n in keep]
        _check(model, state, keep)


@ALL_MODELS
def test_rollback_to_nothing(make):
    """From a state that had seen no token when the mark was set."""
    model = random_model(make)
    state = model.init_state(ROWS)
    with torch.no_grad():
        mark = state.mark()
        model(DRAFT, state=state)
        state.rollback(mark, 0)
        assert state.lengths == [0] * ROWS
        assert_close(model(PREFIX, state=state).logits, model(PREFIX).logits, 1e-10)


@ALL_MODELS
def test_rollback_again_and_again(make):
    """As speculative decoding does, each time from rows of other lengths; documents continue."""
    model = random_model(make)
    state, seen = model.init_state(ROWS), [[] for _ in range(ROWS)]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for turn in range(6):
            mark, draft = state.mark(), some_tokens(ROWS, 5, 10 + turn)
            model(draft, state=state)
            keep = torch.randint(0, 6, (ROWS,), generator=generator)
            state.rollback(mark, keep)
            for row, kept in enumerate(keep.tolist()):
                seen[row] += draft[row, :kept].tolist()
        assert state.lengths == [len(tokens) for tokens in seen] and len(set(state.lengths)) > 1
        last = some_tokens(ROWS, 1, 20)
        found = model(last, state=state).logits
        for row, tokens in enumerate(seen):
            sequence = torch.tensor([[*tokens, last[row].item()]])
            assert_close(found[row], model(sequence).logits[0, -1:], 1e-10, f"row {row}")


def _documents():
    """Of PREFIX, DRAFT and REST: one row continues its document, the others begin one here or there."""
    prefix, draft, rest = (torch.zeros_like(x) for x in (PREFIX, DRAFT, REST))
    prefix[1, 6:] = 1
    draft[1:3] = torch.tensor([[1], [0]])
    draft[2, 2:] = 3
    draft[3] = 4
    rest[1], rest[2], rest[3] = 1, 3, 4
    rest[2, 5:] = 6
    return prefix, draft, rest


@ALL_MODELS
def test_rollback_of_documents(make):
    model, documents = random_model(make), _documents()
    for keep in ([0, 0, 0, 0], [2, 3, 1, 9]):
        state = model.init_state(ROWS)
        with torch.no_grad():
            model(PREFIX, documents=documents[0], state=state)
            mark = state.mark()
            for a, b in ((0, 4), (4, 9)):
                model(DRAFT[:, a:b], documents=documents[1][:, a:b], state=state)
            state.rollback(mark, keep)
            _check(model, state, keep, documents)


@ALL_MODELS
@pytest.mark.parametrize("reserve", [False, True])
def test_rows_of_different_lengths(make, reserve):
    """Prompts of different lengths in one batch, padded at the end: each row is as if alone."""
    model = random_model(make)
    state = model.init_state(ROWS, max_tokens=RESERVED if reserve else None)
    first, second = [13, 1, 7, 4], [0, 9, 2, 5]
    with torch.no_grad():
        prompt = model(PREFIX, state=state, lengths=first).logits
        draft = model(DRAFT, state=state, lengths=torch.tensor(second)).logits
        assert state.lengths == [a + b for a, b in zip(first, second, strict=True)]
        found = model(REST, state=state).logits
        for row in range(ROWS):
            n, m = first[row], second[row]
            alone = torch.cat([PREFIX[row, :n], DRAFT[row, :m], REST[row]])[None]
            expected = model(alone).logits[0]
            assert_close(prompt[row, :n], expected[:n], 1e-10, f"prompt of row {row}")
            assert_close(draft[row, :m], expected[n : n + m], 1e-10, f"second part of row {row}")
            assert_close(found[row], expected[n + m :], 1e-10, f"the rest of row {row}")


@ALL_MODELS
def test_rollback_of_rows_of_different_lengths(make):
    model = random_model(make)
    state, lengths, keep = model.init_state(ROWS), [9, 3, 0, 5], [2, 3, 0, 0]
    with torch.no_grad():
        model(PREFIX, state=state)
        mark = state.mark()
        model(DRAFT[:, :4], state=state, lengths=[min(n, 4) for n in lengths])
        model(DRAFT[:, 4:], state=state, lengths=[max(n - 4, 0) for n in lengths])
        state.rollback(mark, keep)
        _check(model, state, keep)


@ALL_MODELS
def test_a_released_mark_leaves_what_was_appended(make):
    model = random_model(make)
    state = model.init_state(ROWS)
    with torch.no_grad():
        model(PREFIX, state=state)
        mark = state.mark()
        model(DRAFT, state=state)
        state.release(mark)
        _check(model, state, [9] * ROWS)
        mark = state.mark()  # a new one can be set
        model(DRAFT[:, :2], state=state)
        state.rollback(mark, 0)
        assert state.lengths == [13 + 9 + 11] * ROWS


def test_marks_that_cannot_be_used():
    model = part_model("{type: attention, n_heads: 4}", vocab_size=VOCAB)
    state, other = model.init_state(2), model.init_state(2)
    mark = state.mark()
    with pytest.raises(ValueError, match="has a mark already"):
        state.mark()
    with pytest.raises(ValueError, match="not the state's current one"):
        other.rollback(mark)
    model(some_tokens(2, 3), state=state)
    for keep in (4, -1, [1], [1, 2, 3], [0, 4]):
        with pytest.raises(ValueError, match="keep="):
            state.rollback(mark, keep)
    state.rollback(mark, 2)
    with pytest.raises(ValueError, match="not the state's current one"):
        state.rollback(mark, 1)
