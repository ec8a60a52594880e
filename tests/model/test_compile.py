"""Each block and the head compile into one full graph and compute what they compute uncompiled."""

import pytest
import torch

from fusedlm.model import build_model
from fusedlm.model.precision import autocast
from fusedlm.testing import FFN_CASES, MIXER_CASES, assert_close, part_model, randomise_

CASES = [(mixer, FFN_CASES["swiglu"][0]) for cases in MIXER_CASES.values() for mixer in cases]
CASES += [(MIXER_CASES["attention"][0], ffn) for cases in FFN_CASES.values() for ffn in cases]


def _gradients(model, run_block, run_head, tokens, documents):
    """Loss and gradients with the given ways to call a block and the head."""
    model.zero_grad()
    context = model._context(tokens, documents, None)
    x = model.embedding(tokens)
    first, second = model.blocks
    x = second(run_block(first)(x, context), context)
    loss = run_head(model.head)(x.flatten(0, 1), tokens.roll(-1, 1).flatten()).sum()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"loss": loss.detach()}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mixer, ffn", CASES)
def test_full_graph(mixer, ffn, packed):
    torch._dynamo.reset()
    model = randomise_(part_model(mixer, ffn)).double()
    tokens = torch.randint(0, 61, (2, 21))
    documents = (torch.arange(21) // 8).expand(2, -1) if packed else None
    eager = _gradients(model, lambda block: block, lambda head: head, tokens, documents)

    def compiled(module):
        return torch.compile(module, fullgraph=True, backend="aot_eager")

    graphs = _gradients(model, compiled, compiled, tokens, documents)
    for name, expected in eager.items():
        assert_close(graphs[name], expected, 1e-10, name)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "mixer",
    [
        "{type: attention, n_heads: 2}",
        "{type: mla, n_heads: 2, kv_rank: 64, rope_dim: 32}",
        "{type: gdn, n_heads: 2}",
        "{type: attention, n_heads: 2, n_kv_heads: 1, window: 40}",
    ],
)
def test_compiled_training_on_the_gpu(mixer, packed):
    """bfloat16, compiled, the fast kernels, against float64 on the CPU without any of them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = part_model(mixer).config.model_copy(update={"dim": 256})
    model = randomise_(build_model(config, vocab_size=1000, device="cuda"), scale=0.02)
    exact = build_model(config, vocab_size=1000).double()
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 1000, (3, 200))
    documents = (torch.arange(200) // 70).expand(3, -1) if packed else None
    on_gpu = None if documents is None else documents.cuda()

    def run(compiled_model):
        compiled_model.zero_grad()
        with autocast(torch.device("cuda"), torch.bfloat16):
            loss = compiled_model.loss(
                tokens[:, :-1].cuda(), tokens[:, 1:].cuda(), None if on_gpu is None else on_gpu[:, :-1]
            )
        loss.mean().backward()
        return [loss, *[p.grad for p in compiled_model.parameters()]]

    expected = exact.loss(tokens[:, :-1], tokens[:, 1:], None if documents is None else documents[:, :-1])
    expected.mean().backward()
    expected = [expected, *[p.grad for p in exact.parameters()]]
    eager = run(model)
    eager = [x.clone() for x in eager]
    model.compile_blocks()
    compiled = run(model)
    names = ["loss", *[name for name, _ in model.named_parameters()]]
    for name, a, e, x in zip(names, compiled, eager, expected, strict=True):
        bound = 2e-2 if name == "loss" else 8e-2
        assert_close(e.cpu(), x, bound, f"{name}, eager")
        assert_close(a.cpu(), x, bound, f"{name}, compiled")
