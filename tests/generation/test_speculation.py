"""Speculative decoding: greedy texts are those of plain decoding, whatever is drafted; drafts are those of the
definition."""

import pytest
import torch

from fusedlm.data.tokenizer import ByteTokenizer
from fusedlm.generation import Speculation, generate
from fusedlm.generation.sampling import Sampling
from fusedlm.generation.speculation import SpeculativeSteps
from fusedlm.generation.steps import GrowingSteps, Predictor
from fusedlm.model import build_model
from fusedlm.nn.context import Context
from fusedlm.testing import MIXER_CASES, every_mixer_config, part_model, randomise_, wired_config
from tests.generation.test_static import CPU, PROMPTS, _rows
from tests.model.test_static_state import HostReads

CASES = [cases[0] for cases in MIXER_CASES.values()]
CASES += [MIXER_CASES["attention"][3], MIXER_CASES["attention"][5], MIXER_CASES["mla"][3], MIXER_CASES["gdn"][1]]
GREEDY = Sampling(40, 0.0, None, None)
_SEED = 2  # of weights with which some rows end before others


def _model(case=None, depth=1, dtype=torch.float32, config=None):
    if config is None:
        model = part_model(case, vocab_size=257, extra=f"tie_embeddings: false, mtp: {{depth: {depth}}}", seed=_SEED)
    else:
        model = build_model(config, vocab_size=257, seed=_SEED)
    return randomise_(model.to(dtype), scale=0.3).eval()


class Guided(SpeculativeSteps):
    """Drafts are those of the given texts, but for some places of some rows: rows then keep any number of them."""

    texts: list[list[int]] = []

    def _draft(self, *arguments):
        carried = super()._draft(*arguments)
        for row, text in enumerate(self.texts):
            for j in range(self._n_drafts):
                at = int(self._n_made_B[row]) + j
                token = text[at] if at < len(text) else 0
                self._drafts_BK[row, j] = (token + (at * (row + 1) % (row + 3) == 1)) % 257
        if self._draft_p_BKV is not None:  # as if they had been drawn from a distribution that is certain
            self._draft_p_BKV.zero_().scatter_(2, self._drafts_BK[..., None], 1.0)
        return carried


def _check_greedy(model, n_drafts):
    predictor = Predictor(model, None, CPU, torch.float32)
    texts = _until(predictor, GrowingSteps(predictor, GREEDY), PROMPTS)
    # Some rows end before others: at the token that first appears as late in one of them as any.
    predictor.eot_id = max((text.index(token), token) for text in texts for token in text)[1]
    expected = _until(predictor, GrowingSteps(predictor, GREEDY), PROMPTS)
    speculation = Speculation(n_drafts)
    steps = Guided(predictor, GREEDY, len(PROMPTS), speculation, graph=False)
    for order in (slice(None), slice(None, None, -1)):  # of another batch in the same memory
        steps.texts = expected[order]
        assert _until(predictor, steps, PROMPTS[order]) == expected[order]
    return expected, speculation


def _until(predictor, steps, prompts):
    """The tokens of each row up to the one that ends it."""
    texts = [list(text) for text in zip(*steps.run(_rows(prompts)), strict=True)]
    end = predictor.eot_id
    return [text[: text.index(end) + 1] if end in text else text for text in texts]


@pytest.mark.parametrize("case", CASES)
def test_greedy_texts_are_those_of_plain_decoding(case):
    _, speculation = _check_greedy(_model(case), 3)
    assert 0.2 < speculation.acceptance()[2] < speculation.acceptance()[0] < 1


@pytest.mark.parametrize(("depth", "n_drafts"), [(1, 1), (2, 2), (2, 5), (3, 2)])
def test_of_any_depth_and_number_of_drafts(depth, n_drafts):
    for case in (MIXER_CASES["gdn"][0], MIXER_CASES["attention"][3]):
        expected, speculation = _check_greedy(_model(case, depth), n_drafts)
        assert speculation.acceptance()[-1] > 0.1
        assert len({len(text) for text in expected}) > 1, "some rows end before others"


