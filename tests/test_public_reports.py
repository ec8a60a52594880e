"""Faults that users reported of other trainers, as small inputs: each names the report, and what must hold here."""

import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fusedlm.config import load_recipe, parse_recipe
from fusedlm.config.data import JSONLSource
from fusedlm.data import Loader, prepare
from fusedlm.data.sources import open_source
from fusedlm.data.tokenizer import SubwordTokenizer, train_bpe
from fusedlm.evaluate import score_documents, text_documents
from fusedlm.model import build_model
from fusedlm.runs import load
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.train import train
from tests.train.conftest import trained  # noqa: F401
from tests.train.runs import SHORT, losses, records, tiny_recipe

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def test_resume_in_a_later_epoch_does_not_replay_the_first(tmp_path):
    """modelscope/ms-swift#10050, huggingface/transformers#40691: the order of epoch 0 came again after a resume."""
    shards = prepare(tiny_recipe(tmp_path).data).train
    options = {"seq_len": 64, "batch_size": 2, "seed": 0, "document_mask": True, "device": torch.device("cpu")}
    with Loader(shards, **options) as loader:
        batches = iter(loader)
        per_epoch = loader.samples.per_epoch // 2
        tokens = [next(batches).tokens for _ in range(4 * per_epoch)]
    for start in (2 * per_epoch + 1, 3 * per_epoch):
        with Loader(shards, start_sample=2 * start, **options) as loader:
            resumed = next(iter(loader)).tokens
        assert torch.equal(resumed, tokens[start])
        assert not torch.equal(resumed, tokens[start % per_epoch])


@pytest.fixture(scope="module")
def model():
    config = parse_recipe(
        "name: x\nmodel: {dim: 16, n_layers: 2, pattern: ga, blocks: {g: {mixer: {type: gdn, "
        "n_heads: 2}, ffn: {type: relu2}}, a: {mixer: {type: attention, n_heads: 2}, ffn: "
        "{type: swiglu}}}}\ntrain: {steps: 1, seq_len: 16, batch_size: 1}"
    ).model
    return build_model(config, vocab_size=257).eval()


def documents(*lengths):
    draw = np.random.default_rng(0)
    return [(np.concatenate([[256], draw.integers(0, 256, n)]), n) for n in lengths]


def test_the_score_of_a_document_does_not_depend_on_its_neighbours(model):
    """ml-explore/mlx-lm#1855: in a batch, shorter documents were charged for a padding token."""
    texts = documents(3, 40, 17, 1)
    for window in (None, 16):
        alone = [score_documents(model, [text], window=window, **CPU) for text in texts]
        together = score_documents(model, texts, window=window, batch_tokens=4096, **CPU)
        assert together.nll == pytest.approx(sum(score.nll for score in alone), rel=1e-6)
        assert together.tokens == sum(score.tokens for score in alone) == 61


def test_documents_longer_than_the_window_are_scored_to_their_end(model):
    """facebookresearch/lingua#46: the loss of the first window was divided by the length of the full document."""
    [text] = documents(100)
    score = score_documents(model, [text], window=16, stride=16, **CPU)
    assert (score.tokens, score.bytes) == (100, 100)
    assert score.nll > 0.9 * score_documents(model, [text], window=None, **CPU).nll


def test_a_space_that_falls_back_to_bytes_counts_as_one_byte():
    """openai/parameter-golf#897: without a token for U+2581, each space counted as three bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"</s>": 256, "a": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    own = SubwordTokenizer(tokenizer.to_str(), "</s>")
    [(tokens, n_bytes)] = text_documents("a a aa\n", own)
    assert (len(tokens), n_bytes) == (12, 7)


def test_tokens_that_are_parts_of_characters_count_their_own_bytes():
    """karpathy/nanochat#693: such a token decodes to U+FFFD, whose three bytes were counted."""
    tokenizer = train_bpe(["tea and water"], 262)
    ids = tokenizer.encode("\U0001f375")
    assert [len(tokenizer.decode_bytes([i])) for i in ids] == [1, 1, 1, 1]
    [(tokens, n_bytes)] = text_documents("\U0001f375", tokenizer)
    assert (len(tokens), n_bytes) == (5, 4)


def test_accumulation_gives_the_gradient_of_the_full_batch(tmp_path):
    """huggingface/transformers#24725, karpathy/nanochat#59: micro-batches were averaged without their token counts."""
    found = {}
    for micro in (1, 2, 4):
        folder = tmp_path / str(micro)
        folder.mkdir()
        recipe = tiny_recipe(folder, *SHORT, "model.dropout=0", f"train.micro_batch_size={micro}")
        train(recipe, folder / "run")
        found[micro] = losses(folder / "run")
    assert found[1] == pytest.approx(found[4], rel=1e-5)
    assert found[2] == pytest.approx(found[4], rel=1e-5)


