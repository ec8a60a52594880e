"""Multi-query associative recall (Zoology, arXiv 2312.04927): can an architecture learn to look up what it has read?

A sequence shows pairs of a key and a value and later asks for the keys, each once. The model is trained from scratch,
so the probe measures an architecture and its budget rather than a run's weights.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from fusedlm.config.model import ModelConfig
from fusedlm.config.train import AdamWConfig
from fusedlm.model import Decoder, build_model
from fusedlm.model.accounting import count_parameters
from fusedlm.model.precision import autocast
from fusedlm.probes.training import BATCH_TOKENS, NOT_SCORED, Progress, fit, silent

_TRAINING, _TEST = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Recall:
    """The task: keys are tokens 0 to n_keys - 1, values the n_values after them. A sequence of n pairs is key and value
    of each in turn and then all n keys once more, in random order: 3n tokens. The keys of a sequence differ, its values
    may repeat.

    Raises:
        ValueError: the pairs do not fit the keys.
    """

    pairs: tuple[int, ...] = (4, 8, 16, 32)
    n_keys: int = 64
    n_values: int = 64

    def __post_init__(self):
        if not self.pairs or min(self.pairs) < 1 or len(set(self.pairs)) != len(self.pairs):
            raise ValueError(f"pairs={list(self.pairs)} must be different numbers of at least 1")
        if self.n_values < 2:
            raise ValueError(f"n_values={self.n_values} leaves nothing to tell apart; give at least 2")
        if max(self.pairs) > self.n_keys:
            raise ValueError(f"pairs={max(self.pairs)} need as many keys, more than n_keys={self.n_keys}")

    @property
    def vocab_size(self) -> int:
        return self.n_keys + self.n_values

    def batch(self, pairs: int, rows: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets (rows, 3 * pairs) int64; the target of a queried key is its value, the others are -100."""
        keys = generator.random((rows, self.n_keys)).argsort(1)[:, :pairs]
        values = self.n_keys + generator.integers(0, self.n_values, keys.shape)
        order = generator.random(keys.shape).argsort(1)
        shown = np.stack([keys, values], axis=2).reshape(rows, 2 * pairs)
        tokens = np.concatenate([shown, np.take_along_axis(keys, order, 1)], axis=1)
        targets = np.full_like(tokens, NOT_SCORED)
        targets[:, 2 * pairs :] = np.take_along_axis(values, order, 1)
        return tokens, targets


def probe_mqar(
    config: ModelConfig,
    task: Recall | None = None,
    *,
    steps: int = 1000,
    batch_tokens: int = 3072,
    lr: float = 3e-3,
    samples: int = 256,
    seed: int = 0,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> dict:
    """Train a fresh model on the task, each sequence with one of its numbers of pairs, and test it on each number.

    Args:
        config: the architecture; its vocabulary is that of the task.
        task: None: the default one.
        steps, batch_tokens, lr: AdamW without decay, a warm-up and half a cosine.
        samples: test sequences for each number of pairs, unlike any stream that training draws from.
        seed: of the initial weights, the training and the test sequences.

    Returns:
        JSON-able: `accuracy` is a list of `{pairs, accuracy, guess}`, guess being what a model reaches that knows which
        values were shown and not which key they belong to; `loss` is the mean over the last tenth of the steps.

    Raises:
        ValueError: a setting is out of range, or training diverges.
    """
    task = task or Recall()
    for name, value in (("steps", steps), ("batch_tokens", batch_tokens), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr={lr} must be a finite number above 0")
    optimizer = AdamWConfig(lr=lr, weight_decay=0.0)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model = build_model(config, vocab_size=task.vocab_size, device=device, dtype=dtype)
        batches = _training_batches(task, batch_tokens, np.random.default_rng([seed, _TRAINING]))
        losses = fit(model, batches, steps=steps, optimizer=optimizer, device=device, dtype=dtype, progress=progress)
    accuracy = []
    for done, pairs in enumerate(task.pairs):
        generator = np.random.default_rng([seed, _TEST, pairs])
        accuracy.append(
            {
                "pairs": pairs,
                "accuracy": recall_accuracy(model, task, pairs, samples, generator, device, dtype),
                "guess": _guess(pairs, task.n_values),
            }
        )
        progress("testing", done + 1, len(task.pairs))
    last = losses[-max(1, steps // 10) :]
    return {
        "accuracy": accuracy,
        "loss": sum(last) / len(last),
        "parameters": count_parameters(model).total,
        "task": asdict(task) | {"pairs": list(task.pairs)},
        "training": {"steps": steps, "batch_tokens": batch_tokens, "lr": lr},
        "samples": samples,
        "seed": seed,
    }


def recall_accuracy(
    model: Decoder,
    task: Recall,
    pairs: int,
    samples: int,
    generator: np.random.Generator,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """The share of queries that the likeliest token answers."""
    right = 0
    rows = max(1, BATCH_TOKENS[device.type] // (3 * pairs))
    for start in range(0, samples, rows):
        tokens, targets = task.batch(pairs, min(rows, samples - start), generator)
        with torch.no_grad(), autocast(device, dtype):
            logits = model(torch.from_numpy(tokens).to(device))
        right += int((logits.argmax(-1).cpu().numpy() == targets).sum())  # no token is -100
    return right / (samples * pairs)


def _training_batches(task: Recall, batch_tokens: int, generator: np.random.Generator) -> Iterator:
    while True:
        pairs = int(generator.choice(task.pairs))
        yield task.batch(pairs, max(1, batch_tokens // (3 * pairs)), generator)


def _guess(pairs: int, n_values: int) -> float:
    """Expected accuracy of one of the values shown, taken at random: it is the right pair's, or equal by chance."""
    return 1 / pairs + (1 - 1 / pairs) / n_values
