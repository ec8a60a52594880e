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
            family.model_type, vocab_size=VOCAB, max_position_embeddings=4096, pad_token_id=0, **keys
        ),
        attn_implementation="eager" if family.name == "mamba2" else "sdpa",  # it has no attention
        experts_implementation="eager",  # the others know no float64
    ).double()
    assert type(theirs).__name__ == family.architecture
    missing, unexpected = theirs.load_state_dict(_in_memory(family, tensors), strict=False)
    assert unexpected == [] and set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    theirs.tie_weights()
    return theirs.eval()


def _in_memory(family, tensors):
    """With the experts of a layer in one tensor, and other names, as Transformers has them after loading a file."""
    found, stacks = {}, {}
    if family.name == "nemotron_h":
        tensors = {name.replace("backbone.", "model.", 1): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            found[name] = tensor
            continue
        layer, _, rest = name.partition(".experts.")
        index, kind, _ = rest.split(".")
        stacks.setdefault(f"{layer}.experts", {}).setdefault(int(index), {})[kind] = tensor
    for name, experts in stacks.items():
        ordered = [experts[i] for i in range(len(experts))]
        if "gate_proj" in ordered[0]:
            found[f"{name}.gate_up_proj"] = torch.stack([torch.cat([e["gate_proj"], e["up_proj"]]) for e in ordered])
        else:
            found[f"{name}.up_proj"] = torch.stack([e["up_proj"] for e in ordered])
        found[f"{name}.down_proj"] = torch.stack([e["down_proj"] for e in ordered])
    return found


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_class(name, in_float64):
    config = model_config(name)
    family = choose_family(config)
    assert family.name == CASES[name][0]
    model = randomise_(build_model(config, vocab_size=VOCAB, seed=0).double(), scale=0.3).eval()
    for tensor, buffer in model.named_buffers():
        if tensor.endswith("router.bias"):
            buffer += torch.linspace(-0.2, 0.2, len(buffer))
    with torch.no_grad():
        tensors, folded = exported_tensors(family, model, config)
        with in_float64():
            theirs = _theirs(family, folded, model, tensors)
        generator = torch.Generator().manual_seed(1)
        for n_tokens in (1, 17, 2048):
            tokens = torch.randint(0, VOCAB, (2, n_tokens), generator=generator)
            with in_float64():
                expected = theirs(tokens, use_cache=False).logits
            assert expected.dtype == torch.float64 and expected.std() > 0.05
            assert_close(model(tokens).logits, expected, BOUND, f"{n_tokens} tokens")


def test_every_family_has_a_case():
    assert {case[0] for case in CASES.values()} == {family.name for family in FAMILIES}
