"""Logits of every family against stock Transformers in float64: full passes, padded batches."""

import pytest
import torch

from fusedlm.export.families import FAMILIES, choose_family
from fusedlm.export.to_hf import exported_tensors
from fusedlm.model import build_model
from fusedlm.testing import assert_close, randomise_
from tests.export.cases import CASES, model_config

transformers = pytest.importorskip("transformers")

VOCAB = 61
BOUND = 1e-9


def _theirs(family, config, model, tensors):
    keys = family.config(config, model.embedding_scale)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(
            family.model_type, vocab_size=VOCAB, max_position_embeddings=512, pad_token_id=0, **keys
        ),
        attn_implementation="sdpa",
    ).double()
    assert type(theirs).__name__ == family.architecture
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert unexpected == [] and set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    theirs.tie_weights()
    return theirs.eval()


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_class(name, in_float64):
    config = model_config(name)
    family = choose_family(config)
    assert family.name == CASES[name][0]
    model = randomise_(build_model(config, vocab_size=VOCAB, seed=0).double(), scale=0.3).eval()
    with torch.no_grad():
        tensors, folded = exported_tensors(family, model, config)
        with in_float64():
            theirs = _theirs(family, folded, model, tensors)
        generator = torch.Generator().manual_seed(1)
        for n_tokens in (1, 17, 200):
            tokens = torch.randint(0, VOCAB, (2, n_tokens), generator=generator)
            with in_float64():
                expected = theirs(tokens, use_cache=False).logits
            assert expected.dtype == torch.float64 and expected.std() > 0.05
            assert_close(model(tokens).logits, expected, BOUND, f"{n_tokens} tokens")


def test_every_family_has_a_case():
    assert {case[0] for case in CASES.values()} == {family.name for family in FAMILIES}
