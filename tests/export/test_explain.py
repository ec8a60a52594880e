"""Which classes a recipe fits, what stands in the way, and the refusals of `fusedlm export`."""

import json

import pytest
import torch
import yaml

from fusedlm.cli import main
from fusedlm.config import Recipe
from fusedlm.config.model import ModelConfig
from fusedlm.export import export_run
from fusedlm.export.card import Figures, model_card
from fusedlm.export.families import FAMILIES, choose_family, fits
from tests.export.cases import CASES, model_config

MLA = "{type: mla, n_heads: 2, kv_rank: 8}"
MAMBA = "{type: mamba2, n_heads: 4}"
FITTING = "type: attention, n_heads: 4, qk_norm: false"
NANOCHAT = {"mixer": "{type: attention, n_heads: 4, qk_gain: none}", "ffn": "{type: relu2}"}


def _model(mixer=f"{{{FITTING}}}", ffn="{type: swiglu}", extra="", second=None):
    blocks = f"a: {{mixer: {mixer}, ffn: {ffn}}}" + (f", b: {second}" if second else "")
    tree = f"{{dim: 32, n_layers: 2, pattern: a{'b' if second else ''}, blocks: {{{blocks}}}, {extra}}}"
    return ModelConfig.model_validate(yaml.safe_load(tree))


@pytest.mark.parametrize("name", CASES)
def test_the_family_of_a_case_is_the_first_that_fits(name):
    assert choose_family(model_config(name)).name == CASES[name][0]


def _block(mixer="", ffn="{type: swiglu}"):
    return f"{{mixer: {{{FITTING}{mixer}}}, ffn: {ffn}}}"


