"""Bits per byte by position, up to several times the training length, without and with YaRN (arXiv 2309.00071)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fusedlm.data.meter import ReportProgress, silent
from fusedlm.evaluate import stream_nll
from fusedlm.model.yarn import stretch_context
from fusedlm.probes.excerpts import Excerpt, excerpts
from fusedlm.probes.training import BATCH_TOKENS

MULTIPLES = (8, 4, 2, 1)  # lengths of windows that are tried, in training lengths
BUCKETS = 4  # per training length
FAR = 4  # training lengths
_WINDOWS = 16  # per excerpt, each starting one training length after the one before


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
    progress: ReportProgress = silent,
) -> dict:
    """Score windows of documents through the model's state and sum bits and bytes by position.

    A window is eight training lengths long, or the largest of 4, 2, 1 that some document holds, and follows
    end-of-text as a document does. Windows of one excerpt start one training length apart, so that nearly all of its
    text is scored at every position: positions differ in their context, not in their text. The bytes of a bucket are
    what its tokens add to the decoded text.

    Args:
        model: a decoder on `device`, in eval mode; the first curve is with its own YaRN, which is restored at the end.
        documents: pairs of tokens (1 + n,), end-of-text first, and bytes of text.
        trained_length: tokens of a training sequence.
        factors: of YaRN, one curve each, after that of the model as it is. A model without rotary embedding has only
            the first curve.
        samples: most windows.

    Returns:
        JSON-able: `max_multiple` (length of the windows in training lengths), `ends` (tokens up to the end of each
        bucket, a quarter of the training length), `bytes` (scored in each bucket) and `curves`, a list of `{yarn, bpb,
        at_1x, at_4x, difference, standard_error, change_1x, change_1x_error, change_4x, change_4x_error}`: `yarn` the
        factor or null, `bpb` bits per byte in each bucket. The others are on the text that was scored both in the last
        bucket within one training length and in the last within four: `at_1x` and `at_4x` are bits per byte there,
        `difference` is the second less the first, `change_1x` and `change_4x` are what YaRN adds to the first curve's;
        each with its standard error over pieces of text. They are null if no text was scored in both, changes also in
        the first curve.

    Raises:
        ValueError: a value is out of range, no document holds a training length, or the likelihood is not finite.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    windows, max_multiple = _windows(documents, tokenizer, trained_length, samples)
    n_bytes = np.stack([window.n_bytes for window in windows])
    if (n_bytes.sum(0) <= 0).any():
        raise ValueError("the tokens of a bucket have no bytes; bits per byte are undefined")
    ends = _ends(trained_length, max_multiple)
    rope = any(dim for dim, _ in model.rope_specs)
    yarns = [None, *factors] if rope else [None]
    own, curves, unstretched = model.yarn, [], None
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
            curves.append(curve | _compare(bits, unstretched, n_bytes, windows, max_multiple))
            unstretched = bits if unstretched is None else unstretched
    finally:
        model.set_yarn(own)
    return {
        "trained_length": trained_length,
        "max_multiple": max_multiple,
        "rope": rope,
        "windows": len(windows),
        "tokens": len(windows) * max_multiple * trained_length,
        "ends": ends,
        "bytes": n_bytes.sum(0).tolist(),
        "curves": curves,
    }


def max_multiple_of(result: dict) -> int:
    """Length of the windows of a result of `probe_extend`, in training lengths; older records call it `reach`."""
    return result["max_multiple"] if "max_multiple" in result else result["reach"]


@dataclass(frozen=True)
class _Window:
    tokens: np.ndarray  # (max_multiple * trained_length,) int64
    n_bytes: np.ndarray  # (buckets,) int64
    excerpt: int  # index of the excerpt that it is part of
    number: int  # its start in the excerpt, in training lengths


