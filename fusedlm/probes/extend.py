"""Bits per byte by position, up to several times the training length, without and with YaRN (arXiv 2309.00071)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fusedlm.evaluate import stream_nll
from fusedlm.model.yarn import stretch_context
from fusedlm.probes.stretches import Stretch, stretches
from fusedlm.probes.training import BATCH_TOKENS, Progress, silent

REACHES = (8, 4, 2, 1)  # multiples of the training length
BUCKETS = 4  # in a training length
FAR = 4  # training lengths
_WINDOWS = 16  # that begin in one stretch of text, one training length apart


def probe_extend(
    model,
    documents: Iterable[tuple[np.ndarray, int]],
    tokenizer,
    *,
    trained_length: int,
    factors: Sequence[float] = (2.0, 4.0, 8.0),
    samples: int = 32,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = silent,
) -> dict:
    """Score windows of documents through the model's state and sum bits and bytes by position.

    Every window is eight training lengths long, or as many as some document holds, and is read after end-of-text as a
    document is. Windows of one stretch of text begin a training length apart: nearly all of the text is so scored at
    every position, and what differs from position to position is not the text. A bucket's bytes are what its tokens
    add to the decoded text.

    Args:
        model: a decoder on `device`, in eval mode; its own YaRN is what the first curve has, and is put back.
        documents: pairs of tokens (1 + n,), end-of-text first, and bytes of text.
        trained_length: tokens of a training sequence.
        factors: of YaRN, a curve each, beside that of the model as it is. A model without rotary embedding has that
            curve alone.
        samples: most windows.

    Returns:
        JSON-able: `ends` (tokens up to the end of each bucket, a quarter of the training length), `bytes` (scored in
        each bucket), and `curves`, a list of `{yarn, bpb, at_1x, at_4x, difference, standard_error, no_worse}`: yarn
        the factor or null, bpb one a bucket. The others compare the last buckets within one and within four training
        lengths, on the text that was scored in both (null where there is none): bits per byte in each, the second less
        the first, its standard error over pieces of text, and whether it is at most 0.

    Raises:
        ValueError: a value is out of range, no document holds a training length, or the likelihood is not finite.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    windows, reach = _windows(documents, tokenizer, trained_length, samples)
    n_bytes = np.stack([window.n_bytes for window in windows])
    if (n_bytes.sum(0) <= 0).any():
        raise ValueError("the tokens of a bucket stand for no bytes; there is nothing to count bits by")
    ends = _ends(trained_length, reach)
    rope = any(dim for dim, _ in model.rope_specs)
    yarns = [None, *factors] if rope else [None]
    own, curves = model.yarn, []
    try:
        for done, factor in enumerate(yarns):
            if factor is not None:
                stretch_context(model, factor, trained_length)
            nats = []
            for part in _nats(model, windows, ends, tokenizer.eot_id, device, dtype):
                nats.append(part)
                scored = sum(map(len, nats))
                progress("scoring", done * len(windows) + scored, len(yarns) * len(windows))
            bits = np.concatenate(nats) / math.log(2)
            curve = {"yarn": factor, "bpb": (bits.sum(0) / n_bytes.sum(0)).tolist()}
            curves.append(curve | _compare(bits, n_bytes, windows, reach))
    finally:
        model.set_yarn(own)
    return {
        "trained_length": trained_length,
        "reach": reach,
        "rope": rope,
        "windows": len(windows),
        "tokens": len(windows) * reach * trained_length,
        "ends": ends,
        "bytes": n_bytes.sum(0).tolist(),
        "curves": curves,
    }


@dataclass(frozen=True)
class _Window:
    tokens: np.ndarray  # (reach * trained_length,) int64
    n_bytes: np.ndarray  # (buckets,) int64
    stretch: int  # which stretch of text it is of
    number: int  # where it begins in there, in training lengths


