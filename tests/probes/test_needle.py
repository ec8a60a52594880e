"""Retrieval of planted sentences: texts, scores of known models, finetuning."""

import itertools

import numpy as np
import pytest
import torch

from fusedlm.config.train import AdamWConfig
from fusedlm.data.tokenizer import ByteTokenizer
from fusedlm.model import build_model
from fusedlm.model.output import Output
from fusedlm.probes import finetune, probe_needle
from fusedlm.probes.needle import _finetuning_batches, training_texts
from fusedlm.probes.planting import KEYS, VALUES, Fact, Needle, plant
from fusedlm.probes.training import NOT_SCORED
from fusedlm.testing import every_mixer_config


class Copies(torch.nn.Module):
    """Predicts what followed the longest earlier match of the last tokens, as induction heads do."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, tokens, *, documents=None, state=None, select=None, targets=None):
        batch, length = tokens.shape
        predicted = np.zeros((batch, length), dtype=int)
        for row, out in zip(tokens.numpy(), predicted, strict=True):
            matched = np.zeros(length, dtype=int)  # length of the common suffix of the prefix so far and each before it
            for i in range(length):
                longer = np.zeros(length, dtype=int)
                same = np.flatnonzero(row[:i] == row[i])
                longer[same] = 1 + np.where(same > 0, matched[same - 1], 0)
                matched = longer
                if len(same):
                    out[i] = row[matched.argmax() + 1]
        logits = 8.0 * torch.nn.functional.one_hot(torch.from_numpy(predicted), self.vocab_size)
        return Output(logits if select is None else logits.flatten(0, 1)[select], None, {}, {})


def test_facts_differ_and_the_sentence_is_question_answer_and_end(tokenizer):
    generator = np.random.default_rng(0)
    for _ in range(50):
        one, other = Fact.draw(generator, 2)
        assert one.key != other.key and one.value != other.value and one.key in KEYS and one.value in VALUES
        needle = Needle.of(one, tokenizer)
        assert tokenizer.decode(needle.sentence) == f" The code of {one.key} is {one.value}."
        assert tokenizer.decode(needle.answer) == f" {one.value}"
        assert len(needle.sentence) <= Needle.longest(tokenizer)


def test_a_tokenizer_that_changes_the_sentence_is_refused():
    class Letters(ByteTokenizer):
        def encode(self, text):
            return super().encode("".join("?" if letter in "xz" else letter for letter in text))

    fact = Fact("Oslo", "amber")
    assert Needle.of(fact, Letters()).answer == Needle.of(fact, ByteTokenizer()).answer
    with pytest.raises(ValueError, match="changes the sentence to recall at byte 1: ' zinc' becomes ' .inc'"):
        Needle.of(Fact("Oslo", "zinc"), Letters())


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("length", [70, 128, 301])
def test_a_planted_text_has_the_length_and_depth_requested(tokenizer, depth, length):
    there, asked = (Needle.of(Fact(KEYS[i], VALUES[i]), tokenizer) for i in (3, 8))
    text = np.arange(1000, 2000)  # ids of no needle
    tokens, scored = plant(text, [(depth, there)], [asked], length=length, eot_id=9999)
    assert tokens.shape == scored.shape == (length,)
    assert tokens[0] == 9999 and tokens[scored].tolist() == asked.answer and scored[-1]
    assert tokens[-len(asked.question + asked.answer) :].tolist() == asked.question + asked.answer
    haystack = tokens[tokens >= 1000][1:]
    assert haystack.tolist() == list(range(1000, 1000 + len(haystack)))
    start = 1 + round(depth * len(haystack))
    assert tokens[start : start + len(there.sentence)].tolist() == there.sentence
    assert length == 1 + len(haystack) + len(there.sentence + asked.question + asked.answer)


def test_several_facts_are_planted_by_depth_and_asked_in_the_order_given(tokenizer):
    one, two = (Needle.of(fact, tokenizer) for fact in (Fact("Ararat", "amber"), Fact("Bergen", "badger")))
    text = np.full(300, tokenizer.encode("~")[0])
    tokens, scored = plant(text, [(0.9, one), (0.1, two)], [one, two], length=200, eot_id=tokenizer.eot_id)
    decoded = tokenizer.decode(tokens.tolist())
    positions = [
        decoded.find(part)
        for part in ("Bergen is badger.", "Ararat is amber.", "Ararat is amber. The code of Bergen is badger")
    ]
    assert positions == sorted(positions) and positions[0] > 0 and decoded.endswith("badger")
    assert tokenizer.decode(tokens[scored].tolist()) == " amber badger"


def test_lengths_without_room_and_short_texts_are_refused(tokenizer):
    needle = Needle.of(Fact("Ararat", "amber"), tokenizer)
    with pytest.raises(ValueError, match="length 12 does not hold"):
        plant(np.zeros(100, int), [(0, needle)], [needle], length=12, eot_id=0)
    with pytest.raises(ValueError, match="there are 10"):
        plant(np.zeros(10, int), [(0, needle)], [needle], length=500, eot_id=0)


def test_a_model_that_copies_finds_every_needle(tokenizer, documents, cpu):
    model = Copies(tokenizer.vocab_size)
    settings = {"trained_length": 160, "lengths": (0.5, 1, 1e4), "depths": (0, 0.5, 1), "samples": 3}
    result = probe_needle(model, documents, tokenizer, **settings, **cpu)
    assert [(cell["length"], cell["depth"]) for cell in result["cells"]] == [
        (n, d) for n in (80, 160) for d in (0, 0.5, 1)
    ]
    assert all(cell["accuracy"] == 1 for cell in result["cells"])
    assert all(cell["gain"] > 2 for cell in result["cells"])  # after the control sentence another word is copied
    assert result["left_out"] == [1_600_000]


def test_a_model_without_memory_gains_nothing(tokenizer, documents, cpu):
    torch.manual_seed(0)
    model = build_model(every_mixer_config(), vocab_size=tokenizer.vocab_size).eval()  # blocks start as the identity
    result = probe_needle(model, documents, tokenizer, trained_length=80, lengths=(1, 2), samples=3, **cpu)
    assert len(result["cells"]) == 2 * 5
    assert all(cell["accuracy"] == 0 and abs(cell["gain"]) < 1e-5 for cell in result["cells"])


def test_finetuning_batches_have_their_length_and_score_answers_alone(tokenizer):
    texts = itertools.repeat(np.full(20, tokenizer.encode("~")[0]))
    batches = _finetuning_batches(texts, tokenizer, 256, 1024, np.random.default_rng(0))
    lengths, facts = set(), set()
    for _ in range(12):
        tokens, targets = next(batches)
        lengths.add(tokens.shape[1] + 1)
        assert tokens.shape == targets.shape and len(tokens) == 1024 // (tokens.shape[1] + 1)
        for row, wanted in zip(tokens, targets, strict=True):
            answers = tokenizer.decode(wanted[wanted != NOT_SCORED].tolist())
            decoded = tokenizer.decode(row.tolist())
            asked = answers.split()
            assert all(f" is {answer}." in decoded for answer in asked)
            facts.add(len(asked))
    assert {256, 128} <= lengths and max(lengths) == 256
    assert 1 in facts and max(facts) > 1


def test_finetuning_lowers_the_loss_of_a_copy(tokenizer, cpu):
    torch.manual_seed(0)
    model = build_model(every_mixer_config(), vocab_size=tokenizer.vocab_size)
    before = [parameter.clone() for parameter in model.parameters()]
    texts = itertools.repeat(np.full(90, tokenizer.encode("~")[0]))
    finetuned, losses = finetune(
        model,
        texts,
        tokenizer,
        trained_length=90,
        steps=25,
        batch_tokens=720,
        optimizer=AdamWConfig(lr=1e-2),
        **cpu,
    )
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])  # it learns at least which words are answers
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, finetuned.parameters(), strict=True))
    assert not finetuned.training


def test_finetuning_needs_room_for_a_needle(tokenizer, cpu):
    model = build_model(every_mixer_config(), vocab_size=tokenizer.vocab_size)
    with pytest.raises(ValueError, match="training length of 16 tokens"):
        finetune(
            model, iter([]), tokenizer, trained_length=16, steps=1, batch_tokens=64, optimizer=AdamWConfig(), **cpu
        )


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"lengths": ()}, "lengths="),
        ({"lengths": (0,)}, "lengths="),
        ({"lengths": (float("inf"),)}, "lengths="),
        ({"depths": ()}, "depths="),
        ({"depths": (1.5,)}, "1.5"),
        ({"samples": 0}, "samples=0"),
        ({"seed": -1}, "seed=-1"),
        ({"lengths": (1e5,)}, "longest document"),
        ({"lengths": (0.1,)}, "does not hold a needle"),
    ],
)
def test_values_out_of_range_are_named(setting, named, tokenizer, documents, cpu):
    with pytest.raises(ValueError, match=named):
        probe_needle(Copies(tokenizer.vocab_size), documents, tokenizer, trained_length=100, **setting, **cpu)


def test_training_texts_have_no_end_of_text(tokenizer, tmp_path):
    from fusedlm.data.shards import Shard, TokenShards

    tokens = np.concatenate([[tokenizer.eot_id], np.full(30, 7), [tokenizer.eot_id], np.full(40, 8)])
    shards = TokenShards([Shard(tokens, np.array([0, 31, 72]), np.array([30, 40]))])
    texts = training_texts(shards, seq_len=20, eot_id=tokenizer.eot_id, seed=0)
    for _ in range(10):
        assert set(next(texts).tolist()) <= {7, 8}
    texts.close()