BLOCKED = {
    "model.logit_softcap=15.0": ("llama", {"extra": "logit_softcap: 15.0"}),
    "model.logit_rescale=": ("llama", {"extra": "logit_rescale: {scale: 23.0}"}),
    'model.bigram={"rows": 7': ("llama", {"extra": "bigram: {rows: 7, dim: 4}"}),
    "model.smear=true": ("llama", {"extra": "smear: true"}),
    "model.x0_mixing=true": ("llama", {"extra": "x0_mixing: true"}),
    "model.unet_skips=true": ("llama", {"extra": "unet_skips: true"}),
    "model.yarn.factor=2.0": ("phi3", {"extra": "yarn: {factor: 2.0, trained_length: 64}"}),
    "model.norm_eps=1e-05": (
        "deepseek_v3",
        {"mixer": "{type: mla, n_heads: 2, kv_rank: 8}", "extra": "norm_eps: 1.0e-5"},
    ),
    "model.blocks.a.mixer.qk_norm=true": ("llama", {"mixer": "{type: attention, n_heads: 4}"}),
    'model.blocks.a.mixer.qk_gain="head"': ("qwen3", {"mixer": "{type: attention, n_heads: 4}"}),
    "model.blocks.a.mixer.qk_norm=false": ("qwen3", {}),
    "model.blocks.b.mixer.window=4": (
        "qwen3",
        {
            "mixer": "{type: attention, n_heads: 4, qk_gain: dim, window: 7}",
            "second": "{mixer: {type: attention, n_heads: 4, qk_gain: dim, window: 4}, ffn: {type: swiglu}}",
        },
    ),
    "model.blocks.a.mixer.xsa=true": ("llama", {"mixer": f"{{{FITTING}, xsa: true}}"}),
    "model.blocks.a.mixer.value_residual=true": ("llama", {"mixer": f"{{{FITTING}, value_residual: true}}"}),
    "model.blocks.a.mixer.value_embedding=6": ("llama", {"mixer": f"{{{FITTING}, value_embedding: 6}}"}),
    "model.blocks.a.mixer.window=9": ("granite", {"mixer": f"{{{FITTING}, window: 9}}"}),
    "model.blocks.a.mixer.rope_dim=4": ("mistral", {"mixer": f"{{{FITTING}, rope_dim: 4}}"}),
    "model.blocks.a.mixer.rope_dim=0": ("phi3", {"mixer": f"{{{FITTING}, rope_dim: 0}}"}),
    "model.blocks.a.mixer.head_dim=16": ("phi3", {"mixer": f"{{{FITTING}, head_dim: 16}}"}),
    "model.blocks.a.mixer.n_heads=3": (
        "llama",
        {"mixer": "{type: attention, n_heads: 3, head_dim: 8, qk_norm: false}"},
    ),
    "model.blocks.a.mixer.n_kv_groups=1": (
        "deepseek_v3",
        {"mixer": "{type: mla, n_heads: 2, kv_rank: 8, n_kv_groups: 1}"},
    ),
    "model.blocks.a.ffn.n_shared=0": (
        "deepseek_v3",
        {"mixer": MLA, "ffn": "{type: moe, n_experts: 4, top_k: 2, hidden: 8, n_shared: 0}"},
    ),
    "model.blocks.a.ffn.n_experts=4": (
        "deepseek_v3",
        {"mixer": MLA, "ffn": "{type: moe, n_experts: 4, top_k: 2, hidden: 8, n_groups: 4}"},
    ),
    'model.blocks.a.ffn.activation="relu2"': (
        "deepseek_v3",
        {"mixer": MLA, "ffn": "{type: moe, n_experts: 4, top_k: 2, hidden: 8, activation: relu2}"},
    ),
    'model.pattern="ab"': (
        "deepseek_v3",
        {
            "mixer": MLA,
            "ffn": "{type: moe, n_experts: 4, top_k: 2, hidden: 8}",
            "second": f"{{mixer: {MLA}, ffn: {{type: swiglu}}}}",
        },
    ),
    'model.pattern="a"': ("qwen3_5", {"mixer": "{type: attention, n_heads: 4, qk_gain: dim}"}),
    "model.blocks.b.mixer.head_dim=5": (
        "bamba",
        {"second": "{mixer: {type: mamba2, n_heads: 4, head_dim: 5}, ffn: {type: swiglu}}"},
    ),
    "model.embedding_norm=true": ("llama", {"extra": "embedding_norm: true"}),
    "model.norm_gain=false": ("llama", {"extra": "norm_gain: false"}),
    "model.blocks.a.mixer.output_gate=true": ("llama", {"mixer": f"{{{FITTING}, output_gate: true}}"}),
    "model.embedding_norm=false": ("nanochat", NANOCHAT | {"extra": "norm_gain: false"}),
    "model.norm_gain=true": ("nanochat", NANOCHAT | {"extra": "embedding_norm: true"}),
    "model.depth_scaled_norms=true": (
        "nanochat",
        NANOCHAT | {"extra": "embedding_norm: true, norm_gain: false, depth_scaled_norms: true"},
    ),
    "model.mup.base_width=16": (
        "nanochat",
        NANOCHAT | {"extra": "embedding_norm: true, norm_gain: false, mup: {base_width: 16}"},
    ),
    'model.blocks.a.mixer.qk_gain="dim"': (
        "nanochat",
        NANOCHAT
        | {"mixer": "{type: attention, n_heads: 4, qk_gain: dim}", "extra": "embedding_norm: true, norm_gain: false"},
    ),
    "model.tie_embeddings=true": ("nemotron_h", {"mixer": MAMBA, "ffn": "{type: relu2}"}),
    "model.blocks.a.mixer.rope_dim=8": (
        "nemotron_h",
        {"mixer": f"{{{FITTING}}}", "ffn": "{type: relu2}", "extra": "tie_embeddings: false"},
    ),
    "model.blocks.a.ffn.slope=0.25": (
        "nemotron_h",
        {"mixer": MAMBA, "ffn": "{type: relu2, slope: 0.25}", "extra": "tie_embeddings: false"},
    ),
    'model.blocks.a.ffn.activation="swiglu"': (
        "nemotron_h",
        {"mixer": MAMBA, "ffn": "{type: moe, n_experts: 4, top_k: 2, hidden: 8}", "extra": "tie_embeddings: false"},
    ),
    "model.blocks.b.mixer.n_heads=2": (
        "mamba2",
        {
            "mixer": MAMBA,
            "ffn": "{type: none}",
            "second": "{mixer: {type: mamba2, n_heads: 2, head_dim: 16}, ffn: {type: none}}",
        },
    ),
    'model.blocks.a.ffn.type="swiglu"': ("mamba2", {"mixer": MAMBA}),
    "model.blocks.a.mixer.head_dim=6": (
        "mamba2",
        {"mixer": "{type: mamba2, n_heads: 4, head_dim: 6}", "ffn": "{type: none}"},
    ),
    "model.blocks.b.mixer.rope_dim=2": (
        "granitemoehybrid",
        {"mixer": MAMBA, "second": f"{{mixer: {{{FITTING}, rope_dim: 2}}, ffn: {{type: swiglu}}}}"},
    ),
    'model.blocks.a.ffn.type="none"': ("llama", {"ffn": "{type: none}"}),
    "model.blocks.a.ffn.slope=0.5": ("arcee", {"ffn": "{type: relu2, slope: 0.5}"}),
    'model.blocks.a.ffn.type="routed"': ("llama", {"ffn": "{type: routed}"}),
    'model.blocks.a.mixer.type="diff_mla"': ("llama", {"mixer": "{type: diff_mla, n_heads: 2, kv_rank: 8}"}),
    "model.blocks.b.mixer.window=5": ("mistral", {"second": _block(", window: 5")}),
    "model.blocks.b.ffn.hidden=40": ("llama", {"second": _block(ffn="{type: swiglu, hidden: 40}")}),
}


@pytest.mark.parametrize("key", BLOCKED)
def test_each_key_in_the_way_is_named(key):
    family, parts = BLOCKED[key]
    with pytest.raises(ValueError) as refused:
        choose_family(_model(**parts), family)
    assert key in str(refused.value) and str(refused.value).startswith(f"{family}: ")
    assert len(fits(_model(**parts))[family]) == 1