def _windows(documents, tokenizer, trained_length: int, samples: int) -> tuple[list[_Window], int]:
    """The windows, and their length in training lengths."""
    sizes = {
        reach: (reach * trained_length, (reach + min(_WINDOWS, samples) - 1) * trained_length) for reach in REACHES
    }
    found, longest = stretches(documents, sizes.values(), -(-samples // _WINDOWS))
    reach = next((reach for reach, size in sizes.items() if found[size]), None)
    if reach is None:
        raise ValueError(
            f"the longest document has {longest} tokens, fewer than the training length {trained_length}; "
            "give a longer text"
        )
    windows = []
    for number, stretch in enumerate(found[sizes[reach]]):
        n_windows = len(stretch.tokens) // trained_length - reach + 1
        n_bytes = _bucket_bytes(tokenizer, stretch, _ends(trained_length, reach + n_windows - 1))
        per_length = len(_ends(trained_length, 1))
        for i in range(n_windows):
            tokens = stretch.tokens[i * trained_length : (i + reach) * trained_length]
            windows.append(_Window(tokens, n_bytes[i * per_length : (i + reach) * per_length], number, i))
    return windows[:samples], reach


def _ends(trained_length: int, reach: int) -> list[int]:
    """Tokens up to the end of each bucket; every training length ends one."""
    inside = sorted({round((i + 1) * trained_length / BUCKETS) for i in range(BUCKETS)} - {0})
    return [length * trained_length + end for length in range(reach) for end in inside]


def _bucket_bytes(tokenizer, stretch: Stretch, ends: list[int]) -> np.ndarray:
    """What each bucket adds to the text: differences of decoded prefixes, which add up whatever the tokenizer."""
    before = stretch.before.tolist()
    tokens = before + stretch.tokens.tolist()
    return np.diff([len(tokenizer.decode_bytes(tokens[: len(before) + end])) for end in [0, *ends]])


def _nats(model, windows: list[_Window], ends: list[int], eot_id: int, device, dtype) -> Iterator[np.ndarray]:
    """(windows, buckets) float64 of a few windows at a time."""
    rows = max(1, BATCH_TOKENS[device.type] // ends[-1])
    for first in range(0, len(windows), rows):
        texts = np.stack([window.tokens for window in windows[first : first + rows]])
        tokens = np.concatenate([np.full((len(texts), 1), eot_id), texts], axis=1)
        nll = torch.cat(list(stream_nll(model, tokens, device=device, dtype=dtype)), dim=1).numpy()
        if not np.isfinite(nll).all():
            raise ValueError(
                "the likelihood is not finite; the weights are damaged or diverged, or precision overflows"
            )
        yield np.add.reduceat(nll, [0, *ends[:-1]], axis=1)


def _compare(bits: np.ndarray, n_bytes: np.ndarray, windows: list[_Window], reach: int) -> dict:
    """Bits per byte near and far, on the same pieces of text: what a window has last within four training lengths, the
    window that begins three later has last within one."""
    row = {(window.stretch, window.number): i for i, window in enumerate(windows)}
    pairs = [(row[s, n + FAR - 1], i) for (s, n), i in row.items() if reach >= FAR and (s, n + FAR - 1) in row]
    nothing = dict.fromkeys(("at_1x", "at_4x", "difference", "standard_error", "no_worse"))
    if not pairs:
        return nothing
    near, far = np.array(pairs).T
    per_length = bits.shape[1] // reach
    sizes = n_bytes[far, FAR * per_length - 1]
    costs = bits[near, per_length - 1], bits[far, FAR * per_length - 1]
    at_1x, at_4x = (float(cost.sum() / sizes.sum()) for cost in costs)
    # Of a ratio of sums: each piece's departure from the mean difference, over the mean number of bytes.
    residuals = (costs[1] - costs[0] - (at_4x - at_1x) * sizes) / sizes.mean()
    error = float(residuals.std(ddof=1) / math.sqrt(len(pairs))) if len(pairs) > 1 else None
    return {
        "at_1x": at_1x,
        "at_4x": at_4x,
        "difference": at_4x - at_1x,
        "standard_error": error,
        "no_worse": at_4x <= at_1x,
    }
