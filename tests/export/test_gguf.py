"""GGUF files, read back with the package of llama.cpp: names, types and values; tokenizers; and runs of them again.

What llama.cpp itself makes of them is in docs/gguf.md: it is no dependency.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fusedlm
from fusedlm.cli import main
from fusedlm.config import Recipe
from fusedlm.data.byte_level import BYTE_OF
from fusedlm.data.tokenizer import ByteTokenizer, SubwordTokenizer
from fusedlm.export.families import choose_family
from fusedlm.export.gguf.architectures import ARCHITECTURES, obstacles
from fusedlm.export.gguf.quantize import encoded, type_of
from fusedlm.export.gguf.vocabulary import tokenizer_json, vocabulary
from fusedlm.export.gguf.write import export_gguf, gguf_model
from fusedlm.model import build_model
from fusedlm.ops import dequantize_weight
from fusedlm.ops.quantized.reference import dequantize, quantize
from fusedlm.testing import randomise_
from tests.export.cases import CASES, model_config
from tests.export.conftest import BYTES
from tests.export.test_folder import _nasty
from tests.export.test_tokenizer import TEXTS, _other, _trained

gguf = pytest.importorskip("gguf")

VOCAB = 61
FITTING = [name for name in CASES if CASES[name][0] in ARCHITECTURES]
RUNNABLE = [
    name for name in FITTING if not obstacles(choose_family(config := model_config(name), CASES[name][0]), config)
]


def _model(name):
    config = model_config(name)
    tree = {"name": "small", "model": config.model_dump(), "train": {"steps": 1, "seq_len": 64, "batch_size": 1}}
    model = randomise_(build_model(config, vocab_size=VOCAB, seed=0), scale=0.3).eval()
    return choose_family(config), model, Recipe.model_validate(tree)


@pytest.mark.parametrize("name", RUNNABLE)
def test_tensors_are_those_that_llama_cpp_names(name):
    family, model, recipe = _model(name)
    keys, tensors = gguf_model(family, model, recipe)
    architecture = ARCHITECTURES[family.name].name
    kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]}
    for tensor in tensors:
        stem = tensor.removesuffix(".weight").removesuffix(".bias")
        layer = stem.split(".")[1] if stem.startswith("blk.") else ""
        assert stem.replace(f"blk.{layer}.", "blk.{bid}.", 1) in known, tensor
    parts = [part for block in model.blocks for part in block.parts()]
    assert keys["block_count"] == len(parts if family.name == "nemotron_h" else model.blocks)
    assert keys["vocab_size"] == VOCAB
    assert keys["attention.layer_norm_rms_epsilon"] == recipe.model.norm_eps
    for layer in range(keys["block_count"]):
        assert any(name.startswith(f"blk.{layer}.") for name in tensors)
    padding = (len(model.embedding.weight) - VOCAB) * model.dim * (2 - model.tied)
    n_ours = sum(parameter.numel() for parameter in model.parameters()) - padding
    assert sum(tensor.numel() for tensor in tensors.values()) >= n_ours


def test_every_architecture_has_a_case():
    assert {choose_family(model_config(name)).name for name in RUNNABLE} == ARCHITECTURES.keys()


def _rotated(x, position, base, adjacent):
    """Of heads (H, R): by pairs (2 i, 2 i + 1), or (i, i + R / 2)."""
    half = x.shape[1] // 2
    angle = position * base ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = (x[:, 0::2], x[:, 1::2]) if adjacent else (x[:, :half], x[:, half:])
    return first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()


@pytest.mark.parametrize("name", ["llama", "granite", "bamba", "granitemoehybrid-rope", "qwen3"])
def test_scores_with_rotary_embedding_are_equal(name):
    """Queries and keys of one layer, rotated as each side does it."""
    family, model, recipe = _model(name)
    keys, tensors = gguf_model(family, model, recipe)
    layer = next(i for i, block in enumerate(model.blocks) if hasattr(block.mixer, "qkv") and block.mixer.heads[0] > 1)
    mixer, adjacent = model.blocks[layer].mixer, ARCHITECTURES[family.name].adjacent
    rope_dim, base = mixer.rope
    assert keys["rope.dimension_count"] == rope_dim and keys["rope.freq_base"] == base
    x = torch.randn(2, model.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, k, _ = mixer.qkv.weight.double().unflatten(0, (-1, mixer.head_dim)).split(mixer.heads)
    scores = []
    for weights, pairs in (((q, k), False), (None, adjacent)):
        if weights is None:
            heads = (keys["attention.head_count"], mixer.n_kv_heads)
            weights = [
                tensors[f"blk.{layer}.attn_{part}.weight"].double().unflatten(0, (n, -1))
                for part, n in zip("qk", heads, strict=True)
            ]
        rotated = []
        for weight, token, position in zip(weights, x, (7, 3), strict=True):
            head = weight @ token
            rotated.append(torch.cat([*_rotated(head[:, :rope_dim], position, base, pairs), head[:, rope_dim:]], 1))
        groups = mixer.n_heads // mixer.n_kv_heads
        scores.append((rotated[0] * rotated[1].repeat_interleave(groups, 0)).sum(1))
    assert torch.allclose(*scores, rtol=1e-9)


def test_what_is_stored_in_another_way():
    family, model, recipe = _model("deepseek_v3-moe")
    keys, tensors = gguf_model(family, model, recipe)
    mixer, ffn = model.blocks[1].mixer, model.blocks[1].ffn
    k, v = mixer.kv_up.weight.unflatten(0, (2, mixer.n_heads, -1))
    gate, up = ffn.experts.up.chunk(2, dim=1)
    expected = {"attn_k_b.weight": k.transpose(1, 2), "attn_v_b.weight": v, "exp_probs_b.bias": ffn.router.bias}
    expected |= {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up, "ffn_down_exps.weight": ffn.experts.down}
    for name, tensor in expected.items():
        assert torch.equal(tensors[f"blk.1.{name}"], tensor), name
    assert (keys["expert_count"], keys["expert_used_count"], keys["expert_weights_norm"]) == (8, 3, True)
    assert (keys["attention.key_length"], keys["attention.head_count_kv"]) == (18, 1)

    family, model, recipe = _model("qwen3_5")
    keys, tensors = gguf_model(family, model, recipe)
    gdn = model.blocks[0].mixer
    assert torch.allclose(tensors["blk.0.ssm_a"], -gdn.log_rate.exp()) and keys["full_attention_interval"] == 2
    assert torch.allclose(tensors["blk.0.attn_norm.weight"], model.blocks[0].mixer_norm.weight)
    assert torch.allclose(tensors["output_norm.weight"], model.head.norm.weight)
    assert torch.equal(tensors["blk.0.ssm_conv1d.weight"], gdn.conv.weight.flip(0).T)
    sections = keys["rope.dimension_sections"]
    assert sum(sections[:3]) == keys["rope.dimension_count"] // 2 and sections[3] == 0

    family, model, recipe = _model("bamba")
    keys, tensors = gguf_model(family, model, recipe)
    assert keys["attention.head_count_kv"] == [0, 2, 0] and not tensors["blk.0.ssm_conv1d.bias"].any()
    assert tensors["blk.0.ssm_norm.weight"].shape == (1, 64) and tensors["blk.0.ssm_d"].shape == (4, 1)

    family, model, recipe = _model("granitemoehybrid")
    keys, tensors = gguf_model(family, model, recipe)
    gate, up = model.blocks[0].ffn.gate_up.weight.chunk(2)
    assert torch.equal(tensors["blk.0.ffn_gate.weight"], gate) and torch.equal(tensors["blk.0.ffn_up.weight"], up)
    assert keys["embedding_scale"] == model.embedding_scale != 1 and keys["rope.scaling.finetuned"] is False
    query = model.blocks[1].mixer.qkv.weight[:32]
    assert torch.equal(tensors["blk.1.attn_q.weight"], query)  # nothing is rotated, nor reordered

    family, model, recipe = _model("nemotron_h")
    keys, tensors = gguf_model(family, model, recipe)
    assert keys["feed_forward_length"] == [0, 0, 40, 0, 40, 0, 0, 40]
    assert keys["attention.head_count_kv"] == [0, 0, 0, 2, 0, 2, 2, 0]
    assert torch.equal(tensors["blk.2.attn_norm.weight"], model.blocks[1].ffn_norm.weight)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0", "mxfp4"])
def test_values_of_each_type(dtype, cases, tmp_path):
    """Every tensor of a file, decoded by llama.cpp's package, against the rounding of the run's."""
    case = cases["llama"]
    written = export_gguf(case.run, tmp_path / "model.gguf", dtype=dtype)
    model, tokenizer, recipe = fusedlm.load(case.run, device="cpu")
    _, tensors = gguf_model(choose_family(recipe.model), model, recipe)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert {tensor.name for tensor in reader.tensors} == tensors.keys()
    kinds = {}
    for tensor in reader.tensors:
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = tensors[tensor.name].detach()
        kinds[tensor.name] = tensor.tensor_type.name
        assert tuple(reversed(tensor.shape.tolist())) == tuple(expected.shape)
        assert np.array_equal(found, _rounded(expected, tensor.tensor_type).numpy()), tensor.name
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    # Of 48 hidden units a row is no multiple of 32.
    plain = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    assert kinds["blk.0.ffn_up.weight"] == plain.get(dtype, dtype.upper())
    assert kinds["blk.0.ffn_down.weight"] == {"float32": "F32", "bfloat16": "BF16"}.get(dtype, "F16")
    assert kinds["token_embd.weight"] == ("Q8_0" if dtype == "mxfp4" else kinds["blk.0.ffn_up.weight"])
    assert written.tensors == {kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()))}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["llama.context_length"] == 64
    assert len(fields["tokenizer.ggml.tokens"]) == tokenizer.vocab_size
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def _rounded(tensor, kind):
    if kind.name in ("Q8_0", "BF16", "F16"):
        data = gguf.quants.quantize(tensor.numpy(), kind)
        return torch.from_numpy(gguf.quants.dequantize(data, kind).copy()).float()
    if kind.name == "MXFP4":
        return dequantize(quantize(tensor, "mxfp4", 32), torch.float32)
    return tensor


@pytest.mark.parametrize("kind", ["Q8_0", "MXFP4"])
def test_blocks_of_any_values(kind):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(64, 96, generator=generator) * torch.logspace(-20, 20, 64)[:, None]
    tensor[3] = 0.0
    tensor[4, ::3] = -0.0
    if kind == "Q8_0":
        tensor = tensor[:38]  # whose scales are in the range of float16
        expected = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
        assert np.array_equal(encoded("x", tensor, kind), expected)
        return
    data = encoded("x", tensor, kind)
    found = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType.MXFP4).copy())
    once = dequantize(quantize(tensor, "mxfp4", 32), torch.float32)
    assert torch.equal(found, once) and np.array_equal(encoded("x", once, kind), data)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3-moe"])
def test_a_run_in_mxfp4_is_written_as_it_is(cases, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(cases[name].run.parents[1])
    run, file = str(tmp_path / "run"), tmp_path / "model.gguf"
    assert main(["quantize", str(cases[name].run), "--format", "mxfp4", "--out", run]) == 0
    capsys.readouterr()
    assert main(["export", run, str(file), "--to", "gguf"]) == 2
    assert "its layers are mxfp4; export mxfp4 with --dtype mxfp4" in capsys.readouterr().err
    export_gguf(run, file, dtype="mxfp4")
    model, _, _ = fusedlm.load(run, device="cpu")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    if name == "llama":
        up, expected = tensors["blk.0.ffn_up.weight"], model.blocks[0].ffn.gate_up.weight_of("up")
    else:
        ffn = model.blocks[1].ffn
        values = dequantize_weight(ffn.experts.up.quantized_weight()).unflatten(0, (ffn.n_experts, 2, -1))
        up, expected = tensors["blk.1.ffn_up_exps.weight"], values[:, 1]
    found = torch.from_numpy(gguf.quants.dequantize(up.data, up.tensor_type).copy())
    assert up.tensor_type.name == "MXFP4" and torch.equal(found, expected)


def _texts(n: int) -> list[str]:
    generator = random.Random(1)
    ranges = [(0x20, 0x7E), (9, 13), (0x80, 0x24F), (0x300, 0x36F), (0x600, 0x6FF), (0x900, 0x97F), (0x2000, 0x206F)]
    ranges += [(0x3000, 0x30FF), (0x4E00, 0x4FFF), (0x1F300, 0x1FAFF), (0xE000, 0xE0FF)]

    def part() -> str:
        low, high = generator.choice(ranges)
        return "".join(chr(generator.randint(low, high)) for _ in range(generator.randint(1, 9)))

    return [*_nasty(), *("".join(part() for _ in range(generator.randint(1, 5))) for _ in range(n))]


@pytest.mark.parametrize("make", [ByteTokenizer, _trained])
def test_the_vocabulary_gives_the_tokenizer_back(make):
    tokenizer = make()
    found = vocabulary(tokenizer, tokenizer.vocab_size + 3)
    assert found["pre"] == ("gpt-2" if make is ByteTokenizer else "dbrx") and found["add_bos_token"] is True
    assert found["tokens"][tokenizer.eot_id] == "<|endoftext|>" and found["token_type"][tokenizer.eot_id] == 3
    assert found["token_type"][-3:] == [5, 5, 5] and set(found["token_type"][:-3]) == {1, 3}
    assert found["bos_token_id"] == found["eos_token_id"] == tokenizer.eot_id
    tokens = {token: i for i, token in enumerate(found["tokens"][:-3]) if i != tokenizer.eot_id}
    content = tokenizer_json(tokens, found["merges"], found["pre"], {"<|endoftext|>": tokenizer.eot_id})
    again = SubwordTokenizer(content, "<|endoftext|>")
    texts = _texts(800)
    assert len(texts) > 1000
    for text in texts:
        if max(map(len, text.split()), default=0) < 256 > len(text) - len(text.strip()):  # the split's limit
            assert again.encode(text) == tokenizer.encode(text), repr(text)
    assert tokens.keys() >= BYTE_OF.keys()


def test_tokenizers_that_llama_cpp_has_not_are_refused():
    with pytest.raises(ValueError, match="without normalisation"):
        vocabulary(_other(), 300)
    spec = json.loads(_trained().files()["tokenizer.json"])
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    with pytest.raises(ValueError, match="no split of text like its pre_tokenizer"):
        vocabulary(SubwordTokenizer(json.dumps(spec), "<|endoftext|>"), 300)
    with pytest.raises(ValueError, match="must be one of gpt-2, smollm"):
        tokenizer_json({}, [], "jais", {})
    for split in ("gpt-2", "smollm", "dbrx", "qwen2"):
        spec = json.loads(tokenizer_json({"a": 0, "b": 1}, [], split, {"<e>": 2}))
        assert vocabulary(SubwordTokenizer(json.dumps(spec), "<e>"), 3)["pre"] == split


@pytest.mark.parametrize("name", ["llama", "llama-tied", BYTES])
def test_a_file_becomes_a_run_again(name, cases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    case = cases[name]
    assert main(["export", str(case.run), "new/model.gguf", "--to", "gguf"]) == 0
    assert "model.gguf: " in capsys.readouterr().out
    assert main(["import", "new/model.gguf", "back"]) == 0
    model, tokenizer, _ = fusedlm.load(case.run, device="cpu")
    back, its_tokenizer, recipe = fusedlm.load("back", device="cpu")
    tokens = torch.randint(0, tokenizer.vocab_size, (2, 50), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(back(tokens).logits, model(tokens).logits, atol=1e-5)
    assert recipe.model.norm_eps == model.head.norm.eps and recipe.name == "model"
    for text in TEXTS[:3]:
        assert its_tokenizer.encode(text) == tokenizer.encode(text)
    assert main(["export", "back", "again.gguf", "--to", "gguf", "--json"]) == 0
    first, second = (
        {t.name: np.array(t.data) for t in gguf.GGUFReader(file).tensors} for file in ("new/model.gguf", "again.gguf")
    )
    assert first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def _export(*options):
    return ["export", "{run}", "new.gguf", "--to", "gguf", *options]


REFUSED = {
    "type": ("llama", _export("--dtype", "q4_k"), "--dtype q4_k: must be one of float32"),
    "file": ("llama", ["export", "{run}", "{run}/recipe.yaml", "--to", "gguf"], "exists already"),
    "family": ("llama", _export("--family", "mistral"), "mistral"),
    "window": ("qwen3-window", _export(), "model.blocks.b.mixer.window=6: llama.cpp's qwen3 attends to all"),
    "no file": ("llama", ["import", "{run}/recipe.yaml", "new"], "not a GGUF file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what, cases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, line, named = REFUSED[what]
    capsys.readouterr()
    assert main([part.format(run=cases[name].run) for part in line]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_what_stands_in_the_way_of_llama_cpp():
    def named(name):
        config = model_config(name)
        return " ".join(map(str, obstacles(choose_family(config, CASES[name][0]), config)))

    assert named("mistral") == 'family="mistral": llama.cpp runs ' + ", ".join(ARCHITECTURES)
    latent = "model.blocks.a.mixer.q_rank=null: llama.cpp's deepseek2 has a latent of queries; set it"
    assert named("deepseek_v3") == latent
    assert "model.pattern=" in named("qwen3_5-tied") and "value_head_dim=10" in named("qwen3_5-tied")
    assert "model.blocks.m.mixer.head_dim=8" in named("bamba-groups")
    assert "model.blocks.a.ffn.type=" in named("nemotron_h-moe") and named("nemotron_h") == ""
    assert "has layers of attention too" in named("granitemoehybrid-recurrent")
    assert named("llama") == "" and named("phi3") == "" and "window=5" in named("phi3-window")


def test_without_the_package_one_line_says_so(cases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    for line in (["export", str(cases["llama"].run), "new.gguf", "--to", "gguf"], ["import", __file__, "new"]):
        assert main(line) == 2
        assert "pip install 'fusedlm[gguf]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def file(cases, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    export_gguf(cases["llama"].run, path)
    return path


DAMAGED = {
    "cut": lambda data: data[: len(data) // 2],
    "short": lambda data: data[:10],
    "architecture": lambda data: data.replace(b"llama", b"bloom"),
    "split": lambda data: data.replace(b"dbrx", b"jais"),
    "tokenizer": lambda data: data.replace(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert"),
    "tensor": lambda data: data.replace(b"ffn_gate", b"ffn_gots"),
    "key": lambda data: data.replace(b"embedding_length", b"embedding_lingth"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_refused(what, file, tmp_path, capsys):
    (tmp_path / "damaged.gguf").write_bytes(DAMAGED[what](file.read_bytes()))
    assert main(["import", str(tmp_path / "damaged.gguf"), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "damaged.gguf: " in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_which_types_tensors_have():
    assert type_of("blk.0.ffn_gate_inp.weight", (4, 64), "q8_0") == "F32"
    assert type_of("blk.0.ssm_conv1d.weight", (64, 4), "bfloat16") == "F32"
    assert type_of("output.weight", (10, 64), "mxfp4") == "Q8_0" and type_of("output.weight", (10, 50), "q8_0") == "F16"