def test_a_block_that_no_layer_has_is_not_in_the_way():
    tree = _model(second=_block(", window: 5")).model_dump() | {"pattern": "a"}
    assert choose_family(ModelConfig.model_validate(tree)).name == "granite"


def test_explain_reads_recipes_and_runs(cases, capsys, tmp_path, monkeypatch):
    case = cases["llama"]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["export", str(case.run), "--explain"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["llama", "LlamaForCausalLM", "fits"] and "in the way of" not in out
    assert main(["export", str(case.run), "--explain", "--family", "arcee"]) == 0
    assert '  model.blocks.a.ffn.type="swiglu": Arcee has relu2' in capsys.readouterr().out
    assert main(["export", "gpt-350m", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "arcee             ArceeForCausalLM             1 key in the way" in out
    assert out.endswith("in the way of arcee:\n  model.blocks.a.mixer.qk_norm=true: Arcee has none; set false\n")
    assert main(["export", "gpt-350m", "--explain", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {family.name for family in FAMILIES} and len(found["llama"]) == 1


def test_a_named_family_is_written(cases, tmp_path):
    """A tied embedding with a scale as Llama: the scale is in the embedding, and its inverse in the last norm."""
    import fusedlm

    transformers = pytest.importorskip("transformers")
    case = cases["granite"]
    assert export_run(case.run, tmp_path / "hf", family="llama").architecture == "LlamaForCausalLM"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    model, tokenizer, _ = fusedlm.load(case.run, device="cpu")
    assert model.embedding_scale != 1
    tokens = torch.arange(tokenizer.vocab_size)[None]
    assert torch.allclose(theirs(tokens).logits, model(tokens).logits, atol=1e-5)


REFUSED = {
    "no folder": ("{run}", "--to hf DIR"),
    "another format": ("{run} new --to onnx", "--to onnx: must be hf, hf-code or gguf"),
    "code and family": ("{run} new --to hf-code --family llama", "--family llama: --to hf-code writes no class"),
    "no file": ("{run} --to gguf", "name the file to write"),
    "folder that is not empty": ("{run} {run}", "exists already"),
    "unknown family": ("{run} new --family gpt2", "--family gpt2: must be one of llama"),
    "family that does not fit": ("{run} new --family arcee", 'arcee: model.blocks.a.ffn.type="swiglu"'),
    "dtype": ("{run} new --dtype int8", "--dtype int8"),
    "no run": ("nothing new", "nothing holds no run"),
    "checkpoint": ("{run} new --checkpoint 99", "no checkpoint 99"),
    "averages": ("{run} new --weights ema", "no ema weights"),
    "explain and folder": ("{run} new --explain", "--explain writes nothing"),
    "no recipe": ("nothing --explain", "nothing"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what, cases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line, named = REFUSED[what]
    capsys.readouterr()
    assert main(["export", *line.format(run=cases["llama"].run).split()]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_float16_are_refused(cases, tmp_path, monkeypatch, capsys):
    import fusedlm.export.to_hf as to_hf

    case = cases["llama"]
    loaded = to_hf.load_checkpoint(case.run, device="cpu")
    with torch.no_grad():
        loaded.model.head.norm.weight[0] = 70_000.0
    monkeypatch.setattr(to_hf, "load_checkpoint", lambda *_, **__: loaded)
    assert main(["export", str(case.run), str(tmp_path / "new"), "--dtype", "float16"]) == 2
    assert "tensor model.norm.weight has values beyond its range" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["export", str(case.run), str(tmp_path / "new"), "--dtype", "bfloat16"]) == 0


def test_a_full_disk_leaves_nothing(cases, tmp_path, monkeypatch, capsys):
    import fusedlm.export.to_hf as to_hf

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_hf, "sync", full)
    assert main(["export", str(cases["llama"].run), str(tmp_path / "new")]) == 2
    assert "new could not be written: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_run_is_refused(cases, tmp_path, capsys):
    quantize = ["quantize", str(cases["llama"].run), "--format", "int8", "--no-score"]
    assert main([*quantize, "--out", str(tmp_path / "small")]) == 0
    capsys.readouterr()
    assert main(["export", str(tmp_path / "small"), str(tmp_path / "new")]) == 2
    assert "its layers are quantised; export the run that it was made of" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_card_names_every_source():
    sources = {"b": {"source": {"type": "text", "path": "/home/me/b.txt"}}, "a": {"source": {"type": "sotu"}}}
    tree = {"name": "two", "model": _model().model_dump(), "data": {"sources": sources}}
    recipe = Recipe.model_validate(tree | {"train": {"steps": 1, "seq_len": 8, "batch_size": 1}})
    card = model_card(recipe, "LlamaForCausalLM", Figures(1, 1, "raw", None, 0))
    assert "| training text | sotu, text b.txt |" in card and "/home/me" not in card


def test_what_fits_no_class_is_pointed_to_code():
    with pytest.raises(ValueError, match=r"--to hf-code writes any recipe\); the nearest is granite: model.smear=true"):
        choose_family(_model(extra="smear: true"))
