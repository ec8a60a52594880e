"""Multi-query associative recall (Zoology, arXiv 2312.04927): can an architecture learn to look up values by key?

A sequence has pairs of a key and a value, and then queries every key once. The model is trained from scratch: the probe
measures an architecture and its budget, not the weights of a run.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from fusedlm.config.model import ModelConfig
from fusedlm.config.train import AdamWConfig
from fusedlm.data.meter import ReportProgress, silent
from fusedlm.model import Decoder, build_model
from fusedlm.model.accounting import count_parameters
from fusedlm.model.precision import autocast
from fusedlm.probes.training import BATCH_TOKENS, NOT_SCORED, fit

_TRAINING, _TEST = 0, 1  # random streams


@dataclass(frozen=True)
class Recall:
    """The task. Keys are tokens 0 to n_keys - 1, values the n_values tokens after them. A sequence of n pairs has the
    key and value of each pair, then all n keys in random order: 3n tokens. Its keys differ; its values may repeat.

    Raises:
        ValueError: a number is out of range, or there are more pairs than keys.
    """

    pairs: tuple[int, ...] = (4, 8, 16, 32)
    n_keys: int = 64
    n_values: int = 64

    def __post_init__(self):
        if not self.pairs or min(self.pairs) < 1 or len(set(self.pairs)) != len(self.pairs):
            raise ValueError(f"pairs={list(self.pairs)} must be different numbers of at least 1")
        if self.n_values < 2:
            raise ValueError(f"n_values={self.n_values} must be at least 2; one value can always be guessed")
        if max(self.pairs) > self.n_keys:
            raise ValueError(f"pairs={max(self.pairs)} must be at most n_keys={self.n_keys}: keys of a sequence differ")

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
    setup: Callable[[Decoder], object] | None = None,
    device: torch.device,
    dtype: torch.dtype,
    progress: ReportProgress = silent,
) -> dict:
    """Train a new model on the task, with one of its numbers of pairs per batch, and test it on each number.

    Args:
        config: the architecture; the task sets the vocabulary.
        task: None: `Recall()`.
        steps, batch_tokens, lr: of AdamW without weight decay, with warm-up and cosine decay.
        samples: test sequences per number of pairs, from a random stream of their own.
        seed: of initial weights, training and test sequences.
        setup: called with the new model before it is trained, for instance to set backends.

    Returns:
        JSON-able: `accuracy` is a list of `{pairs, accuracy, guess}`, where `guess` is the accuracy of guessing among
        the values of the sequence; `loss` is the mean over the last tenth of the steps.

    Raises:
        ValueError: a value is out of range, or training diverges.
    """
    task = task or Recall()
    for name, value in (("steps", steps), ("batch_tokens", batch_tokens), ("samples", samples)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} must be from 0 to 2**63 - 1")
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr={lr} must be a finite number above 0")
    optimizer = AdamWConfig(lr=lr, weight_decay=0.0)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model = build_model(config, vocab_size=task.vocab_size, device=device, seed=seed)
        if setup is not None:
            setup(model)
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
    """Fraction of queries whose most likely token is the right value."""
    n_right = 0
    rows = max(1, BATCH_TOKENS[device.type] // (3 * pairs))
    for start in range(0, samples, rows):
        tokens, targets = task.batch(pairs, min(rows, samples - start), generator)
        with torch.no_grad(), autocast(device, dtype):
            logits = model(torch.from_numpy(tokens).to(device)).logits
        n_right += int((logits.argmax(-1).cpu().numpy() == targets).sum())  # no token is -100
    return n_right / (samples * pairs)


def _training_batches(task: Recall, batch_tokens: int, generator: np.random.Generator) -> Iterator:
    while True:
        pairs = int(generator.choice(task.pairs))
        yield task.batch(pairs, max(1, batch_tokens // (3 * pairs)), generator)


def _guess(pairs: int, n_values: int) -> float:
    """Expected accuracy of a random value of the sequence: that of the right pair, or an equal one by chance."""
    return 1 / pairs + (1 - 1 / pairs) / n_values
