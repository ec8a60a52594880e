"""Several sources: the shares at every prefix, stages, the same samples for any reader, and limits of repetition."""

import hashlib
import itertools

import numpy as np
import pytest
import torch

from fusedlm.config import parse_recipe
from fusedlm.data import Loader
from fusedlm.data.mixture import SourceSchedule, Span, source_schedule, stage_lines, total_samples
from fusedlm.data.shards import TokenShards
from fusedlm.data.training_text import open_training_text
from tests.data.test_loader import rows, shard

MILLION = 1_000_000
THIRDS = {"web": 0.6, "math": 0.15, "code": 0.25}


def fixed(weights: dict[str, float], seed: int = 0) -> SourceSchedule:
    return SourceSchedule([Span(0, weights, weights)], seed)


def names(schedule: SourceSchedule, first: int, end: int) -> np.ndarray:
    return np.asarray(schedule.names)[schedule.locate(np.arange(first, end))[0]]


def mixed_recipe(*overrides: str, stages: str = "", steps: int = 250):
    text = f"""
name: mixed
model:
  dim: 16
  n_layers: 1
  pattern: a
  blocks: {{a: {{mixer: {{type: attention, n_heads: 2}}, ffn: {{type: relu2}}}}}}
data:
  sources:
    web: {{source: {{type: text, path: web}}}}
    math: {{source: {{type: text, path: math}}}}
    code: {{source: {{type: text, path: code}}}}
  stages: [{stages}]
train: {{steps: {steps}, seq_len: 8, batch_size: 4}}
"""
    return parse_recipe(text, overrides)


STAGES = (
    "{until: 0.3, weights: {web: 60, math: 15, code: 25}}, "
    "{until: 0.7, weights: {web: 60, math: 15, code: 25}, anneal: true}, {weights: {web: 1, math: 5, code: 4}}"
)


def mixed_shards() -> TokenShards:
    """Sources whose tokens say where they are from: web from 1, math from 10,000, code from 20,000."""
    sources = {
        "code": TokenShards([shard([30, 50, 21, 60], 20_000)]),
        "math": TokenShards([shard([5, 1, 30, 14, 9], 10_000), shard([70], 11_000)]),
        "web": TokenShards([shard([5, 1, 30, 14, 9]), shard([40, 23] * 9, 1000), shard([3], 2000)]),
    }
    return TokenShards([part for source in sources.values() for part in source.shards], sources)


def draw(recipe, n: int, shards: TokenShards | None = None, **options) -> list:
    shards = shards or mixed_shards()
    samples = open_training_text(shards, recipe).samples
    options = {"seq_len": 8, "batch_size": 4, "seed": recipe.train.seed, "samples": samples} | options
    with Loader(shards, **options) as loader:
        return [next(loader) for _ in range(n)]


@pytest.mark.parametrize(
    "weights",
    [{"a": 1.0}, {"a": 0.5, "b": 0.5}, THIRDS, {"a": 1e-5, "b": 1 - 1e-5}, {str(i): (i + 1) / 91 for i in range(13)}],
    ids=["one", "two", "three", "rare", "thirteen"],
)
def test_every_prefix_has_the_shares_within_a_few_samples(weights):
    schedule = fixed(weights, seed=3)
    found, index = schedule.locate(np.arange(20_000))
    levels = int(np.ceil(np.log2(len(weights)))) + 1
    for number, name in enumerate(schedule.names):
        chosen = found == number
        count = np.cumsum(chosen)
        assert np.abs(count - weights[name] * np.arange(1, 20_001)).max() <= levels
        # The position in a source counts its samples.
        assert np.array_equal(index[chosen], np.arange(chosen.sum()))
        assert schedule.counts(12_345)[name] == count[12_344]


