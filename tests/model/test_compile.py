"""Each block and the head compile into one full graph and compute what they compute uncompiled."""

import pytest
import torch

from fusedlm.config.ffn import SwiGLUConfig
from fusedlm.model import build_model
from fusedlm.model.precision import autocast
from fusedlm.testing import (
    FFN_CASES,
    MIXER_CASES,
    NO_FFN,
    assert_close,
    error_ratio,
    part_config,
    part_model,
    randomise_,
)

SWIGLU = FFN_CASES["swiglu"][0]
# Mixer, feed-forward, documents: both ways for the first case of each mixer, in turns for the others.
FIRST = [(cases[0], SWIGLU, False) for cases in MIXER_CASES.values()]
FIRST += [(MIXER_CASES["attention"][0], cases[0], False) for name, cases in FFN_CASES.items() if name != "swiglu"]
FIRST += [(MIXER_CASES["mamba2"][0], NO_FFN, False)]
CASES = [(cases[0], SWIGLU, True) for cases in MIXER_CASES.values()]
OTHERS = [mixer for cases in MIXER_CASES.values() for mixer in cases[1:]]
CASES += [(mixer, SWIGLU, i % 2 == 0) for i, mixer in enumerate(OTHERS)]
CASES += [(MIXER_CASES["attention"][0], ffn, False) for cases in FFN_CASES.values() for ffn in cases[1:]]


def _gradients(model, run_block, run_head, tokens, documents):
    """Loss and gradients with the given ways to call a block and the head."""
    model.zero_grad()
    context = model._context(tokens, documents, None, None, None)
    x = model.embedding(tokens) * model.embedding_scale
    first, second = model.blocks
    x = second(run_block(first)(x, context)[0], context)[0]
    loss, _ = run_head(model.head)(x.flatten(0, 1), tokens.roll(-1, 1).flatten())
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()} | {"loss": loss.detach()}


@pytest.mark.parametrize("mixer, ffn, packed", FIRST)
def test_full_graph_forward_and_backward(mixer, ffn, packed):
    _check_full_graph(mixer, ffn, packed, "aot_eager")


@pytest.mark.parametrize("mixer, ffn, packed", CASES)
def test_full_graph(mixer, ffn, packed):
    """Tracing the backward pass too takes five times as long, and has one case of each part above."""
    _check_full_graph(mixer, ffn, packed, "eager")


