"""Steps over a static state: the tokens of a growing one, batch after batch, and CUDA graphs where there are GPUs."""

import pytest
import torch

from fusedlm.data.tokenizer import ByteTokenizer
from fusedlm.generation import generate
from fusedlm.generation.decode import BatchDecoder
from fusedlm.generation.sampling import Sampling
from fusedlm.generation.steps import GrowingSteps, Predictor, Row, StaticSteps, graph_obstacle
from fusedlm.model import build_model
from fusedlm.model.cast_weights import CastWeights
from fusedlm.testing import FFN_CASES, MIXER_CASES, every_mixer_config, part_model, randomise_
from tests.model.test_static_state import HostReads

CPU = torch.device("cpu")
FFN = "{type: swiglu, hidden: 48}"
CASES = [case for cases in MIXER_CASES.values() for case in cases]
PROMPTS = ["It is ", "", "a prompt that is much longer than the others, and than any window", "né"]
GREEDY, SAMPLED = Sampling(12, 0.0, None, None), Sampling(12, 0.9, 40, 0.95)
_SEED = 2  # of weights with which some rows end before others


def _model(mixer, ffn=FFN):
    vocab_size, extra = ByteTokenizer.vocab_size, "tie_embeddings: false"
    model = part_model(mixer, ffn, vocab_size, extra, seed=_SEED).double()
    model = randomise_(model, scale=0.3).eval()
    with torch.no_grad():  # some rows end before others
        model.head.weight[ByteTokenizer().eot_id] *= 4
    return model


def _rows(prompts, seed=0):
    tokenizer = ByteTokenizer()
    return [
        Row(i, [tokenizer.eot_id, *tokenizer.encode(text)], torch.Generator().manual_seed(seed + i))
        for i, text in enumerate(prompts)
    ]


def _until_ended(steps, rows):
    """The tokens of each row up to end-of-text."""
    tokens = list(zip(*steps.run(rows), strict=True))
    eot = ByteTokenizer().eot_id
    return [row[: row.index(eot) + 1] if eot in row else row for row in tokens]


@pytest.mark.parametrize(
    ("case", "sampling"),
    [*((cases[0], GREEDY) for cases in MIXER_CASES.values()), *((case, SAMPLED) for case in CASES)],
)
def test_tokens_are_those_of_a_growing_state(case, sampling, monkeypatch):
    monkeypatch.setattr("fusedlm.generation.steps._LEAST_CAPACITY", 4)  # the state has to grow
    predictor = Predictor(_model(case), ByteTokenizer(), CPU, torch.float32)
    static = StaticSteps(predictor, sampling, len(PROMPTS), graph=False)
    ends = set()
    for prompts in (["x", "", "yz", "a bc"], PROMPTS, PROMPTS[::-1]):
        found = _until_ended(static, _rows(prompts, 3))
        assert found == _until_ended(GrowingSteps(predictor, sampling), _rows(prompts, 3))
        ends |= set(map(len, found))
    assert len(ends) > 1


def test_the_room_of_a_static_state_follows_its_tokens():
    model = _model(MIXER_CASES["attention"][0])
    predictor = Predictor(model, ByteTokenizer(), CPU, torch.float32)
    steps = StaticSteps(predictor, Sampling(10**9, 0.0, None, None), 1, graph=False)
    run = steps.run(_rows(["x" * 250]))
    capacities = []
    for _ in range(12):
        next(run)
        capacities.append(steps.state.capacity)
    assert capacities == [256] * 5 + [512] * 7
    short = StaticSteps(predictor, Sampling(3, 0.0, None, None), 1, graph=False)
    list(short.run(_rows(["x" * 9])))
    assert short.state.capacity == 10 + 2


