"""Retrieval of a sentence planted in text, by length of the text and depth of the sentence."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from fusedlm.config.train import OptimizerConfig
from fusedlm.data import Loader
from fusedlm.data.meter import ReportProgress, silent
from fusedlm.data.shards import TokenShards
from fusedlm.model import Decoder
from fusedlm.model.precision import autocast
from fusedlm.probes.excerpts import excerpts
from fusedlm.probes.planting import Fact, Needle, plant
from fusedlm.probes.training import BATCH_TOKENS, NOT_SCORED, fit

LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)  # in training lengths
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_FINETUNING, _TEST = 0, 1  # random streams
_MOST_FACTS = 8  # per sequence while finetuning
_MOST_TOKENS = 2**40  # of a sequence
_MOST_SAMPLES = 2**16  # held in memory


def probe_needle(
    model,
    documents: Iterable[tuple[np.ndarray, int]],
    tokenizer,
    *,
    trained_length: int,
    lengths: Sequence[float] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = 16,
    seed: int = 0,
    device: torch.device,
    dtype: torch.dtype,
    progress: ReportProgress = silent,
) -> dict:
    """Ask for a word of a sentence that was planted in a text.

    Every sequence is exactly as long as stated: end-of-text, text of one document with the sentence in it, the question
    and the answer. All depths have the same texts and facts.

    Args:
        model: a decoder on `device`, in eval mode.
        documents: pairs of tokens (1 + n,), end-of-text first, and bytes.
        lengths: in training lengths.
        depths: fraction of the text before the sentence, from 0 to 1.
        samples: sequences per length and depth.

    Returns:
        JSON-able: `cells`, a list of `{length, depth, accuracy, gain}` with length in tokens. accuracy: fraction of
        sequences whose answer greedy decoding gives; gain: log-likelihood of the answer, in nats per token, less that
        after the same text with a sentence of another key and value. `left_out`: lengths for which no document is long
        enough.

    Raises:
        ValueError: a value is out of range, no length can be tested, or the likelihood is not finite.
    """
    _check(lengths, depths, samples, seed, trained_length)
    wanted = sorted({round(multiple * trained_length) for multiple in lengths})
    found, longest = excerpts(documents, [(length, length) for length in wanted], samples)
    found = {length: texts for (length, _), texts in found.items() if texts}
    if not found:
        raise ValueError(
            f"the longest document has {longest} tokens, fewer than the shortest length to test, {wanted[0]}; "
            "give a longer text or smaller lengths"
        )
    cells = []
    for length in found:
        generator = np.random.default_rng([seed, _TEST, length])
        texts = [found[length][i % len(found[length])].tokens for i in range(samples)]
        asked, others = zip(*(Fact.draw(generator, 2) for _ in range(samples)), strict=True)
        asked, others = ([Needle.of(fact, tokenizer) for fact in facts] for facts in (asked, others))
        for depth in depths:
            nll, right = _answers(model, _rows(texts, asked, asked, depth, length, tokenizer), device, dtype)
            control, _ = _answers(model, _rows(texts, others, asked, depth, length, tokenizer), device, dtype)
            cells.append({"length": length, "depth": depth, "accuracy": right, "gain": control - nll})
            progress("scoring", len(cells), len(found) * len(depths))
    return {
        "trained_length": trained_length,
        "cells": cells,
        "left_out": [length for length in wanted if length not in found],
        "samples": samples,
        "seed": seed,
    }


def finetune(
    model: Decoder,
    texts: Iterator[np.ndarray],
    tokenizer,
    *,
    trained_length: int,
    steps: int,
    batch_tokens: int,
    optimizer: OptimizerConfig,
    seed: int = 0,
    device: torch.device,
    dtype: torch.dtype,
    progress: ReportProgress = silent,
) -> tuple[Decoder, list[float]]:
    """Finetune a copy of a model on retrieval: texts of the training length, half of it, a quarter and so on while a
    fact fits, with one to eight facts in each and a question about each at the end. Only answers are scored.

    Args:
        texts: arrays of text tokens without end-of-text, of any length (short ones are repeated).
        batch_tokens: tokens per step.

    Returns:
        The copy, in eval mode, and the loss of each step in nats per token of the answers.

    Raises:
        ValueError: the training length does not hold a sentence and a question, or training diverges.
    """
    model = copy.deepcopy(model)
    batches = _finetuning_batches(
        texts, tokenizer, trained_length, batch_tokens, np.random.default_rng([seed, _FINETUNING])
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # for dropout
        losses = fit(
            model,
            batches,
            steps=steps,
            optimizer=optimizer,
            device=device,
            dtype=dtype,
            progress=progress,
            stage="finetuning",
        )
    return model, losses


def training_texts(shards: TokenShards, *, seq_len: int, eot_id: int, seed: int) -> Iterator[np.ndarray]:
    """Yields windows of the training text in the loader's order, without end-of-text tokens, for `finetune`."""
    with Loader(shards, seq_len=seq_len, batch_size=8, seed=seed, document_mask=False) as loader:
        for batch in loader:
            for row in batch.tokens.numpy():
                text = row[row != eot_id]
                if len(text):
                    yield text