@pytest.mark.parametrize(
    "config",
    [
        every_mixer_config(mtp={"depth": 2, "block": "g"}, tie_embeddings=False),
        wired_config("avg", mtp={"depth": 2, "block": "v"}),
    ],
    ids=["every mixer", "wired"],
)
def test_of_models_with_several_mixers(config):
    _check_greedy(_model(config=type(config).model_validate(config.model_dump())), 3)


def test_the_state_grows_with_the_tokens(monkeypatch):
    monkeypatch.setattr("fusedlm.generation.steps._LEAST_CAPACITY", 4)
    model = _model(MIXER_CASES["mla"][0], 2)
    predictor, sampling = Predictor(model, None, CPU, torch.float32), Sampling(150, 0.0, None, None)
    steps = SpeculativeSteps(predictor, sampling, 1, Speculation(2), graph=False)
    capacities = set()
    found = []
    for tokens in steps.run(_rows(["a"])):
        found += tokens
        capacities.add(steps.state.capacity)
    assert found == [t for step in GrowingSteps(predictor, sampling).run(_rows(["a"])) for t in step]
    assert len(capacities) > 2


def _drafts_by_definition(model, tokens, n_drafts):
    """Greedy drafts after tokens, the last of which the model has not read: modules run over all positions, without a
    state; beyond the last module its output stands for that of the one before at the next position."""
    tokens, depth, drafts = list(tokens), len(model.mtp), []

    def run(k, hidden, following):
        context = Context(torch.arange(hidden.shape[1])[None])
        context.add_rope(model.rope_specs, torch.float64)
        embedded = model.embedding(torch.tensor([following])) * model.embedding_scale
        return model.mtp[k - 1](hidden, embedded, context)[0]

    h = model(torch.tensor([tokens[:-1]]), hidden=True).hidden
    n = h.shape[1]
    for k in range(1, n_drafts + 1):
        if k <= depth:
            inputs, following = h, (tokens + drafts)[k : n + k]
        else:
            inputs, following = torch.cat([inputs, h[:, -1:]], dim=1), (tokens + drafts)[depth : n + k]
        h = run(min(k, depth), inputs, following)
        drafts.append(int(model.head(h)[0, -1].argmax()))
    return drafts


@pytest.mark.parametrize("case", [MIXER_CASES["mla"][0], MIXER_CASES["gdn"][0], MIXER_CASES["attention"][3]])
@pytest.mark.parametrize(("depth", "n_drafts"), [(1, 3), (3, 3), (2, 4)])
@torch.no_grad()
def test_drafts_are_those_of_the_definition(case, depth, n_drafts):
    """After any number of kept drafts; so the states of the modules hold what they would have read of the text."""
    model = _model(case, depth, torch.float64)
    prompts = [text for text in PROMPTS if len(text) > 2]
    predictor = Predictor(model, None, CPU, torch.float32)
    sampling = Sampling(20, 0.0, None, None)
    expected = [list(text) for text in zip(*GrowingSteps(predictor, sampling).run(_rows(prompts)), strict=True)]
    checked = []

    class Checked(Guided):
        def _draft(self, *arguments):
            carried = SpeculativeSteps._draft(self, *arguments)
            for row, text in enumerate(expected):
                made = int(self._n_made_B[row])
                if made < sampling.max_tokens:
                    ids = _rows(prompts)[row].ids + text[:made]
                    assert self._drafts_BK[row].tolist() == _drafts_by_definition(model, ids, n_drafts), (row, made)
                    checked.append(made)
            for row, text in enumerate(expected):
                for j in range(n_drafts):
                    at = int(self._n_made_B[row]) + j
                    wrong = at * (row + 1) % 4 == 1
                    self._drafts_BK[row, j] = ((text[at] if at < len(text) else 0) + wrong) % 257
            return carried

    steps = Checked(predictor, sampling, len(prompts), Speculation(n_drafts), graph=False)
    steps.texts = expected
    found = [list(text) for text in zip(*steps.run(_rows(prompts)), strict=True)]
    assert found == expected and len(set(checked)) > 6


