"""Score-first adaptation: a model that changes with the text it has scored, beside the model as it is.

The score of a token depends on the tokens before it alone. A token is scored first and used after that.
"""

from fusedlm.evaluate.adapt.counts import NgramCounts, count_ngrams
from fusedlm.evaluate.adapt.finetune import Finetune
from fusedlm.evaluate.adapt.ngram import NgramMixture
from fusedlm.evaluate.adapt.score import AdaptedScore, score_adapted
from fusedlm.evaluate.adapt.tilt import HintTilt

__all__ = [
    "AdaptedScore",
    "Finetune",
    "HintTilt",
    "NgramCounts",
    "NgramMixture",
    "count_ngrams",
    "score_adapted",
]