def _windows(documents, tokenizer, trained_length: int, samples: int) -> tuple[list[_Window], int]:
    """The windows, and their length in training lengths."""
    lengths = {n: (n * trained_length, (n + min(_WINDOWS, samples) - 1) * trained_length) for n in MULTIPLES}
    found, longest = excerpts(documents, lengths.values(), -(-samples // _WINDOWS))
    multiple = next((n for n, length in lengths.items() if found[length]), None)
    if multiple is None:
        raise ValueError(
            f"the longest document has {longest} tokens, fewer than the training length {trained_length}; "
            "give a longer text"
        )
    windows = []
    for index, excerpt in enumerate(found[lengths[multiple]]):
        n_windows = len(excerpt.tokens) // trained_length - multiple + 1
        n_bytes = _bucket_bytes(tokenizer, excerpt, _ends(trained_length, multiple + n_windows - 1))
        per_length = len(_ends(trained_length, 1))
        for i in range(n_windows):
            tokens = excerpt.tokens[i * trained_length : (i + multiple) * trained_length]
            windows.append(_Window(tokens, n_bytes[i * per_length : (i + multiple) * per_length], index, i))
    return windows[:samples], multiple


def _ends(trained_length: int, multiple: int) -> list[int]:
    """Tokens up to the end of each bucket; every training length ends one."""
    inside = sorted({round((i + 1) * trained_length / BUCKETS) for i in range(BUCKETS)} - {0})
    return [length * trained_length + end for length in range(multiple) for end in inside]


def _bucket_bytes(tokenizer, excerpt: Excerpt, ends: list[int]) -> np.ndarray:
    """Bytes that each bucket adds to the text: differences between decoded prefixes, exact for any tokenizer."""
    before = excerpt.before.tolist()
    tokens = before + excerpt.tokens.tolist()
    return np.diff([len(tokenizer.decode_bytes(tokens[: len(before) + end])) for end in [0, *ends]])


def _nats(model, windows: list[_Window], ends: list[int], eot_id: int, device, dtype) -> Iterator[np.ndarray]:
    """Yields (windows, buckets) float64 of a few windows at a time."""
    rows = max(1, BATCH_TOKENS[device.type] // ends[-1])
    for first in range(0, len(windows), rows):
        texts = np.stack([window.tokens for window in windows[first : first + rows]])
        tokens = np.concatenate([np.full((len(texts), 1), eot_id), texts], axis=1)
        nll = torch.cat(list(stream_nll(model, tokens, device=device, dtype=dtype)), dim=1).numpy()
        if not np.isfinite(nll).all():
            raise ValueError("the likelihood is not finite; the weights are damaged or diverged, or values overflow")
        yield np.add.reduceat(nll, [0, *ends[:-1]], axis=1)


def _compare(
    bits: np.ndarray, unstretched: np.ndarray | None, n_bytes: np.ndarray, windows: list[_Window], multiple: int
) -> dict:
    """Bits per byte near and far on the same pieces of text: the last bucket within four training lengths of a window,
    and the last within one of the window that starts three training lengths later.

    Args:
        bits, unstretched: (windows, buckets) with YaRN and without; the second is None for the model as it is.
    """
    row = {(window.excerpt, window.number): i for i, window in enumerate(windows)}
    pairs = [(row[e, n + FAR - 1], i) for (e, n), i in row.items() if multiple >= FAR and (e, n + FAR - 1) in row]
    keys = ("at_1x", "at_4x", "difference", "standard_error")
    changes = ("change_1x", "change_1x_error", "change_4x", "change_4x_error")
    found = dict.fromkeys((*keys, *changes))
    if not pairs:
        return found
    near, far = np.array(pairs).T
    per_length = bits.shape[1] // multiple
    at_near, at_far = (near, per_length - 1), (far, FAR * per_length - 1)
    sizes = n_bytes[at_far]
    found |= {"at_1x": float(bits[at_near].sum() / sizes.sum()), "at_4x": float(bits[at_far].sum() / sizes.sum())}
    found["difference"], found["standard_error"] = _per_byte(bits[at_far] - bits[at_near], sizes)
    if unstretched is not None:
        for name, at in (("change_1x", at_near), ("change_4x", at_far)):
            found[name], found[f"{name}_error"] = _per_byte(bits[at] - unstretched[at], sizes)
    return found


def _per_byte(bits: np.ndarray, sizes: np.ndarray) -> tuple[float, float | None]:
    """The sum of bits over the sum of bytes, and its standard error as a ratio estimate; None for one piece."""
    mean = bits.sum() / sizes.sum()
    if len(bits) == 1:
        return float(mean), None
    residuals = (bits - mean * sizes) / sizes.mean()
    return float(mean), float(residuals.std(ddof=1) / math.sqrt(len(bits)))
