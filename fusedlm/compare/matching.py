"""Matching variants to the baseline: sizes or steps, and the keys changed for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from fusedlm.config import Recipe
from fusedlm.config.experiment import Experiment
from fusedlm.config.model import ModelConfig
from fusedlm.model import build_model
from fusedlm.model.accounting import count_parameters, training_flops_per_token

_NAMES = {"params": "parameters", "flops": "training FLOPs per token", "tokens": "training tokens", "time": "seconds"}
_VARIED = {"ffn": "hidden width of the feed-forwards", "width": "model.dim", "depth": "model.n_layers"}


@dataclass(frozen=True)
class Account:
    """Size and cost of a recipe's model."""

    parameters: int
    active_parameters: int
    embedding_parameters: int
    flops_per_token: float  # of training at the recipe's seq_len


@dataclass(frozen=True)
class Change:
    """A key that was changed for a match."""

    key: str
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.key} {self.before:,} → {self.after:,}"


@dataclass(frozen=True)
class Variant:
    """One variant as it will be trained."""

    name: str
    recipe: Recipe  # with the first seed
    vocab_size: int
    account: Account
    changes: tuple[Change, ...] = ()
    deviation: float | None = None  # relative, of the matched quantity from the baseline's; None: not matched

    @property
    def tokens(self) -> int:
        """Of the full training."""
        return self.recipe.train.total_tokens()


def match_variants(
    experiment: Experiment,
    recipes: dict[str, Recipe],
    vocab_sizes: dict[str, int],
    step_seconds: dict[str, float] | None = None,
) -> dict[str, Variant]:
    """Match every variant to the first in the quantity that the experiment names.

    Args:
        vocab_sizes: by variant.
        step_seconds: measured seconds per step by variant, for `match: time`; a variant without keeps its steps.

    Raises:
        ValueError: no size or number of steps is within the tolerance; names the nearest.
    """
    baseline, *_ = recipes
    variants = {}
    for name, recipe in recipes.items():
        variant = Variant(name, recipe, vocab_sizes[name], account(recipe, vocab_sizes[name]))
        first = variants.get(baseline, variant)
        if experiment.match in ("params", "flops"):
            variant = _match_size(variant, first, experiment)
        elif experiment.match == "tokens":
            variant = _match_steps(variant, first, experiment, first.tokens / tokens_per_step(recipe))
        elif experiment.match == "time" and name in (step_seconds or {}):
            steps = first.recipe.train.steps * step_seconds[baseline] / step_seconds[name]
            variant = _match_steps(variant, first, experiment, steps)
        variants[name] = variant
    return variants


def tokens_per_step(recipe: Recipe) -> float:
    """The mean over the steps; that of ramps, whose ends are fractions of all steps, hardly depends on their number."""
    return recipe.train.total_tokens() / recipe.train.steps


def account(recipe: Recipe, vocab_size: int) -> Account:
    """Counted on a model on the meta device."""
    return _account(recipe.model, recipe.train.seq_len, vocab_size)


def _account(config: ModelConfig, seq_len: int, vocab_size: int) -> Account:
    model = build_model(config, vocab_size=vocab_size, device="meta")
    count = count_parameters(model)
    return Account(count.total, count.active, count.embedding, training_flops_per_token(model, seq_len))


def _match_steps(variant: Variant, first: Variant, experiment: Experiment, wanted: float) -> Variant:
    before, after = variant.recipe.train.steps, max(1, round(wanted))
    deviation = after / wanted - 1
    if abs(deviation) > experiment.tolerance:
        raise ValueError(
            f"variant {variant.name}: {_NAMES[experiment.match]} of {first.name} need {wanted:.2f} steps; {after} are "
            f"off by {deviation:+.1%}; train longer or raise experiment.tolerance={experiment.tolerance}"
        )
    changes = () if before == after else (Change("train.steps", before, after),)
    recipe = _with_train(variant.recipe, steps=after)
    return replace(variant, recipe=recipe, changes=changes, deviation=deviation)


def _with_train(recipe: Recipe, **changes) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def _match_size(variant: Variant, first: Variant, experiment: Experiment) -> Variant:
    seq_len = variant.recipe.train.seq_len
    quantity = _quantity(experiment.match)
    target = quantity(first.account)

    def measure(config: ModelConfig) -> float:
        return quantity(_account(config, seq_len, variant.vocab_size))

    config = variant.recipe.model
    candidates = {"ffn": _ffn_candidates, "width": _width_candidates, "depth": _depth_candidates}
    own = quantity(variant.account) / target - 1
    if abs(own) <= experiment.tolerance / 10:
        return replace(variant, deviation=own)
    # Multiples of 8 suit the matrix units of GPUs; other sizes only if no multiple is near the target.
    for multiple, accepted in ((8, experiment.tolerance / 4), (1, experiment.tolerance)):
        found = _nearest(candidates[experiment.match_by](config, variant.vocab_size, multiple), measure, target)
        deviation = measure(found.make()) / target - 1
        if abs(deviation) <= accepted:
            recipe = variant.recipe.model_copy(update={"model": found.make()})
            changes = tuple(change for change in found.changes if change.before != change.after)
            return replace(
                variant,
                recipe=recipe,
                account=account(recipe, variant.vocab_size),
                changes=changes,
                deviation=deviation,
            )
    reached = measure(found.make())
    others = " or ".join(by for by in candidates if by != experiment.match_by)
    tried = ", ".join(f"{change.key}={change.after}" for change in found.changes)
    raise ValueError(
        f"variant {variant.name}: {target:,.0f} {_NAMES[experiment.match]} of {first.name} cannot be met within "
        f"{experiment.tolerance:.2g} by {_VARIED[experiment.match_by]}; the nearest is {reached:,.0f} "
        f"({deviation:+.1%}) with {tried}; try experiment.match_by={others}"
    )


