"""Every model that the laws run over: each case of each mixer and feed-forward, and a narrow period of each recipe."""

from pathlib import Path

import pytest
import torch

from fusedlm import build_model, load_recipe
from fusedlm.config.model import ModelConfig
from fusedlm.testing import FFN_CASES, MIXER_CASES, NO_FFN, part_model, randomise_, wired_config

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
VOCAB = 61
N_TOKENS = 43  # odd, longer than windows and chunks, not a multiple of any


def parts():
    """A parameter for each case: a function that makes the model."""
    for name, cases in MIXER_CASES.items():
        for index, case in enumerate(cases):
            yield pytest.param(lambda case=case: part_model(case, vocab_size=VOCAB), id=f"{name}-{index}")
    for name, cases in FFN_CASES.items():
        for index, case in enumerate(cases):
            mixer = MIXER_CASES["attention"][0]
            yield pytest.param(lambda case=case, mixer=mixer: part_model(mixer, case, VOCAB), id=f"{name}-{index}")
    for name in ("attention", "mamba2"):
        yield pytest.param(lambda case=MIXER_CASES[name][0]: part_model(case, NO_FFN, VOCAB), id=f"{name}-alone")
    yield pytest.param(
        lambda: part_model(MIXER_CASES["gdn"][0], vocab_size=VOCAB, extra="tie_embeddings: false, logit_softcap: 5.0"),
        id="untied-softcap",
    )
    yield pytest.param(
        lambda: part_model(MIXER_CASES["attention"][0], extra="embedding_norm: true, norm_gain: false, smear: true"),
        id="norms-without-gain",
    )
    yield pytest.param(lambda: build_model(wired_config(), vocab_size=VOCAB), id="wired")


def one_period(recipe):
    """The model section with one layer of each of its blocks; of a wide model with experts a narrow one with few."""
    pattern = "".join(sorted(set(recipe.model.pattern)))
    config = recipe.model.model_copy(update={"n_layers": len(pattern), "pattern": pattern})
    with_experts = any(getattr(block.ffn, "n_experts", 0) for block in config.blocks.values())
    return narrowed(_few_experts(config)) if with_experts and config.dim > 512 else config


def _few_experts(config):
    """Three groups of two experts, or six in one, of which a token uses two: weights of gigabytes need not be drawn to
    test a law."""
    tree = config.model_dump()
    for block in tree["blocks"].values():
        if block["ffn"].get("n_experts"):
            groups = min(block["ffn"]["n_groups"], 3)
            limits = {"n_groups": groups, "n_limited_groups": min(groups, 2)}
            block["ffn"] |= {"n_experts": 6, "top_k": 2} | limits
    return ModelConfig.model_validate(tree)


def narrowed(config):
    """The same with every width divided by one power of two, down to heads of 16."""
    by = 1
    while all(config.dim // (2 * by) // block.mixer.n_heads >= 16 for block in config.blocks.values()):
        by *= 2
    tree = config.model_dump()
    tree["dim"] //= by
    for block in tree["blocks"].values():
        for part in block.values():
            for key in part.keys() & {"hidden", "kv_rank", "q_rank", "rope_dim"}:
                part[key] = part[key] and part[key] // by
    return ModelConfig.model_validate(tree)


def recipe_models(change=lambda config: config):
    for path in RECIPES:
        config = change(one_period(load_recipe(path)))
        yield pytest.param(lambda config=config: build_model(config, vocab_size=VOCAB), id=path.stem)


ALL_MODELS = pytest.mark.parametrize("make", [*parts(), *recipe_models(narrowed)])


def random_model(make):
    """In float64, every parameter away from its start."""
    torch.manual_seed(0)
    return randomise_(make()).double().eval()


def some_tokens(batch=2, n=N_TOKENS, seed=1):
    return torch.randint(0, VOCAB, (batch, n), generator=torch.Generator().manual_seed(seed))
