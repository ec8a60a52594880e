"""Multi-token prediction in training: the loss by its definition, documents, the account, and what does not change."""

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from fusedlm.config.model import ModelConfig, MTPConfig
from fusedlm.model import build_model
from fusedlm.model.accounting import count_parameters, forward_flops, state_bytes, training_flops_per_token
from fusedlm.model.layer_metrics import end_step
from fusedlm.model.memory import activation_bytes
from fusedlm.nn.context import Context
from fusedlm.nn.module import roles
from fusedlm.testing import FFN_CASES, MIXER_CASES, assert_close, part_config, part_model, randomise_, wired_config
from tests.laws.models import VOCAB, some_tokens

CASES = [cases[-1] for cases in MIXER_CASES.values()]
DEEP = "mtp: {depth: 3, weight: 0.7, depth_weights: [1.0, 0.5, 2.0]}, logit_softcap: 5.0"


def _model(mixer=CASES[0], extra=DEEP, **options):
    torch.manual_seed(0)
    return randomise_(part_model(mixer, vocab_size=VOCAB, extra=extra, **options)).double().train()


def _norm(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def _defined(model, tokens, targets, documents, n_targets):
    """() the loss of the modules and [(nll, targets) of each], document by document, from the definition."""
    total, sums = 0.0, [[0.0, 0] for _ in model.mtp]
    for row in range(len(tokens)):
        for number in documents[row].unique().tolist():
            inside = documents[row] == number
            own, following = tokens[row][inside], targets[row][inside]
            h = model(own[None], hidden=True).hidden
            for k, module in enumerate(model.mtp, 1):
                n = len(own) - k  # places whose token k later is in the document
                if n < 1:
                    break
                embedded = model.embedding.weight[own[k:]][None] * model.embedding_scale
                joined = torch.cat([_norm(h[:, :n], module.hidden_norm), _norm(embedded, module.token_norm)], -1)
                context = Context(torch.arange(n)[None])
                context.add_rope(model.rope_specs, torch.float64)
                if model.value_table is not None:
                    context.value_rows_BTW = model.value_table(own[k:])[None]
                h, _ = module.block(joined @ module.project.weight.T, context)
                logits = _norm(h[0], model.head.norm) @ model.head.weight.T
                if model.head.cap is not None:
                    logits = model.head.cap * torch.tanh(logits / model.head.cap)
                log_p, valid = logits[:, : model.vocab_size].log_softmax(-1), following[k:] != -100
                nll = -log_p[torch.arange(n), following[k:].clamp(min=0)][valid].sum()
                total = total + nll / n_targets * model.mtp_weight * model.mtp_factors[k - 1]
                sums[k - 1][0] += nll.item()
                sums[k - 1][1] += int(valid.sum())
    return total, sums


def _batch(n=19):
    tokens, targets = some_tokens(3, n), some_tokens(3, n, seed=7)
    documents = torch.zeros(3, n, dtype=torch.int64)
    documents[0, 6:], documents[0, 8:], documents[0, 9:], documents[1, 1:] = 1, 2, 3, 1
    targets[1, 4], targets[2, -1] = -100, -100
    return tokens, targets, documents


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_and_every_gradient_are_those_of_the_definition(case, packed):
    model, (tokens, targets, documents) = _model(case), _batch()
    documents = documents if packed else torch.zeros_like(documents)
    output = model(tokens, targets=targets, documents=documents if packed else None)
    n_targets = int((targets != -100).sum())
    expected, sums = _defined(model, tokens, targets, documents, n_targets)
    assert_close(output.losses["mtp"], expected, 1e-10)
    assert_close(output.metrics["mtp"], torch.tensor(sums, dtype=torch.float64), 1e-10)
    figures = model.summarise(output.metrics)
    assert figures["mtp_loss"] == pytest.approx([nll / n for nll, n in sums])
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(output.losses["mtp"], parameters, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
    for name, a, b in zip(names, found, wanted, strict=True):
        assert_close(a, b, 1e-8, name)
    assert any(gradient.abs().sum() > 0 for gradient in found)


def test_value_embeddings_are_those_of_the_later_token():
    torch.manual_seed(0)
    config = wired_config("v", unet_skips=False, logit_rescale=None, mtp=MTPConfig(depth=2))
    model = build_model(config, vocab_size=VOCAB)
    model, (tokens, targets, documents) = randomise_(model).double().train(), _batch()
    for block in model.all_blocks():  # norms of deeper layers are scaled, which the definition above leaves out
        block.mixer_norm.scale = block.ffn_norm.scale = None
    output = model(tokens, targets=targets, documents=documents)
    expected, _ = _defined(model, tokens, targets, documents, int((targets != -100).sum()))
    assert_close(output.losses["mtp"], expected, 1e-10)


def test_no_module_predicts_across_the_end_of_a_document():
    """Nothing of another document changes the loss of one; without documents, it does."""
    model, (tokens, targets, documents) = _model(), _batch()
    targets[0, :6] = targets[1:] = -100  # of the document that begins at place 9 alone
    targets[0, 6:9] = -100
    other = tokens.clone()
    other[0, :9] = (other[0, :9] + 1) % VOCAB
    losses = [model(x, targets=targets, documents=documents).losses["mtp"] for x in (tokens, other)]
    assert torch.equal(*losses)
    losses = [model(x, targets=targets).losses["mtp"] for x in (tokens, other)]
    assert not torch.equal(*losses)
    first = targets.clone()
    first[0], first[0, 5] = -100, 3  # the last target of the first document: for no module is there a place before
    counts = model(tokens, targets=first, documents=documents).metrics["mtp"][:, 1].tolist()
    assert counts == [1, 1, 1]
    first[0, 5], first[0, 6] = -100, 3  # the first of the next document: only the model itself predicts it
    assert model(tokens, targets=first, documents=documents).metrics["mtp"][:, 1].tolist() == [0, 0, 0]


def test_rows_shorter_than_the_depth_have_no_further_targets():
    model, tokens = _model(), some_tokens(2, 2)
    output = model(tokens, targets=tokens)
    assert output.metrics["mtp"][:, 1].tolist() == [2, 0, 0]
    assert model.summarise(output.metrics)["mtp_loss"][1:] == [None, None]
    assert torch.isfinite(output.total())


@pytest.mark.parametrize("extra", ["mtp: {depth: 0}", "mtp: null"])
def test_depth_zero_is_the_model_without_it_bit_for_bit(extra):
    config = part_config(MIXER_CASES["gdn"][0])
    without = part_config(MIXER_CASES["gdn"][0], extra=extra)
    plain, none = (build_model(one, vocab_size=VOCAB, seed=3) for one in (config, without))
    assert plain.state_dict().keys() == none.state_dict().keys()
    tokens, targets, documents = _batch()
    outputs = [m.train()(tokens, targets=targets, documents=documents) for m in (plain, none)]
    assert outputs[0].losses.keys() == outputs[1].losses.keys() == {"nll"}
    for output in outputs:
        output.total().backward()
    for a, b in zip(plain.parameters(), none.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a.grad, b.grad)


def test_the_model_itself_is_that_without_modules():
    """Its own weights, loss and logits; in evaluation and decoding no module runs."""
    plain, deep = (
        build_model(part_config(CASES[1], extra=extra), vocab_size=VOCAB, seed=3) for extra in ("", "mtp: {depth: 2}")
    )
    tokens, targets, _ = _batch()
    losses = [model.train()(tokens, targets=targets).losses for model in (plain, deep)]
    assert torch.equal(losses[0]["nll"], losses[1]["nll"]) and losses[1]["mtp"] > 0

    def refuse(*_):
        raise AssertionError("a module ran")

    for module in deep.mtp:
        module.register_forward_pre_hook(refuse)
    with torch.no_grad():
        assert torch.equal(plain.eval()(tokens).logits, deep.eval()(tokens).logits)
        assert deep(tokens, targets=targets).losses.keys() == {"nll"}
        deep(tokens, state=deep.init_state(3))
    with pytest.raises(AssertionError, match="a module ran"):
        deep.train()(tokens, targets=targets)


def test_the_weight_of_the_loss_can_change():
    model, (tokens, targets, _) = _model(), _batch()
    before = model(tokens, targets=targets).losses["mtp"]
    address = model.mtp_weight.data_ptr()
    model.set_mtp_weight(0.35)
    assert_close(model(tokens, targets=targets).losses["mtp"], before / 2, 1e-6)
    assert model.mtp_weight.data_ptr() == address
    model.set_mtp_weight(0.0)
    output = model(tokens, targets=targets)
    output.total().backward()
    assert output.losses["mtp"] == 0
    assert all(p.grad.abs().sum() == 0 for p in model.mtp.parameters() if p.grad is not None)


def test_the_weight_by_step():
    config = MTPConfig(weight=0.3, final_weight=0.1, final_from=0.68)
    assert [config.weight_at(step, 100) for step in (0, 67, 68, 99)] == [0.3, 0.3, 0.1, 0.1]
    assert MTPConfig(weight=0.3, final_weight=None).weight_at(99, 100) == 0.3


def test_micro_batches_add_up_to_the_batch():
    model, (tokens, targets, documents) = _model(), _batch()
    weight = (targets != -100).sum().double().reciprocal()
    full = model(tokens, targets=targets, documents=documents, loss_weight=weight)
    full.total().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    counts = 0
    for row in range(3):
        one = slice(row, row + 1)
        output = model(tokens[one], targets=targets[one], documents=documents[one], loss_weight=weight)
        output.total().backward()
        counts = counts + output.metrics["mtp"]
    assert_close(counts, full.metrics["mtp"], 1e-12)
    for (name, p), gradient in zip(model.named_parameters(), expected, strict=True):
        assert_close(p.grad, gradient, 1e-9, name)


def test_a_selection_of_targets():
    model, (tokens, targets, documents) = _model(), _batch()
    select = torch.tensor([3, 20, 21, 40])
    chosen = torch.full_like(targets, -100)
    chosen.view(-1)[select] = targets.view(-1)[select]
    full = model(tokens, targets=chosen, documents=documents)
    part = model(tokens, targets=targets.view(-1)[select], documents=documents, select=select)
    assert_close(part.losses["mtp"], full.losses["mtp"], 1e-12)
    assert full.losses["mtp"] > 0


def test_compiled_in_full_graphs():
    torch._dynamo.reset()
    model, (tokens, targets, documents) = _model(MIXER_CASES["gdn"][0]), _batch()
    expected = model(tokens, targets=targets, documents=documents)
    model.compile_blocks(backend="aot_eager")
    found = model(tokens, targets=targets, documents=documents)
    assert_close(found.total(), expected.total(), 1e-10)
    found.total().backward()


def test_reports_of_the_block_come_with_those_of_the_layers():
    """In training those of the module too; in evaluation those of the layers alone."""
    torch.manual_seed(0)
    model = part_model(MIXER_CASES["attention"][0], FFN_CASES["routed"][0], VOCAB, "mtp: {depth: 1}").train()
    tokens, targets, _ = _batch()
    output = model(tokens, targets=targets)
    assert len(output.metrics["routed"]) == 3 and len(model.summarise(output.metrics)["routed_layers"]) == 3
    end_step(model, output.metrics, torch.tensor(True))
    output = model.eval()(tokens, targets=targets)
    assert len(output.metrics["routed"]) == 2 and len(model.summarise(output.metrics)["routed_layers"]) == 2


def test_experts_of_a_module_are_balanced_too():
    torch.manual_seed(0)
    model = part_model(MIXER_CASES["attention"][0], FFN_CASES["moe"][0], VOCAB, "mtp: {depth: 1}").train()
    tokens, targets, _ = _batch()
    output = model(tokens, targets=targets)
    name = model.blocks[0].ffn.metric
    assert len(output.metrics[name]) == 3 and model.summarise(output.metrics)
    before = {key: value.clone() for key, value in model.mtp.state_dict().items()}
    end_step(model, output.metrics, torch.tensor(True))
    assert any(not torch.equal(value, before[key]) for key, value in model.mtp.state_dict().items())
    model.eval()
    assert model.summarise(model(tokens, targets=targets).metrics)


def test_every_parameter_has_its_role_and_its_rate():
    model = part_model(CASES[0], vocab_size=VOCAB, extra="mtp: {depth: 2}, mup: {base_width: 16, base_depth: 1}")
    found = {name: role for name, role in roles(model).items() if name.startswith("mtp.")}
    assert found["mtp.0.project.weight"].kind == "matrix" and found["mtp.1.hidden_norm.weight"].kind == "gain"
    growth = model.mup.growth
    assert growth["mtp.0.project.weight"].fan_in == 2 and not growth["mtp.0.project.weight"].in_block
    assert growth["mtp.1.block.mixer.out.weight"].in_block
    assert model.mtp[1].block.branch_scale == model.blocks[0].branch_scale == 0.5


def test_the_start():
    model = part_model(CASES[0], vocab_size=VOCAB, extra="mtp: {depth: 2}").train()
    tokens, targets, _ = _batch()
    losses = model.summarise(model(tokens, targets=targets).metrics)["mtp_loss"]
    assert losses == pytest.approx([torch.tensor(VOCAB).log().item()] * 2, rel=0.05)


def test_the_account():
    case = "{type: attention, n_heads: 4}"
    plain, deep = (part_model(case, vocab_size=VOCAB, extra=extra) for extra in ("", "mtp: {depth: 2}"))
    count, before = count_parameters(deep), count_parameters(plain)
    assert count.mtp == sum(p.numel() for p in deep.mtp.parameters()) == count.total - before.total > 0
    assert before.mtp == 0 and count.active - before.active == count.mtp
    assert forward_flops(deep, 16) == forward_flops(plain, 16)
    assert state_bytes(deep, 16, torch.float32) == state_bytes(plain, 16, torch.float32)
    tokens = some_tokens(3, 16)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        deep.train()(tokens, targets=tokens)
    assert 3 * counter.get_total_flops() == 3 * 16 * training_flops_per_token(deep, 16)
    assert any(name.startswith("mtp.") for name in deep.explain("cpu", torch.float32))
    four = build_model(part_config(case).model_copy(update={"n_layers": 4}), vocab_size=VOCAB, device="meta")
    sizes = [activation_bytes(model, 64, torch.float32) for model in (plain, four, deep)]
    assert sizes[0] < sizes[1] < sizes[2] == sizes[1] + 64 * 2 * 5 * 32 * 4


def test_a_block_of_another_letter():
    blocks = {
        "a": "{mixer: {type: attention, n_heads: 2}, ffn: {type: swiglu, hidden: 32}}",
        "g": "{mixer: {type: gdn, n_heads: 2}, ffn: {type: relu2, hidden: 32}}",
    }
    tree = {"dim": 32, "n_layers": 2, "pattern": "ag", "blocks": {k: yaml.safe_load(v) for k, v in blocks.items()}}
    for block, mixer in ((None, "GatedDeltaNet"), ("a", "Attention")):
        config = ModelConfig.model_validate(tree | {"mtp": {"block": block}})
        model = build_model(config, vocab_size=VOCAB, device="meta")
        assert type(model.mtp[0].block.mixer).__name__ == mixer
    with pytest.raises(ValueError, match="mtp.block='x': no such block; blocks has"):
        ModelConfig.model_validate(tree | {"mtp": {"block": "x"}})
    with pytest.raises(ValueError, match=r"depth_weights=\[1.0\]: needs depth=2 numbers"):
        MTPConfig(depth=2, depth_weights=[1.0])