@torch.no_grad()
def test_sampled_tokens_have_the_probabilities_of_the_model():
    """Of two tokens after a prompt, over many seeds; the rule itself has its tests in test_acceptance.py."""
    torch.manual_seed(0)
    model = part_model(MIXER_CASES["gdn"][0], vocab_size=4, extra="tie_embeddings: false, mtp: {depth: 1}").double()
    model = randomise_(model, scale=0.2).eval()
    rows, sampling = 2500, Sampling(3, 1.0, None, None)
    predictor = Predictor(model, None, CPU, torch.float32)
    steps = SpeculativeSteps(predictor, sampling, rows, Speculation(1), graph=False)
    prompts = [row.__class__(i, [1, 2], torch.Generator().manual_seed(i)) for i, row in enumerate(_rows([""]) * rows)]
    texts = torch.tensor(list(steps.run(prompts)))
    counts = torch.bincount(texts[0] * 16 + texts[1] * 4 + texts[2], minlength=64)
    every = torch.cartesian_prod(*[torch.arange(4)] * 3)
    log_p = model(torch.cat([torch.tensor([[1, 2]]).expand(64, -1), every[:, :2]], dim=1)).logits.log_softmax(-1)
    exact = log_p[:, 1:].gather(2, every[..., None])[..., 0].sum(1).exp() * rows
    assert exact.sum().item() == pytest.approx(rows)
    statistic = ((counts - exact) ** 2 / exact).sum()
    p_value = torch.special.gammaincc(torch.tensor(31.5).double(), statistic / 2).item()
    assert p_value > 0.01 and 0.2 < steps._speculation.acceptance()[0] < 0.95


def test_sampled_text_of_a_prompt_does_not_depend_on_the_others():
    model = _model(MIXER_CASES["mamba2"][0], 2)
    options = {"max_tokens": 40, "temperature": 0.9, "top_p": 0.9, "seed": 5, "speculate": 2, "device": "cpu"}
    together = generate(model, ByteTokenizer(), PROMPTS, **options)
    assert together == generate(model, ByteTokenizer(), PROMPTS, batch_size=1, **options)
    assert len(set(together)) == len(PROMPTS)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(40, 0.9, 40, 0.95)], ids=["greedy", "sampled"])
def test_a_step_needs_nothing_from_the_device(sampling, monkeypatch):
    monkeypatch.setattr("fusedlm.nn.embedding.check_ids", lambda *_: None)  # on the CPU alone
    model = _model(config=every_mixer_config(mtp={"depth": 2}, tie_embeddings=False))
    predictor = Predictor(model, ByteTokenizer(), CPU, torch.float32)
    steps = SpeculativeSteps(predictor, sampling, len(PROMPTS), Speculation(3), graph=False)
    next(steps.run(_rows(PROMPTS)))
    addresses = [t.data_ptr() for s in (steps.state, *steps._draft_states) for p in s.parts() for t in p.tensors()]
    with HostReads() as reads:
        steps.step()
    assert not reads.found
    after = [t.data_ptr() for s in (steps.state, *steps._draft_states) for p in s.parts() for t in p.tensors()]
    assert after == addresses


def test_generate_counts_and_refuses():
    model, tokenizer = _model(CASES[0]), ByteTokenizer()
    speculation = Speculation(2)
    options = {"max_tokens": 30, "temperature": 0.0, "device": "cpu"}
    plain = generate(model, tokenizer, PROMPTS, **options)
    assert generate(model, tokenizer, PROMPTS, speculate=speculation, **options) == plain
    assert generate(model, tokenizer, PROMPTS[0], speculate=1, **options) == plain[0]
    assert "".join(generate(model, tokenizer, PROMPTS[0], speculate=4, stream=True, **options)) == plain[0]
    assert speculation.steps > 0 and len(speculation.acceptance()) == 2
    assert len(generate(model, tokenizer, "a", speculate=3, **options | {"max_tokens": 1})) <= 1
    with pytest.raises(ValueError, match="speculate=0 must be an integer from 1 to 32"):
        generate(model, tokenizer, "a", speculate=0, **options)
    with pytest.raises(ValueError, match="speculate=2: the model has no multi-token prediction"):
        generate(part_model(CASES[0], vocab_size=257), tokenizer, "a", speculate=2, **options)
    with torch.no_grad():
        model.mtp[0].project.weight.fill_(torch.nan)
        assert generate(model, tokenizer, PROMPTS, speculate=2, **options) == plain  # no draft is kept
        model.head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        generate(model, tokenizer, "a", speculate=2, **options)