def _quantity(match: str) -> Callable[[Account], float]:
    return (lambda found: found.parameters) if match == "params" else (lambda found: found.flops_per_token)


@dataclass(frozen=True)
class _Candidate:
    """A size to try."""

    make: Callable[[], ModelConfig]
    changes: tuple[Change, ...]


def _nearest(candidates: Sequence[_Candidate], measure: Callable[[ModelConfig], float], target: float) -> _Candidate:
    """The candidate whose measure, which must be increasing, is nearest to the target. Each measure builds a model, so
    the search interpolates first: measures of widths are nearly linear."""

    @cache
    def at(index: int) -> float:
        return measure(candidates[index].make())

    low, high = 0, len(candidates) - 1
    last = None
    while high - low > 1 and at(low) < target < at(high):
        if last is None:
            guess = low + round((high - low) * (target - at(low)) / (at(high) - at(low)))
        else:  # the neighbour across the target, then bisection
            guess = last + 1 if at(last) < target else last - 1
            guess = guess if low < guess < high else (low + high) // 2
        guess = min(max(guess, low + 1), high - 1)
        low, high = (guess, high) if at(guess) < target else (low, guess)
        last = guess if last is None else None
    return candidates[min((low, high), key=lambda index: abs(at(index) - target))]


def _ffn_candidates(config: ModelConfig, vocab_size: int, multiple: int) -> list[_Candidate]:
    """All feed-forwards scaled together; their hidden widths are multiples of `multiple`."""
    widths = _ffn_widths(config, vocab_size)
    if not widths:
        raise ValueError("experiment.match_by=ffn: the model has no feed-forwards; use width or depth")
    widest = max(widths.values())
    found = []
    least = max(multiple, 2)  # a routed feed-forward has at least one unit in each part
    for width in range(least, 16 * widest + multiple, multiple):
        scaled = {
            name: max(least, multiple * round(before * width / widest / multiple)) for name, before in widths.items()
        }
        changes = tuple(
            Change(f"model.blocks.{name}.ffn.hidden", widths[name], after) for name, after in scaled.items()
        )
        found.append(_Candidate(partial(_with_ffn_widths, config, scaled), changes))
    return found


def _ffn_widths(config: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Hidden width of the feed-forward of each block in the pattern; that of a routed one is the sum of its parts."""
    model = build_model(config, vocab_size=vocab_size, device="meta")
    return {
        name: config.blocks[name].ffn.hidden
        or sum(
            linear.in_features
            for linear in block.ffn.modules()
            if isinstance(linear, torch.nn.Linear) and linear.out_features == config.dim
        )
        for name, block in zip(model.layer_names, model.blocks, strict=True)
        if block.ffn is not None
    }


def _with_ffn_widths(config: ModelConfig, widths: dict[str, int]) -> ModelConfig:
    blocks = dict(config.blocks)
    for name, hidden in widths.items():
        blocks[name] = blocks[name].model_copy(update={"ffn": blocks[name].ffn.model_copy(update={"hidden": hidden})})
    return config.model_copy(update={"blocks": blocks})


def _width_candidates(config: ModelConfig, vocab_size: int, multiple: int) -> list[_Candidate]:
    """Widths that are valid with the number of heads; a hidden width or rank that the recipe sets is kept."""
    dims = [dim for dim in range(multiple, 4 * config.dim + multiple, multiple) if _is_valid(config, dim)]
    return [_Candidate(partial(_with_dim, config, dim), (Change("model.dim", config.dim, dim),)) for dim in dims]


def _with_dim(config: ModelConfig, dim: int) -> ModelConfig:
    return ModelConfig.model_validate(config.model_dump() | {"dim": dim})


def _is_valid(config: ModelConfig, dim: int) -> bool:
    try:
        _with_dim(config, dim)
    except ValueError:
        return False
    return True


def _depth_candidates(config: ModelConfig, vocab_size: int, multiple: int) -> list[_Candidate]:
    """Numbers of layers, with the same pattern."""
    return [
        _Candidate(
            partial(config.model_copy, update={"n_layers": layers}),
            (Change("model.n_layers", config.n_layers, layers),),
        )
        for layers in range(1, 4 * config.n_layers + 1)
    ]
