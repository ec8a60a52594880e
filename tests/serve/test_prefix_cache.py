"""The prefix cache: used, exact, within its bytes, and empty when the weights change."""

import pytest
import torch

from fusedlm.serve.prefix_cache import PrefixCache
from fusedlm.testing import MIXER_CASES, wired_config
from tests.serve.engines import TOKENIZER, assert_nothing_is_left, make_engine, make_model, make_sequence, run

SYSTEM = "A long beginning that all prompts share, of more than one chunk. "
MIXERS = [cases[0] for cases in MIXER_CASES.values()] + ["{type: attention, n_heads: 2, window: 5}"]


@pytest.mark.parametrize("mixer", MIXERS)
def test_shared_beginnings_are_read_once_and_give_the_same_text(mixer):
    model = make_model(mixer)
    prompts = [SYSTEM + end for end in ("What is it?", "Who is it?", "What is it now?", "")]
    cold, warm = make_engine(model), make_engine(model, cache_bytes=10**8)
    for prompt in [*prompts, *prompts]:
        sequences = [make_sequence(prompt, max_tokens=10) for _ in range(2)]
        (expected,), (found,) = run(cold, sequences[:1]), run(warm, sequences[1:])
        assert found.text == expected.text
    n_shared = len(SYSTEM) // 8 * 8
    assert sequences[1].cached_tokens >= n_shared - 8
    read = [engine.metrics.prompt_tokens for engine in (cold, warm)]
    assert read[1] < 0.45 * read[0] and warm.metrics.cached_tokens == read[0] - read[1]
    assert warm.cache.hits >= 6


def test_a_prompt_leaves_a_snapshot_where_it_parts_from_what_is_known():
    model = make_model()  # with recurrent states, which cannot be cut
    engine = make_engine(model, cache_bytes=10**8, chunk=256)
    ends = ["x" * 30, "y" * 30, "z" * 30]
    sequences = [make_sequence(SYSTEM + end, max_tokens=1) for end in ends]
    for sequence in sequences:
        run(engine, [sequence])
    parted = (1 + len(SYSTEM)) // 8 * 8
    assert [sequence.cached_tokens for sequence in sequences] == [0, 0, parted]


def test_the_next_turn_continues_after_what_was_generated():
    for mixer in (MIXERS[0], "{type: gdn, n_heads: 2, chunk_size: 8}"):
        model = make_model(mixer)
        engine = make_engine(model, cache_bytes=10**8)
        first = make_sequence("x" * 20, max_tokens=40, ignore_eot=True)
        run(engine, [first])
        ids = [*first.ids, *first.generated, *b" and then"]
        second, alone = (make_sequence(ids, max_tokens=9) for _ in range(2))
        assert run(engine, [second])[0].text == run(make_engine(model), [alone])[0].text
        assert second.cached_tokens == (len(first.ids) + 39) // 8 * 8


def test_prompts_that_are_scored_are_read_in_full(hybrid):
    from fusedlm.serve import Choosing

    engine = make_engine(hybrid, cache_bytes=10**8)
    for _ in range(2):
        sequence = make_sequence(SYSTEM, Choosing(temperature=0, logprobs=0), score_prompt=True)
        run(engine, [sequence])
        assert len(sequence.prompt_scores) == len(SYSTEM) and sequence.cached_tokens == 0


def test_the_oldest_blocks_go_first_and_bytes_are_counted():
    cache = PrefixCache(max_bytes=6 * 32, block_size=2, snapshots=False)
    tokens = torch.arange(100.0, dtype=torch.float64).view(50, 2)

    def insert(ids):
        cache.insert(ids, lambda first, last: [tokens[first:last]], None)

    insert([1, 2, 3, 4, 5, 6])
    insert([1, 2, 7, 8])
    assert len(cache) == 4 and cache.nbytes == 4 * 32  # the first block is shared
    assert cache.find([1, 2, 3, 4, 9, 9], 6).row.length == 4
    insert([1, 2, 3, 4, 9, 9])
    insert([8, 8, 8, 8])  # one block too many: [7, 8] and [5, 6] are the oldest, [5, 6] older
    assert cache.nbytes == 6 * 32 and cache.evicted == 1
    assert cache.find([1, 2, 3, 4, 5, 6], 6).row.length == 4
    assert torch.equal(cache.find([1, 2, 7, 8], 4).row.tokens[0], tokens[:4])
    assert cache.find([1, 2, 7, 8], 3).row.length == 2
    assert cache.find([2, 1], 2).row is None
    insert(list(range(100, 120)))  # larger than all there is room for
    assert cache.nbytes <= 6 * 32
    assert cache.nbytes == sum(block.nbytes() for block in cache._blocks) == 32 * len(cache)
    with pytest.raises(ValueError, match="not a multiple of block_size=2"):
        insert([1])


def test_only_a_snapshot_can_be_continued():
    cache = PrefixCache(10**6, 2, snapshots=True)
    take = lambda first, last: [torch.zeros(last - first, 1)]  # noqa: E731
    cache.insert([1, 2, 3, 4], take, None)
    assert cache.find([1, 2, 3, 4], 4).row is None and cache.find([1, 2, 3, 4], 4).n_known == 4
    cache.insert([1, 2], take, [(torch.ones(1),)])
    found = cache.find([1, 2, 3, 4], 4)
    assert found.row.length == 2 and found.n_known == 4 and found.row.snapshot[0][0] == 1
    assert cache.n_snapshots == 1 and cache.nbytes == 4 * 4 + 4


def test_blocks_do_not_keep_the_memory_of_others():
    cache = PrefixCache(max_bytes=10**6, block_size=2, snapshots=False)
    cache.insert(list(range(10)), lambda first, last: [torch.zeros(last - first, 3)], None)
    assert all(x.untyped_storage().nbytes() == x.nbytes for block in cache._blocks for x in block.tokens)


def test_nothing_of_other_weights_is_found():
    version = [1]
    cache = PrefixCache(10**6, 2, False, lambda: version[0])
    cache.insert([1, 2], lambda first, last: [torch.zeros(2, 1)], None)
    assert cache.find([1, 2, 3], 2).row is not None
    version[0] = 2
    assert cache.find([1, 2, 3], 2).row is None and len(cache) == 0 and cache.nbytes == 0


def test_a_wired_model_with_bigram_and_smear_continues_exactly():
    from fusedlm.model import build_model
    from fusedlm.testing import randomise_

    model = randomise_(build_model(wired_config(), vocab_size=TOKENIZER.vocab_size)).eval()
    engine = make_engine(model, cache_bytes=10**8)
    for prompt in (SYSTEM + "a", SYSTEM + "b", SYSTEM + "a"):
        found = run(engine, [make_sequence(prompt)])[0].text
        assert found == run(make_engine(model), [make_sequence(prompt)])[0].text
    assert engine.cache.hits == 2
    assert_nothing_is_left(engine)
