"""Which processes a recipe needs, and what it is told when these are others."""

import pytest

from fusedlm.distributed import World
from fusedlm.train.parallel import divided
from tests.train.runs import tiny_recipe

_MIXTURE = "model.blocks.a.ffn={{type: moe, n_experts: {}, top_k: 2, hidden: {}}}"


def recipe_of(folder, *overrides: str, n_experts: int = 8, hidden: int = 12):
    return tiny_recipe(folder, _MIXTURE.format(n_experts, hidden), "train.batch_size=8", *overrides)


@pytest.mark.parametrize(
    ("parallel", "n", "expected"),
    [
        ("{}", 4, (1, 4, 1)),
        ("{replicate: 2}", 4, (2, 2, 1)),
        ("{experts: 4}", 4, (1, 1, 4)),
        ("{experts: 2}", 4, (1, 2, 2)),
        ("{shard: 2, experts: 2}", 4, (1, 2, 2)),
        ("{replicate: 2, experts: 2}", 8, (2, 2, 2)),
        ("{replicate: 2, shard: 1, experts: 4}", 8, (2, 1, 4)),
    ],
)
def test_copies_shards_and_parts_of_the_experts(tmp_path, parallel, n, expected):
    assert divided(recipe_of(tmp_path, f"runtime.parallel={parallel}"), World(0, n)) == expected


@pytest.mark.parametrize(
    ("parallel", "n", "words"),
    [
        ("{experts: 2}", 1, "replicate=1, shard=null, experts=2 needs a multiple of 2 processes, and this run has 1"),
        ("{experts: 4}", 2, "replicate=1, shard=null, experts=4 needs a multiple of 4 processes, and this run has 2"),
        ("{replicate: 2, experts: 2}", 6, "needs a multiple of 4 processes, and this run has 6"),
        ("{shard: 2, experts: 2}", 2, "replicate=1, shard=2, experts=2 needs 4 processes, and this run has 2"),
        ("{shard: 1, experts: 2}", 4, "replicate=1, shard=1, experts=2 needs 2 processes, and this run has 4"),
    ],
)
def test_other_numbers_of_processes_are_refused(tmp_path, parallel, n, words):
    with pytest.raises(ValueError, match="^runtime.parallel: ") as refused:
        divided(recipe_of(tmp_path, f"runtime.parallel={parallel}"), World(0, n))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_shards_divide_the_rows_of_divided_experts(tmp_path):
    recipe = recipe_of(tmp_path, "runtime.parallel.experts=2", hidden=10)
    with pytest.raises(ValueError, match="the 4 shards of an expert must divide model.blocks.a.ffn.hidden=10"):
        divided(recipe, World(0, 8))
    assert divided(recipe, World(0, 4)) == (1, 2, 2)
    undivided = recipe_of(tmp_path, hidden=10)
    assert divided(undivided, World(0, 8)) == (1, 8, 1)


def test_graphs_are_refused_with_divided_experts(tmp_path):
    recipe = recipe_of(tmp_path, "runtime.parallel.experts=2", "runtime.cuda_graph=true")
    with pytest.raises(ValueError, match="runtime.cuda_graph=true: a graph cannot hold what 2 processes exchange"):
        divided(recipe, World(0, 2))


def test_experts_are_divided_evenly(tmp_path):
    for n, divisor in ((6, 4), (8, 3), (8, 16)):
        key = f"runtime.parallel.experts={divisor}"
        with pytest.raises(ValueError, match=f"{key}: does not divide model.blocks.a.ffn.n_experts={n}"):
            recipe_of(tmp_path, key, n_experts=n)


def test_a_model_without_experts_has_none_to_divide(tmp_path):
    words = "runtime.parallel.experts=2: the model has no mixture of experts to divide"
    for overrides in (["model.pattern=gm"], ["model.blocks.a.ffn.n_experts=0"]):
        with pytest.raises(ValueError, match=words):
            recipe_of(tmp_path, *overrides, "runtime.parallel.experts=2")
    with_module = ["model.pattern=gm", "model.mtp={depth: 1, block: a}", "runtime.parallel.experts=2"]
    assert recipe_of(tmp_path, *with_module).model.mixtures().keys() == {"a"}