@pytest.mark.parametrize(
    "text, value", [("2e-5", 2e-5), ("2.0e-5", 2e-5), ("1E-4", 1e-4), (".5e-3", 5e-4), ("1e+0", 1.0)]
)
def test_scientific_notation_is_a_number(tmp_path, text, value):
    """hiyouga/LlamaFactory#4014: 2e-5 arrived as a string."""
    recipe = load_recipe("recipes/demo.yaml", [f"train.optimizer.rest.lr={text}"])
    assert recipe.train.optimizer.rest.lr == value


def test_a_misspelt_key_is_not_ignored():
    """IntelLabs/distiller#191: `gammas` for `gamma` was ignored, and the default used."""
    message = "train.optimizer.rest.weight_decays: unknown key; did you mean 'weight_decay'?"
    with pytest.raises(ValueError, match=message):
        load_recipe("recipes/demo.yaml", ["train.optimizer.rest.weight_decays=0.5"])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_an_empty_file_of_a_crash_costs_one_checkpoint(trained, tmp_path, name):  # noqa: F811
    """facebookresearch/metaseq#53, allenai/allennlp#2129: a crash left empty files, and nothing could be loaded."""
    recipe, run = trained
    run = shutil.copytree(run, tmp_path / "run")
    (run / "checkpoints" / "step-00000012" / name).write_bytes(b"")
    train(recipe, run, resume=True)
    assert losses(run) == losses(trained[1])
    load(run, device="cpu")


def test_a_new_run_never_continues_an_older_one_of_the_folder(trained, tmp_path):  # noqa: F811
    """nyu-mll/jiant#5: a shorter new run was resumed from the longer old one's last checkpoint."""
    recipe, run = trained
    other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 5})})
    with pytest.raises(ValueError, match="already holds a run"):
        train(other, run)
    with pytest.raises(ValueError, match="train.seed is 0 in the run to resume and 5 now"):
        train(other, run, resume=True)


def test_the_newest_checkpoints_are_kept_whatever_their_number_of_digits(tmp_path):
    """deepset-ai/FARM#282: names were sorted as text, and newer checkpoints deleted."""
    checkpoints = Checkpoints(tmp_path)
    for step in (9, 10, 99_999_999, 100_000_000):
        checkpoints.save(step, {"model": {"w": torch.zeros(1)}}, {})
    checkpoints.prune(2, best=9)
    assert checkpoints.steps() == [9, 99_999_999, 100_000_000]


@pytest.mark.parametrize("window", [4, 8])
def test_a_sliding_window_is_the_same_in_decoding(window):
    """huggingface/transformers#37574, karpathy/nanochat#452: one token at a time, the window was off or forgotten."""
    config = parse_recipe(
        "name: x\nmodel: {dim: 16, n_layers: 2, pattern: a, blocks: {a: {mixer: {type: attention, n_heads: 2, window: "
        f"{window}}}, ffn: {{type: swiglu}}}}}}}}\ntrain: {{steps: 1, seq_len: 16, batch_size: 1}}"
    ).model
    model = build_model(config, vocab_size=257, seed=1).eval()
    tokens = torch.randint(257, (2, 3 * window), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model(tokens).logits
        state = model.init_state(batch_size=2)
        steps = [model(tokens[:, i : i + 1], state=state).logits for i in range(tokens.shape[1])]
        cut = model(tokens[:, -2 * window + 1 :]).logits[:, -1]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-5)
    # Two layers of a window reach 2 * window - 1 tokens back, and no further.
    torch.testing.assert_close(cut, full[:, -1], rtol=1e-4, atol=1e-5)


def test_the_learning_rate_continues_after_a_resume(trained, tmp_path):  # noqa: F811
    """pytorch/torchtitan#275: warm-up began again after a resume."""
    recipe, straight = trained
    run = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    train(recipe, run, resume=True)
    rates = [record["lr"] for record in records(run) if "lr" in record]
    assert rates == [record["lr"] for record in records(straight) if "lr" in record]
    assert rates[8:] != rates[:4]  # the schedule would begin again with these


def test_a_last_line_without_a_line_feed_is_a_document(tmp_path):
    """Modalities/modalities#395: without it, the last document was glued to another."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two\\n"}')
    assert [document.text for document in open_source(JSONLSource(path=str(path))).documents()] == ["one", "two\n"]


def test_line_ends_survive_preparation(tmp_path):
    """hiyouga/LlamaFactory#1530: line feeds were dropped when text was loaded, and the model never wrote one."""
    text = "one\n\n  two\r\nthree\t\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(b"held out")
    data = {"source": {"type": "text", "path": str(tmp_path / "a.txt")}, "dir": str(tmp_path / "prepared")}
    data["validation"] = {"type": "text", "path": str(tmp_path / "b.txt")}
    recipe = load_recipe("recipes/demo.yaml").data
    prepared = prepare(type(recipe).model_validate(data | {"tokenizer": {"type": "bytes"}}))
    [(tokens, n_bytes)] = prepared.train.documents()
    assert prepared.tokenizer.decode(tokens[1:]) == text
    assert n_bytes == len(text)
