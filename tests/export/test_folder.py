"""Exported folders, loaded by stock Transformers without code of ours, against the run."""

import json
import random
import re

import pytest
import torch

import fusedlm
from fusedlm.export import export_run
from fusedlm.testing import assert_close
from tests.export.conftest import BYTES, TRAINED

transformers = pytest.importorskip("transformers")

BOUND = 2e-6  # float32
LONG = ["granitemoehybrid", "nemotron_h", "nemotron_h-moe", "mamba2"]  # of which longer texts are compared
SPECIAL = "<|endoftext|>"


def _load(folder, **kwargs):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **kwargs).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


@pytest.fixture(params=TRAINED)
def pair(request, cases):
    """Ours and theirs: (case, model, tokenizer, model, tokenizer)."""
    case = cases[request.param]
    model, tokenizer, _ = fusedlm.load(case.run, device="cpu")
    return case, model, tokenizer, *_load(case.folder)


@torch.no_grad()
def test_logits_padding_and_greedy_text_are_those_of_the_run(pair):
    case, model, tokenizer, theirs, their_tokenizer = pair
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}
    for n_tokens in (1, 17, 200):
        tokens = torch.randint(0, tokenizer.vocab_size, (2, n_tokens), generator=torch.Generator().manual_seed(2))
        ours = model(tokens).logits
        assert ours.std() > 0.01
        assert_close(ours, theirs(tokens).logits, BOUND, f"{n_tokens} tokens")

    texts = ["Document 7 says", "", "Document 12 says that 12 times 12 makes"]
    for side in ("left", "right"):
        batch = their_tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
        batch.pop("token_type_ids", None)
        # Where padding is on the left, positions count from the first token, as `generate` has them.
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        rotary = {"position_ids": positions} if any(dim for dim, _ in model.rope_specs) else {}
        padded = theirs(**batch, **rotary).logits
        for row, text in enumerate(texts):
            alone = model(torch.tensor([[tokenizer.eot_id, *tokenizer.encode(text)]])).logits[0]
            assert_close(padded[row][batch["attention_mask"][row].bool()], alone, BOUND, f"{text!r}, {side}")

    for text in texts:
        n = 200 if case.name in LONG and text == texts[-1] else 50
        inputs = their_tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        found = theirs.generate(**inputs, max_new_tokens=n, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        decoded = their_tokenizer.decode(found, skip_special_tokens=True)
        assert decoded == fusedlm.generate(model, tokenizer, text, max_tokens=n, temperature=0)
        greedy = _greedy(model, [tokenizer.eot_id, *tokenizer.encode(text)], tokenizer.eot_id)
        assert found[:50].tolist() == greedy and len(greedy) > 5


def _greedy(model, ids, end):
    """50 tokens, or until the end of text, each by recomputing everything."""
    start = len(ids)
    while len(ids) < start + 50 and (len(ids) == start or ids[-1] != end):
        ids = [*ids, model(torch.tensor([ids])).logits[0, -1].argmax().item()]
    return ids[start:]


def _nasty() -> list[str]:
    fixed = [
        "", " ", "  ", "\n", "\r\n\r\n", "\t\t x \t", " leading", "trailing ", "a  b   c    d", "\u00a0\u2003\u3000x",
        "\0", "\x01\x02\x1b[31m\x7f", "\u200b\u200d\ufeff", "e\u0301 a\u0308\u0323 \u1100\u1161\u11a8",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd", "\U0010ffff",
        "ﬁ ½ ① ℌ", "مرحبا שלום", "漢字かな交じり", "don't I'LL we'Ve", "1234567890 3.14e-10",
        "x" * 700, "-" * 700, " " * 300, "\n" * 300, SPECIAL, f"a{SPECIAL}b{SPECIAL}", "<|endoftext", "<s></s>[PAD]",
        "Ġ Ċ ▁ <0x0A>", "a\u2028b\u0085c\fd\ve", '{"a": [1, 2]}', "\\n\\t\\u0041", "ſßẞİı", "ＦＵＬＬ　ｗｉｄｔｈ",
        "a\u0300\u0301\u0302\u0303" * 20, "\U0001d518\U0001d52b \U00010348",
    ]  # fmt: skip
    generator = random.Random(0)
    ranges = [(0, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x600, 0x6FF), (0x2000, 0x206F), (0x4E00, 0x4FFF)]
    ranges += [(0x1F300, 0x1FAFF), (0xE000, 0xE0FF)]

    def text() -> str:
        low, high = generator.choice(ranges)
        return "".join(chr(generator.randint(low, high)) for _ in range(generator.randint(1, 12)))

    return fixed + ["".join(text() for _ in range(generator.randint(1, 6))) for _ in range(200)]


@pytest.mark.parametrize("name", ["llama", "mistral-tied", BYTES, "deepseek_v3-q_rank"])
def test_tokens_of_nasty_texts_are_equal(name, cases):
    _, tokenizer, _ = fusedlm.load(cases[name].run, device="cpu")
    theirs = transformers.AutoTokenizer.from_pretrained(cases[name].folder)
    texts = _nasty()
    assert len(texts) > 200
    for text in texts:
        expected = [tokenizer.eot_id, *tokenizer.encode(text)]
        assert theirs(text)["input_ids"] == expected, repr(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == expected[1:], repr(text)
        assert theirs.decode(expected[1:]) == text, repr(text)
    assert theirs(texts)["input_ids"] == [[tokenizer.eot_id, *tokenizer.encode(text)] for text in texts]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.eot_id, tokenizer.eot_id)
    assert len(theirs) == tokenizer.vocab_size


def test_weights_beyond_a_file_are_sharded(cases, tmp_path):
    case = cases["llama"]
    written = export_run(case.run, tmp_path / "small", shard_bytes=40_000)
    shards = [name for name in written.files if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)]
    assert len(shards) > 2 and "model.safetensors" not in written.files
    assert all((tmp_path / "small" / name).stat().st_size < 45_000 for name in shards)
    sharded, whole = (dict(_load(folder)[0].named_parameters()) for folder in (tmp_path / "small", case.folder))
    assert sharded.keys() == whole.keys() and all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_the_folder_names_what_it_holds(cases, tmp_path):
    case = cases["llama"]
    names = {path.name for path in case.folder.iterdir()}
    assert names == {
        "README.md", "config.json", "fusedlm.json", "generation_config.json", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    card = (case.folder / "README.md").read_text(encoding="utf-8")
    _, tokenizer, recipe = fusedlm.load(case.run, device="cpu")
    metrics = [json.loads(line) for line in (case.run / "metrics.jsonl").read_text().splitlines()]
    bpb = next(record["val_bpb"] for record in reversed(metrics) if "val_bpb" in record)
    assert f"| held-out bits per byte | {bpb:.4f} |" in card and "| class | `LlamaForCausalLM` |" in card
    assert "library_name: transformers" in card and "step 6 of 6" in card
    config = json.loads((case.folder / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.vocab_size and config["max_position_embeddings"] == 64
    generation = json.loads((case.folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["bos_token_id"] == tokenizer.eot_id

    export_run(case.run, tmp_path / "half", dtype="bfloat16")
    half, _ = _load(tmp_path / "half")
    assert half.dtype == torch.bfloat16