def test_random_numbers_last_for_any_number_of_tokens(monkeypatch):
    monkeypatch.setattr("fusedlm.generation.steps._DRAWS", 4)
    predictor, sampling = (
        Predictor(_model(CASES[0]), ByteTokenizer(), CPU, torch.float32),
        Sampling(21, 1.0, None, None),
    )
    static = StaticSteps(predictor, sampling, 2, graph=False)
    for prompts in (["a", "b"], ["c", "de"]):
        found = _until_ended(static, _rows(prompts, 7))
        assert found == _until_ended(GrowingSteps(predictor, sampling), _rows(prompts, 7))
        assert max(map(len, found)) > 4
    static.state.make_static(99)
    for _ in range(9):  # beyond the last token
        static.step()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, Sampling(12, 1.0, None, 0.5)], ids=["greedy", "top_k", "top_p"])
def test_a_step_needs_nothing_from_the_device(sampling, monkeypatch):
    monkeypatch.setattr("fusedlm.nn.embedding.check_ids", lambda *_: None)  # on the CPU alone
    predictor = Predictor(_model(CASES[0]), ByteTokenizer(), CPU, torch.float32)
    steps = StaticSteps(predictor, sampling, len(PROMPTS), graph=False)
    next(steps.run(_rows(PROMPTS)))
    with HostReads() as reads:
        steps.step()
    assert not reads.found
    with HostReads() as reads:
        bool(steps.state.lengths_B[0] > 0)
    assert reads.found


def test_logits_that_are_not_finite_are_found_in_any_row():
    model = _model(CASES[0])
    with torch.no_grad():
        model.embedding.weight[ord("n")] = torch.nan
    steps = StaticSteps(Predictor(model, ByteTokenizer(), CPU, torch.float32), GREEDY, 4, graph=False)
    first = next(steps.run(_rows(PROMPTS)))
    assert [token < 0 for token in first] == [False, False, True, True]


def test_why_there_is_no_graph():
    model = _model(CASES[0])
    assert graph_obstacle(model, CPU, torch.float32) == "needs a CUDA device, not cpu"
    routed, cuda = _model(CASES[0], FFN_CASES["routed"][0]), torch.device("cuda")
    assert graph_obstacle(routed, cuda, torch.bfloat16) == "blocks.0.ffn (RoutedFFN) waits for the device"
    with pytest.raises(ValueError, match="cuda_graph=True: needs a CUDA device"):
        generate(model, ByteTokenizer(), "x", device="cpu", cuda_graph=True)
    options = {"device": "cpu", "dtype": "float32", "max_tokens": 5}
    without = generate(model, ByteTokenizer(), "x", cuda_graph=False, **options)
    assert without == generate(model, ByteTokenizer(), "x", **options)


def _bfloat16_logits(model, predictor):
    state = model.init_state(2)
    tokens = torch.arange(14).view(2, 7)
    return [predictor.logits(part, state) for part in tokens.split([4, 1, 1, 1], dim=1)]


@pytest.mark.parametrize("tie", ["true", "false"])
def test_weights_cast_once_give_the_logits_of_autocast(tie, monkeypatch):
    model = build_model(every_mixer_config(tie_embeddings=tie == "true"), vocab_size=ByteTokenizer.vocab_size, seed=0)
    model = randomise_(model, scale=0.3).eval()
    own = {name: parameter for name, parameter in model.named_parameters()}
    predictor = Predictor(model, ByteTokenizer(), CPU, torch.bfloat16)
    cast = _bfloat16_logits(model, predictor)
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    with predictor._weights.in_use():
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}
    assert dtypes["head.weight"] == torch.bfloat16 and dtypes["embedding.weight"] == torch.float32
    matrices = [name for name in dtypes if name.endswith((".out.weight", ".down.weight", "q_up.weight"))]
    assert matrices and all(dtypes[name] == torch.bfloat16 for name in matrices)
    kept = [name for name in dtypes if "norm" in name or "conv" in name]
    assert kept and all(dtypes[name] == torch.float32 for name in kept)
    monkeypatch.setattr(predictor, "_weights", CastWeights(model, torch.float32))
    for found, expected in zip(cast, _bfloat16_logits(model, predictor), strict=True):
        assert torch.equal(found, expected)


