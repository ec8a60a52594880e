"""What a user asks `fusedlm quantize` for, checked, and the choice for each matrix that follows from it."""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fusedlm.nn.linear import Linear
from fusedlm.ops.quantized.integer import BITS, largest_code
from fusedlm.ops.quantized.reference import WEIGHT_FORMATS
from fusedlm.quant.calibration import Calibration
from fusedlm.quant.formats import Integers, integers, packed
from fusedlm.quant.gptq import DAMPING
from fusedlm.quant.matrix import Calibrate, Method
from fusedlm.quant.plan import Estimate, between, correct_best, estimate, fit_budget
from fusedlm.quant.sequence import Choice, Progress
from fusedlm.quant.targets import Target, named
from fusedlm.runs.state import model_tensors

MIXED, CODED = "mixed", "coded"
_INTEGERS = tuple(f"int{bits}" for bits in BITS)
FORMATS = (*WEIGHT_FORMATS, *(name for name in _INTEGERS if name not in WEIGHT_FORMATS), MIXED, CODED)
_CODED_BITS = 8  # of codes whose size is their entropy: the range costs nothing
# Steps between neighbouring values in standard deviations of the row, 1/16 to 1.4: about 6 to 1.6 bits a weight.
_STEPS = tuple(2 ** (half_octaves / 2) for half_octaves in range(-8, 2))

_BY_BUDGET = (MIXED, CODED)