def _check(lengths, depths, samples, seed, trained_length) -> None:
    if not lengths or not all(math.isfinite(length) and length > 0 for length in lengths):
        raise ValueError(f"lengths={list(lengths)} must be finite multiples of the training length, greater than 0")
    for length in lengths:
        if not 0.5 < length * trained_length <= _MOST_TOKENS:
            raise ValueError(
                f"lengths={length:g}: {length * trained_length:g} tokens are not a length from 1 to {_MOST_TOKENS:,}; "
                f"the training length is {trained_length}"
            )
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths={list(depths)} must be from 0 (start of the text) to 1 (its end)")
    if not 1 <= samples <= _MOST_SAMPLES:
        raise ValueError(f"samples={samples} must be from 1 to {_MOST_SAMPLES:,}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be from 0 to 2**63 - 1")


def _rows(texts, planted, asked, depth: float, length: int, tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        plant(text, [(depth, there)], [wanted], length=length, eot_id=tokenizer.eot_id)
        for text, there, wanted in zip(texts, planted, asked, strict=True)
    ]


@torch.no_grad()
def _answers(model, rows, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Mean nats per token of the answers, and the fraction of rows in which every token of the answer is the most
    likely one: greedy decoding, which would read the same tokens, then gives the answer."""
    size = max(1, BATCH_TOKENS[device.type] // len(rows[0][0]))
    nats, right = [], 0
    for first in range(0, len(rows), size):
        tokens, scored = (np.stack(part) for part in zip(*rows[first : first + size], strict=True))
        row, column = np.nonzero(scored)
        tokens = torch.from_numpy(tokens).to(device)
        asked = torch.from_numpy(row * (tokens.shape[1] - 1) + column - 1).to(device)
        with autocast(device, dtype):
            logits = model(tokens[:, :-1], select=asked).logits.float()
        answers = tokens[row, column]
        nats += F.cross_entropy(logits, answers, reduction="none").tolist()
        wrong = row[(logits.argmax(-1) != answers).cpu().numpy()]
        right += len(tokens) - len(set(wrong.tolist()))
    mean = math.fsum(nats) / len(nats)
    if not math.isfinite(mean):
        raise ValueError("the likelihood is not finite; the weights are damaged or diverged, or values overflow")
    return mean, right / len(rows)


def _finetuning_batches(
    texts: Iterator[np.ndarray], tokenizer, trained_length: int, batch_tokens: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    least = 2 * Needle.longest(tokenizer) + 2  # end-of-text, a sentence and its question
    if trained_length < least:
        raise ValueError(
            f"the training length of {trained_length} tokens does not hold a needle and its question, which have "
            f"{least}; train on longer sequences"
        )
    lengths = [trained_length]
    while lengths[-1] // 2 >= least:
        lengths.append(lengths[-1] // 2)
    while True:
        length = int(generator.choice(lengths))
        n_facts = int(generator.integers(1, min(_MOST_FACTS, length // least) + 1))
        tokens, scored = [], []
        for _ in range(max(1, batch_tokens // length)):
            needles = [Needle.of(fact, tokenizer) for fact in Fact.draw(generator, n_facts)]
            depths = generator.random(n_facts).tolist()
            asked = [needles[i] for i in generator.permutation(n_facts)]
            text = np.resize(next(texts), length)
            row = plant(text, list(zip(depths, needles, strict=True)), asked, length=length, eot_id=tokenizer.eot_id)
            tokens.append(row[0])
            scored.append(row[1])
        tokens, scored = np.stack(tokens), np.stack(scored)
        yield tokens[:, :-1].copy(), np.where(scored, tokens, NOT_SCORED)[:, 1:].copy()
