"""A text scored twice, by the model as it is and by one that adapts to what it has scored."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from fusedlm.evaluate.adapt.bootstrap import Gain, paired_gain
from fusedlm.evaluate.adapt.finetune import Finetune
from fusedlm.evaluate.adapt.ngram import NgramMixture
from fusedlm.evaluate.adapt.predictions import Sequences, predict
from fusedlm.evaluate.adapt.tilt import HintTilt
from fusedlm.evaluate.score import Documents, Score, check_spans, default_batch_tokens

Method = NgramMixture | HintTilt | Finetune


@dataclass(frozen=True)
class AdaptedScore:
    """Both scores of one text, and their difference.

    plain_nll, adapted_nll: (n,) float64, nats of each token in the order of the text.
    plain_seconds, adapted_seconds: of the whole computation of each score; that of a mixture includes the plain one.
    """

    plain: Score
    adapted: Score
    gain: Gain
    plain_nll: np.ndarray
    adapted_nll: np.ndarray
    plain_seconds: float
    adapted_seconds: float

    def record(self, method: Method) -> dict:
        """JSON-able: both figures, the gain with its interval, microseconds per token of each."""
        return {
            "method": method.name,
            **method.settings(),
            "plain_bpb": self.plain.bpb,
            "adapted_bpb": self.adapted.bpb,
            "gain": self.gain.gain,
            "gain_low": self.gain.low,
            "gain_high": self.gain.high,
            "resampled": self.gain.units,
            "units": self.gain.n_units,
            "plain_microseconds_per_token": 1e6 * self.plain_seconds / self.plain.tokens,
            "adapted_microseconds_per_token": 1e6 * self.adapted_seconds / self.adapted.tokens,
        }


def score_adapted(
    model,
    documents: Iterable[tuple[np.ndarray, int]],
    method: Method,
    *,
    window: int,
    stride: int | None = None,
    across_documents: bool = False,
    batch_tokens: int | None = None,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Callable[[int], None] | None = None,
) -> AdaptedScore:
    """Score documents by sliding windows, plainly and with a method of adaptation.

    The adapted score of a token depends on the tokens before it alone, documents before its own included unless the
    method is reset, and is the logarithm of a distribution over the whole vocabulary. The model is in eval mode
    meanwhile, and afterwards as before. All tokens of the text are held in memory.

    Args:
        model, documents, window, stride, across_documents, batch_tokens, device, dtype: as `score_documents` takes
            them; a window is required.
        method: what adapts.
        progress: called with the number of tokens scored so far, from zero again for a method that scores anew.

    Raises:
        NotFinite, ValueError: as `score_documents`; or the model has no parameters of the method.
    """
    device = torch.device(device)
    batch_tokens = default_batch_tokens(device) if batch_tokens is None else batch_tokens
    if window is None:
        raise ValueError("adaptation needs a window; full documents are scored through the state, without one")
    stride = check_spans(window, stride, batch_tokens)
    sizes: list[int] = []

    def counted():
        for tokens, n_bytes in documents:
            sizes.append(int(n_bytes))
            yield tokens, n_bytes

    texts = [np.asarray(tokens) for _, tokens in Documents(counted(), model.vocab_size, None)]
    lengths = [len(tokens) - 1 for tokens in texts]
    n, n_bytes = sum(lengths), sum(sizes)
    if n == 0:
        raise ValueError(f"no text to score: {len(texts)} documents hold no text token")
    if n_bytes <= 0:
        raise ValueError(f"{n} tokens were scored, but the documents count {n_bytes} bytes")
    window = min(window, sum(map(len, texts)) - 1 if across_documents else max(lengths))
    sequences = Sequences.of(texts, across_documents)
    spans = {"window": window, "stride": stride, "batch_tokens": batch_tokens, "device": device, "dtype": dtype}
    was_training = model.training
    model.eval()
    try:
        began = time.perf_counter()
        context, hints = (None, None) if isinstance(method, Finetune) else method.hints(texts)
        counting = time.perf_counter() - began
        began = time.perf_counter()
        plain = predict(model, sequences, hints, **spans, progress=progress)
        plain_seconds = time.perf_counter() - began
        began = time.perf_counter()
        if isinstance(method, Finetune):
            adapted, before = method.run(model, sequences, **spans, progress=progress), 0.0
        else:
            adapted = method.nll(context, plain.nll, plain.entropy, plain.log_hint)
            before = counting + plain_seconds
        adapted_seconds = before + time.perf_counter() - began
    finally:
        model.train(was_training)
    figures = model.summarise(plain.metrics) if plain.metrics else {}
    return AdaptedScore(
        plain=Score(math.fsum(plain.nll), n, n_bytes, len(texts), figures),
        adapted=Score(math.fsum(adapted), n, n_bytes, len(texts)),
        gain=paired_gain(plain.nll, adapted, lengths, sizes),
        plain_nll=plain.nll,
        adapted_nll=adapted,
        plain_seconds=plain_seconds,
        adapted_seconds=adapted_seconds,
    )