def test_shares_of_a_million_samples_are_those_of_every_stage():
    recipe = mixed_recipe(stages=STAGES, steps=MILLION // 4)
    schedule = source_schedule(recipe)
    assert total_samples(recipe) == MILLION
    found = schedule.locate(np.arange(MILLION))[0]
    first, last = np.array([0.25, 0.15, 0.6]), np.array([0.4, 0.5, 0.1])  # code, math, web
    for low, high, expected in ((0, 0.3, first), (0.3, 0.7, (first + last) / 2), (0.7, 1, last)):
        part = found[round(low * MILLION) : round(high * MILLION)]
        shares = np.bincount(part, minlength=3) / len(part)
        assert np.abs(shares / expected - 1).max() < 0.005
    # Within the stage that anneals, the weights are on the line between the two.
    for done in (0.1, 0.5, 0.9):
        middle = round((0.3 + 0.4 * done) * MILLION)
        shares = np.bincount(found[middle - 10_000 : middle + 10_000], minlength=3) / 20_000
        assert np.abs(shares - (first * (1 - done) + last * done)).max() < 0.005
    for n in (0, 1, 299_999, 300_000, 300_001, 512_345, 700_000, MILLION):
        assert list(schedule.counts(n).values()) == np.bincount(found[:n], minlength=3).tolist()


class Located:
    """Samples that are located and not read."""

    def __init__(self):
        self.windows = []

    def locate(self, windows: np.ndarray) -> list:
        self.windows.append(windows.copy())
        return []


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_shares_of_a_million_samples_hold_at_every_world_size(world_size):
    """Of all ranks together exactly, and of each rank within 0.5% of all samples, in every stage."""
    n_batches = 209
    recipe = mixed_recipe(stages=STAGES, steps=MILLION // 4)
    schedule, ranks = source_schedule(recipe), []
    for rank in range(world_size):
        located = Located()
        options = {"seq_len": 8, "batch_size": 4800, "seed": 0, "samples": located}
        with Loader(mixed_shards(), **options, rank=rank, world_size=world_size) as loader:
            for _ in range(n_batches):
                next(loader)
        ranks.append(np.concatenate(located.windows[:n_batches]))
    assert np.array_equal(np.sort(np.concatenate(ranks)), np.arange(n_batches * 4800))
    first, last = np.array([0.25, 0.15, 0.6]), np.array([0.4, 0.5, 0.1])  # code, math, web
    stages = ((0, 300_000, first), (300_000, 700_000, (first + last) / 2), (700_000, MILLION, last))
    for low, high, expected in stages:
        for own in (*ranks, np.concatenate(ranks)):
            part = schedule.locate(own[(own >= low) & (own < high)])[0]
            assert np.abs(np.bincount(part, minlength=3) / len(part) - expected).max() < 0.005


def test_annealing_to_a_new_source_rounds_nothing_away():
    """A rare source has less than one sample in each piece of the stage."""
    begin, end = {"a": 1.0, "b": 0.0}, {"a": 0.998, "b": 0.002}
    schedule = SourceSchedule([Span(0, begin, end), Span(20_000, end, end)], 0)
    assert abs(schedule.counts(20_000)["b"] - 20) <= 1
    assert abs(schedule.counts(30_000)["b"] - 40) <= 1


def test_a_source_that_is_in_no_stage_of_a_part_is_not_read_there():
    recipe = mixed_recipe(stages="{until: 0.5, weights: {web: 1, math: 1}}, {weights: {code: 1}}")
    schedule = source_schedule(recipe)
    assert set(names(schedule, 0, 500)) == {"web", "math"} and set(names(schedule, 500, 2000)) == {"code"}


def test_boundaries_are_tokens_or_a_fraction_of_the_run():
    after = "weights: {web: 1, math: 1}}, {weights: {code: 1}}"
    by_fraction = source_schedule(mixed_recipe(stages=f"{{until: 0.25, {after}"))
    by_tokens = source_schedule(mixed_recipe(stages=f"{{until: 2000, {after}"))
    assert np.array_equal(names(by_fraction, 0, 1000), names(by_tokens, 0, 1000))
    assert (names(by_tokens, 0, 250) != "code").all() and (names(by_tokens, 250, 1000) == "code").all()
    # Tokens stay where they are when a run gets longer.
    longer = mixed_recipe(stages=f"{{until: 2000, {after}", steps=999)
    assert np.array_equal(names(by_tokens, 0, 1000), names(source_schedule(longer), 0, 1000))


def test_any_sample_is_located_without_those_before_it():
    schedule = fixed(THIRDS)
    for start in (10**9, 10**15, 2**61):
        found, index = schedule.locate(np.arange(start, start + 100))
        before = schedule.counts(start)
        for number, name in enumerate(schedule.names):
            own = index[found == number]
            assert np.array_equal(own, np.arange(len(own)) + before[name])
            assert abs(before[name] / start - THIRDS[name]) < 1e-8


def test_the_order_of_the_sources_in_the_recipe_does_not_matter_and_the_seed_does():
    a, b = fixed(THIRDS), fixed(dict(reversed(THIRDS.items())))
    assert np.array_equal(names(a, 0, 500), names(b, 0, 500))
    assert not np.array_equal(names(a, 0, 500), names(fixed(THIRDS, seed=1), 0, 500))


def test_the_order_of_a_mixture_is_the_one_that_runs_were_trained_with():
    digest = hashlib.sha256()
    for batch in draw(mixed_recipe(stages=STAGES), 100):
        for field in ("tokens", "targets", "documents"):
            digest.update(getattr(batch, field).numpy().tobytes())
    assert digest.hexdigest() == "046f67ad043fe5d4d17b980b1cdbdb264801329dd0a79e448afd0b26e3d294c7"


def source_of(tokens: torch.Tensor) -> str:
    """The source of a window."""
    largest = int(tokens.max())
    return "code" if largest >= 20_000 else "math" if largest >= 10_000 else "web"


def test_windows_come_from_the_source_of_the_schedule():
    recipe = mixed_recipe(stages=STAGES)
    found = [source_of(row) for row in rows(draw(recipe, 250))]
    assert found == names(source_schedule(recipe), 0, 1000).tolist()


def test_each_source_is_read_once_per_epoch():
    recipe = mixed_recipe("data.sources.web.weight=2", steps=300)
    text = open_training_text(mixed_shards(), recipe)
    seen = {"web": [], "math": [], "code": []}
    for row in rows(draw(recipe, 300)):
        seen[source_of(row)].append(tuple(row.tolist()))
    for name, part in text.parts.items():
        windows = seen[name]
        assert len(windows) > 2 * part.per_epoch
        for epoch in range(2):
            own = windows[epoch * part.per_epoch : (epoch + 1) * part.per_epoch]
            assert len(set(own)) == part.per_epoch
    assert text.epochs(1200)["web"] == len(seen["web"]) / text.parts["web"].per_epoch
    assert text.tokens(1200)["web"] == 8 * len(seen["web"])


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_same_samples_of_a_mixture(ranks, packing):
    recipe = mixed_recipe(f"data.packing={packing}", stages=STAGES)
    full = draw(recipe, 170, batch_size=6)
    parts = [draw(recipe, 170, batch_size=6, rank=rank, world_size=ranks) for rank in range(ranks)]
    for field in ("tokens", "targets", "documents"):
        shared = [torch.cat([getattr(part[i], field) for part in parts]) for i in range(170)]
        assert all(torch.equal(a, getattr(b, field)) for a, b in zip(shared, full, strict=True))


def test_the_order_of_a_mixture_does_not_depend_on_the_shape_of_steps():
    recipe = mixed_recipe(stages=STAGES)
    plain = draw(recipe, 60)
    ramped = draw(recipe, 70, step_shape=lambda step: ((4, 2), (8, 4), (2, 8), (4, 8))[min(step // 10, 3)])
    streams = [torch.cat([batch.tokens.flatten() for batch in one])[:1600] for one in (ramped, plain)]
    assert torch.equal(*streams)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_resuming_around_the_boundary_of_stages_gives_the_same_samples(packing):
    """Stages end at samples 300 and 700, in the middle of a batch of 8."""
    recipe = mixed_recipe(f"data.packing={packing}", stages=STAGES)
    straight = draw(recipe, 125, batch_size=8)
    for after in (1, 36, 37, 38, 86, 87, 88, 100):
        resumed = draw(recipe, 20, batch_size=8, start_sample=straight[after - 1].next_sample)
        for field in ("tokens", "targets", "documents"):
            assert torch.equal(rows(straight[after : after + 20], field), rows(resumed[: 125 - after], field))


def test_a_source_beyond_its_epochs_is_refused_with_its_number():
    within = mixed_recipe("data.sources.web.max_epochs=20", "data.sources.web.weight=2")
    text = open_training_text(mixed_shards(), within)
    found = text.epochs(total_samples(within))
    # The limit is a limit of what is read.
    exact = f"data.sources.math.max_epochs={found['math']}"
    open_training_text(mixed_shards(), mixed_recipe(exact, "data.sources.web.weight=2"))
    limits = ["data.sources.math.max_epochs=2", "data.sources.code.max_epochs=0.5"]
    with pytest.raises(ValueError) as caught:
        open_training_text(mixed_shards(), mixed_recipe(*limits, "data.sources.web.weight=2"))
    assert str(caught.value) == (
        f"data.sources: the run would read code {found['code']:.3g} times (max_epochs=0.5), math {found['math']:.3g} "
        "times (max_epochs=2); lower their weights, train on fewer tokens, or raise max_epochs"
    )


def test_a_source_that_is_too_short_is_named():
    shards = mixed_shards()
    shards.sources["math"] = TokenShards([shard([3])])
    with pytest.raises(ValueError, match="data.sources.math: seq_len=8 is longer than the text: 3 tokens"):
        open_training_text(shards, mixed_recipe())


def test_stages_are_told():
    assert stage_lines(mixed_recipe()) == []
    stages = "{until: 1000, weights: {web: 3, math: 1}, anneal: true}, {until: 9000, weights: {code: 1, math: 0}}, "
    assert stage_lines(mixed_recipe(stages=stages + "{weights: {web: 1}}")) == [
        "math 25%, web 75%, annealed to those of the next stage, to 1,000 tokens",
        "code 100%, to 9,000 tokens (after the run)",
        "web 100%",
    ]


@pytest.mark.parametrize(
    ("stages", "overrides", "message"),
    [
        ("{weights: {web: 1, maths: 1}}", [], "data: stages.0.weights.maths: no such source; known: web, math, code"),
        ("{weights: {web: 0}}", [], "data: stages.0.weights: all are 0"),
        ("{weights: {web: 1}}", [], "data: sources.math: no stage has a weight for it"),
        ("{weights: {web: -1}}", [], "data.stages.0.weights.web: got -1"),
        ("{weights: {web: 1, math: 1, code: 1}, anneal: true}", [], "data: stages.0.anneal=true: there is no next"),
        ("{weights: {web: 1}}, {weights: {math: 1, code: 1}}", [], "data: stages.0.until: required, but missing"),
        ("{until: 9.5, weights: {web: 1}}, {weights: {math: 1, code: 1}}", [], "data: stages.0.until=9.5: tokens are"),
        (
            "{until: 0.5, weights: {web: 1}}, {until: 100, weights: {math: 1}}, {weights: {code: 1}}",
            [],
            "data.stages: until=[0.5, 100.0] of 8,000 tokens must be increasing",
        ),
        (
            "{until: 0.5, weights: {web: 1, math: 1}}, {until: 0.9, weights: {code: 1}}",
            [],
            "data.stages.1.until=0.9: the last stage ends before the 8,000 tokens of the run",
        ),
        (STAGES, ["data.sources.web.weight=2"], "data: sources.web.weight=2: stages set the weights"),
        ("", ["data.sources.web.weight=0"], "data.sources.web.weight: got 0"),
        ("", ["data.source={type: sotu}"], "data: source is given beside sources; give exactly one"),
        ("", ["data.sources=null", "data.source=null"], "data: source is null, and so is sources"),
        ("", ["data.sources={}"], "data: sources: there is none"),
        ("", ["data.validation={type: text, path: math}"], "data: validation is the same text as source"),
        ("{weights: {web: 1}}", ["data.sources=null"], "data: stages: weights are of sources"),
        ("", ["data.packing=first_fit"], "data.packing: got 'first_fit'"),
    ],
)
def test_contradictions_are_named(stages, overrides, message):
    with pytest.raises(ValueError) as caught:
        mixed_recipe(*overrides, stages=stages)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_schedules_of_any_spans_give_every_sample_one_source():
    rng = np.random.default_rng(0)
    for case in range(20):
        spans, first = [], 0
        weights = [dict(zip("abcde", rng.random(5) * (rng.random(5) < 0.7) + 1e-3, strict=True)) for _ in range(5)]
        for begin, end in itertools.pairwise(weights):
            spans.append(Span(first, begin, end if rng.random() < 0.5 else begin))
            first += int(rng.integers(0, 400))
        spans.append(Span(first, weights[-1], weights[-1]))
        schedule = SourceSchedule(spans, case)
        found, index = schedule.locate(np.arange(first + 300))
        for number in range(5):
            assert np.array_equal(index[found == number], np.arange((found == number).sum())), case