def _check_full_graph(mixer, ffn, packed, backend):
    torch._dynamo.reset()
    model = randomise_(part_model(mixer, ffn)).double()
    tokens = torch.randint(0, 61, (2, 21))
    documents = (torch.arange(21) // 8).expand(2, -1) if packed else None
    eager = _gradients(model, lambda block: block, lambda head: head, tokens, documents)

    def compiled(module):
        return torch.compile(module, fullgraph=True, backend=backend)

    graphs = _gradients(model, compiled, compiled, tokens, documents)
    for name, expected in eager.items():
        assert_close(graphs[name], expected, 1e-10, name)


def test_static_graphs_have_a_graph_for_each_length():
    """By default the second length makes a graph of symbolic sizes, which a run that begins with it would not have."""
    torch._dynamo.reset()
    symbolic = []

    def backend(graph, inputs):
        shapes = [size for x in inputs if isinstance(x, torch.Tensor) for size in x.shape]
        symbolic.append(any(isinstance(size, torch.SymInt) for size in [*shapes, *inputs]))
        return graph.forward

    model = part_model(MIXER_CASES["attention"][0], extra="n_layers: 1")
    model.compile_blocks(backend=backend, dynamic=False)
    for length in (12, 9):
        tokens = torch.randint(0, 61, (2, length))
        model(tokens, targets=tokens)
    assert symbolic == [False] * 4


@torch._dynamo.config.patch(recompile_limit=8)
def test_more_kinds_of_block_than_the_compiler_keeps_by_default():
    torch._dynamo.reset()
    one = part_config(MIXER_CASES["attention"][0])
    kinds = {letter: SwiGLUConfig(hidden=8 + i) for i, letter in enumerate("abcdefghi")}
    blocks = {letter: one.blocks["a"].model_copy(update={"ffn": ffn}) for letter, ffn in kinds.items()}
    model = build_model(one.model_copy(update={"n_layers": 9, "pattern": "abcdefghi", "blocks": blocks}), vocab_size=61)
    tokens = torch.randint(0, 61, (2, 21))
    expected = model(tokens, targets=tokens).nll
    model.compile_blocks(backend="eager")
    assert_close(model(tokens, targets=tokens).nll, expected, 1e-5, "loss")


def test_inference_runs_uncompiled_through_the_same_call():
    """Hooks fire, and no graph is made for another length or mode."""
    torch._dynamo.reset()
    model = randomise_(part_model(MIXER_CASES["gdn"][0]))
    tokens = torch.randint(0, 61, (2, 21))
    expected = model(tokens).logits.detach()
    graphs, runs, fired = [], [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *arguments: runs.append(graph) or graph.forward(*arguments)

    model.compile_blocks(backend=backend)
    model(tokens, targets=tokens).total().backward()
    n_graphs, n_runs = len(graphs), len(runs)
    assert n_graphs > 0 and n_runs == 3, "two blocks and the head"
    model.blocks[0].mixer.register_forward_hook(lambda *_: fired.append(1))
    with torch.no_grad():
        assert_close(model.eval()(tokens).logits, expected, 1e-5)
        state = model.init_state(2)
        pieces = [model(tokens[:, a:b], state=state).logits for a, b in ((0, 9), (9, 10), (10, 21))]
        assert_close(torch.cat(pieces, dim=1), expected, 1e-5)
    assert len(graphs) == n_graphs and len(runs) == n_runs and len(fired) == 4
    model.train()(tokens, targets=tokens).total().backward()
    assert len(runs) == 2 * n_runs, "training runs what was compiled"


GPU_MIXERS = [
    "{type: attention, n_heads: 8}",
    "{type: attention, n_heads: 8, n_kv_heads: 2, window: 40}",
    "{type: mla, n_heads: 8, kv_rank: 64, rope_dim: 32}",
    "{type: gdn, n_heads: 8}",
    "{type: attention, n_heads: 8, n_kv_heads: 4, xsa: true, value_residual: true}",
    "{type: diff_mla, n_heads: 8, kv_rank: 64, rope_dim: 32}",
    "{type: cmd_mla, n_heads: 8, kv_rank: 64, rope_dim: 32}",
    "{type: cmd_mla, n_heads: 8, kv_rank: 192, rope_dim: 32, head_dim: 64}",  # the latent in two slices
    "{type: sdla, n_heads: 8}",
    "{type: mamba2, n_heads: 8}",
]


def _losses_and_gradients(model, batches_NBT, documents, device, dtype):
    """Those of N batches, stacked. The error of a gradient that is one number (the weight of diff_mla's noise: a sum
    over all tokens in which much cancels) varies tenfold from batch to batch; that of the stack does not."""
    on_device = None if documents is None else documents.to(device)
    drawn = []
    for tokens in batches_NBT.to(device):
        model.zero_grad()
        with autocast(device, dtype):
            output = model(tokens[:, :-1], targets=tokens[:, 1:], documents=on_device)
        output.total().backward()
        drawn.append({"loss": output.nll.cpu()} | {name: p.grad.cpu() for name, p in model.named_parameters()})
    return {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mixer", GPU_MIXERS)
def test_compiled_training_on_the_gpu(mixer, packed):
    """bfloat16, the fast kernels, eager, then compiled with mixers recomputed, against float64 on the CPU: no worse
    than twice what bfloat16 autocast itself costs there, over all batches together."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = part_config(mixer).model_copy(update={"dim": 256})
    model = randomise_(build_model(config, vocab_size=1000), scale=0.02)
    tokens = torch.randint(0, 1000, (16, 2, 100))
    documents = (torch.arange(99) // 35).expand(2, -1) if packed else None

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    rounded = _losses_and_gradients(model, tokens, documents, cpu, torch.bfloat16)
    exact_model = build_model(config, vocab_size=1000).double()
    exact_model.load_state_dict(model.state_dict())
    exact = _losses_and_gradients(exact_model, tokens, documents, cpu, torch.float32)
    fast_model = build_model(config, vocab_size=1000, device=gpu)
    fast_model.load_state_dict(model.state_dict())
    eager = _losses_and_gradients(fast_model, tokens, documents, gpu, torch.bfloat16)
    if "value_residual" not in mixer:
        fast_model.recompute("mixer")
    fast_model.compile_blocks()
    compiled = _losses_and_gradients(fast_model, tokens, documents, gpu, torch.bfloat16)
    for name, expected in exact.items():
        bound = max(2 * error_ratio(rounded[name], expected), 5e-3)
        assert_close(eager[name], expected, bound, f"{name}, eager")
        assert_close(compiled[name], expected, bound, f"{name}, compiled")
