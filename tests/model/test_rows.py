"""Rows of a state: taken out, joined, put into a static state and moved, they continue as the sequence alone does."""

import pytest
import torch
import torch.nn.functional as F

from fusedlm.model import build_model
from fusedlm.model.rows import copy_rows, join_rows, move_row, needs_snapshot, put_row, static_rows, take_row
from fusedlm.testing import FFN_CASES, MIXER_CASES, part_model, randomise_, wired_config

VOCAB = 61
SWIGLU = "{type: swiglu, hidden: 48}"
CASES = [(case, SWIGLU) for cases in MIXER_CASES.values() for case in cases]
CASES += [("{type: gdn, n_heads: 2, chunk_size: 8}", FFN_CASES["moe"][0]), ("wired", "")]


def make(mixer, ffn):
    if mixer == "wired":
        return randomise_(build_model(wired_config(), vocab_size=VOCAB).double()).eval()
    return randomise_(part_model(mixer, ffn).double()).eval()


def whole(model, tokens):
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def feed(model, state, ids, **options):
    with torch.no_grad():
        return model(ids, state=state, **options).logits


def sequences(lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize(("mixer", "ffn"), CASES)
def test_rows_joined_from_several_states_continue_each_sequence(mixer, ffn):
    model = make(mixer, ffn)
    texts = sequences([17, 9, 12, 8])
    seen = [11, 3, 0, 7]
    rows = []
    for text, n in zip(texts, seen, strict=True):
        state = model.init_state(1)
        if n:
            feed(model, state, text[None, :n])
        rows.append(take_row(state, 0))
    for room in (None, 25):
        state = join_rows(model, rows, room)
        lengths = [len(text) - n for text, n in zip(texts, seen, strict=True)]
        padded = [F.pad(text[n:], (0, 12 - len(text) + n)) for text, n in zip(texts, seen, strict=True)]
        logits = feed(model, state, torch.stack(padded), lengths=lengths)
        for b, text in enumerate(texts):
            torch.testing.assert_close(logits[b, : lengths[b]], whole(model, text)[seen[b] :])
        again = [take_row(state, b) for b in range(4)]
        assert [row.length for row in again] == [len(text) for text in texts]
        last = join_rows(model, again[::-1])
        step = feed(model, last, torch.full((4, 1), 5))
        for b, text in enumerate(texts[::-1]):
            torch.testing.assert_close(step[b, 0], whole(model, torch.cat([text, torch.tensor([5])]))[-1])


@pytest.mark.parametrize(("mixer", "ffn"), CASES)
def test_rows_of_a_static_state_are_replaced_moved_and_resized(mixer, ffn):
    model = make(mixer, ffn)
    texts = sequences([10, 6, 13])
    rows = []
    for text in texts:
        state = model.init_state(1)
        feed(model, state, text[None])
        rows.append(take_row(state, 0))
    static = static_rows(model, rows[2], 4, 16)
    for index, row in enumerate(rows):
        put_row(static, index, row)
    static.set_lengths([10, 6, 13, 1])
    bigger = static_rows(model, rows[0], 5, 32)
    copy_rows(static, bigger, 3)
    move_row(bigger, 2, 0)
    bigger.set_lengths([13, 6, 1, 1, 1])
    now = [texts[2], texts[1]]
    view = bigger.first_rows(2)
    generator = torch.Generator().manual_seed(4)
    for _ in range(5):
        ids = torch.randint(0, VOCAB, (2, 1), generator=generator)
        logits = feed(model, view, ids)
        now = [torch.cat([text, new]) for text, new in zip(now, ids, strict=True)]
        for b in range(2):
            torch.testing.assert_close(logits[b, 0], whole(model, now[b])[-1])
    left = join_rows(model, [take_row(bigger, b, len(now[b])) for b in range(2)])
    logits = feed(model, left, torch.full((2, 3), 7))
    for b in range(2):
        torch.testing.assert_close(logits[b], whole(model, torch.cat([now[b], torch.full((3,), 7)]))[-3:])


def test_which_models_need_snapshots():
    assert not needs_snapshot(part_model("{type: attention, n_heads: 4}"))
    assert not needs_snapshot(part_model(MIXER_CASES["cmd_mla"][0]))
    assert needs_snapshot(part_model("{type: attention, n_heads: 4, window: 5}"))
    assert needs_snapshot(part_model(MIXER_CASES["mamba2"][0]))


def test_views_and_lengths_of_other_states_are_refused():
    model = part_model("{type: attention, n_heads: 4}")
    state = model.init_state(2)
    with pytest.raises(ValueError, match="static state"):
        state.first_rows(1)
    feed(model, state, torch.zeros(2, 3, dtype=torch.int64))
    state.make_static(8)
    with pytest.raises(ValueError, match="from 1 to 2"):
        state.first_rows(3)
    with pytest.raises(ValueError, match="below capacity=8"):
        state.set_lengths([8, 1])
    with pytest.raises(ValueError, match="at least 1 and"):
        state.set_lengths([1, 0])