def test_routers_stay_in_their_precision():
    model = part_model(CASES[0], FFN_CASES["routed"][0]).eval()
    with CastWeights(model, torch.bfloat16).in_use():
        dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    routers = {name: dtype for name, dtype in dtypes.items() if "router" in name}
    assert set(routers.values()) == {torch.float32} and torch.bfloat16 in dtypes.values()


@pytest.mark.parametrize(
    "mixer, backend", [("attention", "aot_eager"), ("cmd_mla", "eager"), ("gdn", "eager"), ("sdla", "aot_eager")]
)
def test_compiled_steps_have_the_same_tokens(mixer, backend):
    model = _model(MIXER_CASES[mixer][0])
    predictor = Predictor(model, ByteTokenizer(), CPU, torch.float32)
    expected = list(StaticSteps(predictor, SAMPLED, len(PROMPTS), graph=False).run(_rows(PROMPTS)))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    steps = StaticSteps(predictor, SAMPLED, len(PROMPTS), graph=False, compilation={"backend": backend})
    assert list(steps.run(_rows(PROMPTS))) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # a block, the head, the draw
    assert all(part._compiled_call_impl is None for part in (*model.blocks, model.head))
    model.compile_steps(None)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("case", [*(cases[0] for cases in MIXER_CASES.values()), MIXER_CASES["attention"][3]])
def test_graphs_have_the_tokens_of_a_growing_state(case, sampling, monkeypatch):
    monkeypatch.setattr("fusedlm.generation.steps._LEAST_CAPACITY", 8)
    predictor = Predictor(_model(case).float().cuda(), ByteTokenizer(), torch.device("cuda"), torch.float32)
    sampling = Sampling(40, sampling.temperature, sampling.top_k, sampling.top_p)
    static = StaticSteps(predictor, sampling, len(PROMPTS), graph=True)
    for prompts in (["x", "", "yz", "a bc"], PROMPTS):
        found = _until_ended(static, _rows(prompts, 3))
        assert found == _until_ended(GrowingSteps(predictor, sampling), _rows(prompts, 3))
    assert static.reason is None and static.graphed > 40


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_graph_waits_for_nothing(temperature):
    model = build_model(every_mixer_config(tie_embeddings=False), vocab_size=ByteTokenizer.vocab_size, seed=0)
    model = randomise_(model, scale=0.3).cuda().eval()
    predictor = Predictor(model, ByteTokenizer(), torch.device("cuda"), torch.bfloat16)
    steps = StaticSteps(predictor, Sampling(99, temperature, None, None), len(PROMPTS), graph=True)
    run = steps.run(_rows(PROMPTS))
    for _ in range(5):
        next(run)
    assert steps.graphed > 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            steps.step()
            steps._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_generate_runs_graphs(monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    model = _model(CASES[0]).float().cuda()
    options = {"max_tokens": 30, "temperature": 0, "dtype": "float32"}
    without = generate(model, ByteTokenizer(), PROMPTS, cuda_graph=False, **options)
    assert not replays
    assert generate(model, ByteTokenizer(), PROMPTS, **options) == without
    assert len(replays) > 20
    assert generate(model, ByteTokenizer(), PROMPTS, cuda_graph=True, **options) == without
    routed = _model(CASES[0], FFN_CASES["routed"][0]).float().cuda()
    texts = generate(routed, ByteTokenizer(), PROMPTS, **options)
    assert texts == generate(routed, ByteTokenizer(), PROMPTS, cuda_graph=False, **options)
    with pytest.raises(ValueError, match="waits for the device"):
        generate(routed, ByteTokenizer(), PROMPTS, cuda_graph=True, **options)


@pytest.mark.gpu
def test_batches_of_one_size_share_a_graph():
    model = _model(CASES[0]).float().cuda()
    decoder = BatchDecoder(model, ByteTokenizer(), GREEDY, torch.device("cuda"), torch.float32)
    captured = []
    for prompts in (PROMPTS, PROMPTS[::-1], PROMPTS[:1]):
        list(decoder.decode(_rows(prompts)))
        captured.append(decoder._static._graph)
    assert captured[0] is captured[1] is not None and captured[2] is not captured[1]
    assert decoder.graphed_steps > 10