@dataclass(frozen=True)
class Request:
    """
    format: of hidden matrices: one of FORMATS; mixed: a width of integers for each matrix, by the budget; coded: for
        each matrix the step between values, by a budget of entropy-coded bytes.
    storage: packed: `QuantizedWeight`s of linear layers and experts, which are computed with; integers: `IntegerMatrix`
        of linear layers, experts, embeddings and head, decoded when they are loaded. None: packed where the format is
        one of WEIGHT_FORMATS.
    group: columns that share a scale; None: the row, of packed int4 64.
    embedding: format of embeddings and head, int2 to int8; "none": they stay. Of integers, None: int8.
    calibrate, clip, ordered, damping: as `Method` has them; clip None: search where calibration is read, else max.
    embedding_clip: of embeddings and head; None: clip if that is no number, else its default.
    rank, corrected: of a low-rank correction, and how many matrices have one; with a budget, as many as pay.
    budget: most bytes of all tensors: of mixed, codes without gaps; of coded, codes at their entropy and what is not
        quantised in float16, an estimate.
    tokens, seed: of calibration text.

    Raises:
        ValueError: `key=value: what is wrong`.
    """

    format: str
    storage: Literal["packed", "integers"] | None = None
    group: int | None = None
    embedding: str | None = None
    calibrate: Calibrate = "plain"
    clip: Literal["max", "search"] | float | None = None
    embedding_clip: Literal["max", "search"] | float | None = None
    ordered: bool = True
    damping: float = DAMPING
    rank: int = 0
    corrected: int = 3
    budget: int | None = None
    tokens: int = 131072
    seed: int = 0

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r} must be one of {', '.join(FORMATS)}")
        if self.storage not in (None, "packed", "integers"):
            raise ValueError(f"storage={self.storage!r} must be packed or integers")
        if self.is_packed:
            if self.format not in WEIGHT_FORMATS:
                raise ValueError(f"storage=packed: {self.format} is stored as integers only")
            packed(self.format, self.group)
            for key, value, unset in (
                ("embedding", self.embedding, None),
                ("embedding_clip", self.embedding_clip, None),
                ("rank", self.rank, 0),
                ("budget", self.budget, None),
            ):
                if value != unset:
                    raise ValueError(f"{key}={value}: packed {self.format} has none; add --storage integers")
            if isinstance(self.clip, float):
                raise ValueError(f"clip={self.clip:g}: packed formats have no such scales; add --storage integers")
        elif self.format not in (*_INTEGERS, *_BY_BUDGET):
            raise ValueError(f"storage=integers: {self.format} has no integers; give int2 to int8, mixed or coded")
        else:
            integers("int8", self.group)
        if self.embedding not in (None, "none", *_INTEGERS):
            raise ValueError(
                f"embedding={self.embedding!r} must be none, {', '.join(_INTEGERS[:-1])} or {_INTEGERS[-1]}"
            )
        if (self.format in _BY_BUDGET) != (self.budget is not None):
            raise ValueError(f"budget={self.budget}: formats mixed and coded need a budget, and others have none")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget={self.budget}: must be a positive number of bytes")
        if self.format in _BY_BUDGET and self.embedding not in (None, "none"):
            raise ValueError(f"embedding={self.embedding}: the budget chooses the width of embeddings too")
        if self.format == CODED:
            self._check_coded()
        if not 0 <= self.rank <= 1024:
            raise ValueError(f"rank={self.rank}: must be from 0 to 1024")
        if not 1 <= self.corrected <= 10**6:
            raise ValueError(f"corrected={self.corrected}: must be at least 1")
        if not 1 <= self.tokens <= 2**32:
            raise ValueError(f"tokens={self.tokens}: must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must be from 0 to 2^63 - 1")
        if self.calibrate == "plain" and (self.rank or self.budget is not None):
            key, value = ("rank", self.rank) if self.rank else ("budget", self.budget)
            fitting = "gptq" if self.format == CODED else "gptq or gptq-lite"
            raise ValueError(f"{key}={value}: estimates errors of outputs; add --calibrate {fitting}")
        for is_embedding in (False, True):
            self.method(is_embedding)

    def _check_coded(self) -> None:
        for key, value in (("clip", self.clip), ("embedding_clip", self.embedding_clip)):
            if value is not None:
                raise ValueError(f"{key}={value}: of format coded the budget chooses the scales; leave it out")
        if self.rank:
            raise ValueError(f"rank={self.rank}: format coded has no corrections; leave it out")
        if self.calibrate == "gptq-lite":
            raise ValueError("calibrate=gptq-lite: searches the scales that format coded chooses; give gptq")

    @property
    def is_packed(self) -> bool:
        """Whether the result is of `QuantizedWeight`s."""
        return self.storage == "packed" or (self.storage is None and self.format in WEIGHT_FORMATS)

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None: the row."""
        return packed(self.format, self.group).group if self.is_packed else self.group

    def method(self, is_embedding: bool) -> Method:
        """Of hidden matrices, or of embeddings and head."""
        clip = self.clip
        if is_embedding:  # a number is for the width of hidden matrices
            clip = self.clip if isinstance(self.clip, str) and self.embedding_clip is None else self.embedding_clip
        if clip is None:
            clip = "max" if self.calibrate == "plain" else "search"
        calibrate = self.calibrate
        if is_embedding and calibrate == "gptq-lite" and clip != "search":
            calibrate = "plain"
        return Method(calibrate, clip, self.ordered, self.damping)

    def choices(
        self, model: torch.nn.Module, calibration: Calibration | None, progress: Progress | None = None
    ) -> dict[str, Choice]:
        """The choice for each matrix by the name of its parameter.

        Raises:
            ValueError: the budget is too small, or there is nothing to quantise.
        """
        targets = {name: target for name, target in named(model).items() if self._covers(target)}
        if self.is_packed:
            format, method = packed(self.format, self.group), self.method(False)
            return {name: Choice(format, method) for name in targets}
        if self.format == CODED:
            others = sum(2 * t.numel() for name, t in model_tensors(model).items() if name not in targets)
            return fit_budget(self.coded_estimates(model, calibration, progress), self.budget, others)
        if self.format == MIXED:
            candidates = {name: self._candidates(target, BITS) for name, target in targets.items()}
            estimates = estimate(model, calibration, candidates, progress)
            return fit_budget(estimates, self.budget, other_bytes(model, targets))
        widths = {
            name: (integers((self.embedding or "int8") if _is_embedding(target) else self.format).bits,)
            for name, target in targets.items()
        }
        candidates = {name: self._candidates(target, widths[name]) for name, target in targets.items()}
        if not self.rank:
            return {name: own[0] for name, own in candidates.items()}
        pairs = {name: own if len(own) == 2 else own * 2 for name, own in candidates.items()}
        return correct_best(estimate(model, calibration, pairs, progress), self.corrected)

    def coded_estimates(
        self, model: torch.nn.Module, calibration: Calibration, progress: Progress | None = None
    ) -> dict[str, list[Estimate]]:
        """Of format coded, the steps among which a budget chooses, by the name of the parameter."""
        format = Integers(_CODED_BITS, self.group)
        method = Method("gptq", 1.0, self.ordered, self.damping)
        clips = [step * largest_code(_CODED_BITS) for step in _STEPS]
        candidates = [Choice(format, replace(method, clip=clip)) for clip in clips]
        names = [name for name, target in named(model).items() if self._covers(target)]
        estimates = estimate(model, calibration, dict.fromkeys(names, candidates), progress, coded=True)
        return {name: between(own) for name, own in estimates.items()}

    def _covers(self, target: Target) -> bool:
        if self.is_packed:
            return type(target.module) is Linear or target.is_expert
        return not (_is_embedding(target) and self.embedding == "none")

    def _candidates(self, target: Target, widths: Sequence[int]) -> list[Choice]:
        """Each width, and where a correction is possible each width with it."""
        method = self.method(_is_embedding(target))
        plain = [Choice(Integers(bits, self.group), method) for bits in widths]
        if not self.rank or target.stack > 1 or self.rank > min(target.shape):
            return plain
        return [*plain, *(replace(choice, rank=self.rank) for choice in plain)]


def _is_embedding(target: Target) -> bool:
    return target.kind != "matrix"


def other_bytes(model: torch.nn.Module, names: Container[str]) -> int:
    """Bytes of the tensors of a model but for the named parameters."""
    return sum(tensor.nbytes for name, tensor in model_tensors(model).items() if name not in names)
