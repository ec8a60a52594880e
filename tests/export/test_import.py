"""Runs from exported folders: equal bit for bit, read by the other commands; folders of other programs; refusals."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fusedlm
from fusedlm.cli import main
from fusedlm.export import import_run
from fusedlm.export.families import FAMILIES
from fusedlm.runs.state import model_tensors
from tests.export.cases import CASES
from tests.export.conftest import BYTES, TRAINED

# Whose embedding is not folded, so that every number is one of the run.
EXACT = ["llama-tied", "granite", "nanochat", "granitemoehybrid"]


@pytest.mark.parametrize("name", TRAINED)
def test_import_gives_the_run_back(name, cases, tmp_path, monkeypatch):
    case = cases[name]
    import_run(case.folder, tmp_path / "back")
    model, tokenizer, recipe = fusedlm.load(case.run, device="cpu")
    back, its_tokenizer, its_recipe = fusedlm.load(tmp_path / "back", device="cpu")
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    tokens = torch.randint(0, tokenizer.vocab_size, (2, 50), generator=torch.Generator().manual_seed(3))
    ours, theirs = model_tensors(model), model_tensors(back)
    assert ours.keys() == theirs.keys()
    folded = set() if name in EXACT else {"embedding.weight", "head.norm.weight"}
    for key in ours.keys() - folded:
        n_rows = tokenizer.vocab_size if key in ("embedding.weight", "head.weight") else len(ours[key])
        assert torch.equal(ours[key][:n_rows], theirs[key][:n_rows]), key
    if name in EXACT:
        assert its_recipe == recipe
        assert torch.equal(model(tokens).logits, back(tokens).logits)
    else:
        changed = recipe.model.model_copy(update={"embedding_rms": None})
        assert its_recipe == recipe.model_copy(update={"model": changed})
        assert torch.allclose(model(tokens).logits, back(tokens).logits, atol=1e-5)
        if not model.tied:
            assert torch.equal(model(tokens).logits, back(tokens).logits)


@pytest.mark.parametrize("name", ["granite", BYTES])
def test_commands_read_an_imported_run(name, cases, tmp_path, monkeypatch, capsys):
    case = cases[name]
    monkeypatch.chdir(case.run.parents[1])
    run = str(tmp_path / "back")
    assert main(["import", str(case.folder), run]) == 0
    found = []
    for folder in (str(case.run), run):
        capsys.readouterr()
        assert main(["eval", folder, "--json"]) == 0
        scored = json.loads(capsys.readouterr().out)
        assert main(["generate", folder, "--prompt", "Document 3", "--temperature", "0"]) == 0
        found.append((scored | {"checkpoint": None}, capsys.readouterr().out))
    assert found[0] == found[1] and found[0][0]["tokens"] > 50
    assert main(["eval", run, "--text", "text.txt", "--window", "16"]) == 0
    assert main(["train", f"{run}/recipe.yaml", "--out", run, "--resume"]) == 2
    assert "optimizer" in capsys.readouterr().err
    assert main(["export", run, str(tmp_path / "again")]) == 0
    for file in ("config.json", "tokenizer.json", "model.safetensors", "fusedlm.json"):
        assert (tmp_path / "again" / file).read_bytes() == (case.folder / file).read_bytes(), file


@pytest.mark.parametrize("name", TRAINED)
def test_folders_of_other_programs_are_read(name, cases, tmp_path, capsys):
    """As Transformers saves it: without fusedlm.json, with another configuration file, in shards of its choice."""
    transformers = pytest.importorskip("transformers")
    case = cases[name]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(case.folder).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    transformers.AutoTokenizer.from_pretrained(case.folder).save_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    import_run(tmp_path / "theirs", tmp_path / "run")
    model, tokenizer, recipe = fusedlm.load(tmp_path / "run", device="cpu")
    origin, original, _ = fusedlm.load(case.run, device="cpu")
    text = "Document 9, naïvely  \n 👍"
    assert tokenizer.encode(text) == original.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    tokens = torch.randint(0, tokenizer.vocab_size, (2, 50), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(model(tokens).logits, origin(tokens).logits, atol=1e-5)
    assert recipe.train.seq_len == (64 if recipe.model.yarn is None else 32) and recipe.name == "theirs"
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "has no text of its own" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again")]) == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert type(again) is type(theirs) or name == "llama-tied"
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_float16_weights_become_float32_bit_for_bit(cases, tmp_path):
    from fusedlm.export import export_run

    export_run(cases["llama"].run, tmp_path / "half", dtype="float16")
    import_run(tmp_path / "half", tmp_path / "run")
    model, _, _ = fusedlm.load(tmp_path / "run", device="cpu")
    tensors = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(model.head.norm.weight, tensors["model.norm.weight"].float())
    assert model.head.norm.weight.dtype == torch.float32


def _edit(**changes):
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def _tensor(change):
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

    return damage


def _file(name: str, content: str | None):
    def damage(folder: Path) -> None:
        (folder / name).unlink() if content is None else (folder / name).write_text(content)

    return damage


NORM = "model.norm.weight"
REFUSED = {
    "family": ("llama", _edit(model_type="gpt2"), 'model_type="gpt2"'),
    "bias": ("llama", _edit(attention_bias=True), "attention_bias=true"),
    "activation": ("llama", _edit(hidden_act="gelu"), 'hidden_act="gelu"'),
    "rope": ("llama", _edit(rope_parameters={"rope_type": "llama3", "factor": 8.0}), 'rope_type="llama3"'),
    "kind": ("llama", _edit(hidden_size="32"), 'hidden_size="32": must be an integer'),
    "missing": ("llama", _edit(hidden_size=None), "hidden_size is missing"),
    "bound": ("llama", _edit(num_hidden_layers=0), "n_layers"),
    "heads": ("llama", _edit(num_attention_heads=0), "num_attention_heads=0"),
    "width": ("llama", _edit(intermediate_size=40), "gate_proj.weight' has shape (48, 32), by config.json (40, 32)"),
    "vocabulary": ("llama", _edit(vocab_size=20), "vocab_size=20"),
    "layers": ("qwen3-window", _edit(layer_types=["full_attention"]), 'layer_types=["full_attention"]'),
    "no window": ("qwen3-window", _edit(sliding_window=None), "sliding_window=null"),
    "gate": (
        "qwen3_5-gate",
        _tensor(lambda t: t["model.layers.1.self_attn.q_proj.weight"].fill_(1.0)),
        "q_proj.weight' has an output gate",
    ),
    "grouped keys": ("qwen3_5-gate", _edit(linear_num_key_heads=1), "linear_num_key_heads=1"),
    "kinds of layers": ("qwen3_5-gate", _edit(layer_types=["full_attention"] * 4), "layer_types="),
    "limited steps": ("bamba", _edit(time_step_limit=[0.0, 1.0]), "time_step_limit=[0.0, 1.0]"),
    "bias of the convolution": ("bamba", _edit(mamba_conv_bias=None), "mamba_conv_bias=true"),
    "no attention": ("bamba", _edit(attn_layer_indices=[]), "attn_layer_indices=[]"),
    "limited steps of Mamba2": ("mamba2", _edit(time_step_limit=[0.0, 1.0]), "time_step_limit=[0.0, 1.0]"),
    "bias of the convolution of Mamba2": ("mamba2", _edit(use_conv_bias=True), "use_conv_bias=true"),
    "least step": ("nemotron_h", _edit(time_step_min=0.001), "time_step_min=0.001: steps are not limited here"),
    "two feed-forwards": ("nemotron_h", _edit(hybrid_override_pattern="M--*"), "layers M--*: a feed-forward follows"),
    "first a feed-forward": ("nemotron_h", _edit(layers_block_type=["mlp", "mamba"]), "layers -M: a feed-forward"),
    "unknown layer": ("nemotron_h", _edit(hybrid_override_pattern="MX"), 'hybrid_override_pattern="MX"'),
    "tied head": ("nemotron_h", _edit(tie_word_embeddings=True), "tie_word_embeddings=true"),
    "shared experts": (
        "nemotron_h-moe",
        _edit(moe_shared_expert_intermediate_size=40),
        "moe_shared_expert_intermediate_size=40: the shared experts have",
    ),
    "latent of experts": ("nemotron_h-moe", _edit(moe_latent_size=8), "moe_latent_size=8"),
    "experts of Granite": ("granitemoehybrid", _edit(num_local_experts=4), "num_local_experts=4: experts"),
    "all attention": ("granitemoehybrid", _edit(layer_types=["attention"] * 3), "and not all attention"),
    "residual": ("granite", _edit(residual_multiplier=0.22), "residual_multiplier=0.22"),
    "factor of scores": ("granite", _edit(attention_multiplier=0.5), "attention_multiplier=0.5"),
    "experts": ("deepseek_v3-q_rank", _edit(first_k_dense_replace=1), "norm_topk_prob=true: must be false of 1"),
    "scores": ("deepseek_v3-moe", _edit(scoring_func="softmax"), 'scoring_func="softmax"'),
    "weights of experts": ("deepseek_v3-moe", _edit(norm_topk_prob=False), "norm_topk_prob=false"),
    "eps": ("deepseek_v3-q_rank", _edit(rms_norm_eps=1e-5), "rms_norm_eps=1e-05"),
    "extra": ("llama", _tensor(lambda t: t.update(other=torch.zeros(2))), "'other' is no part"),
    "absent": ("llama", _tensor(lambda t: t.pop(NORM)), f"'{NORM}' is missing"),
    "integers": ("llama", _tensor(lambda t: t.update({NORM: t[NORM].int()})), "torch.int32"),
    "not json": ("llama", _file("config.json", "{"), "config.json"),
    "not an object": ("llama", _file("config.json", "[]"), "config.json"),
    "no configuration": ("llama", _file("config.json", None), "config.json"),
    "no tokenizer": ("llama", _file("tokenizer.json", None), "tokenizer.json"),
    "no end of text": ("llama", _file("tokenizer_config.json", "{}"), "eos_token"),
    "damaged tokenizer": ("llama", _file("tokenizer.json", "{}"), "tokenizer.json"),
    "no weights": ("llama", _file("model.safetensors", None), "model.safetensors"),
    "damaged weights": ("llama", _file("model.safetensors", "x" * 100), "model.safetensors"),
    "damaged index": ("llama", _file("model.safetensors.index.json", '{"weight_map": {"a": "../x"}}'), "index.json"),
    "damaged origin": ("llama", _file("fusedlm.json", "{}"), "fusedlm.json"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what, cases, tmp_path, capsys):
    name, damage, named = REFUSED[what]
    shutil.copytree(cases[name].folder, tmp_path / "folder")
    damage(tmp_path / "folder")
    capsys.readouterr()
    assert main(["import", str(tmp_path / "folder"), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert named in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(cases, capsys):
    case = cases["llama"]
    before = (case.run / "recipe.yaml").read_bytes()
    assert main(["import", str(case.folder), str(case.run)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (case.run / "recipe.yaml").read_bytes() == before


def test_a_changed_configuration_counts_and_not_the_recipe_beside_it(cases, tmp_path):
    shutil.copytree(cases["llama"].folder, tmp_path / "folder")
    _edit(rms_norm_eps=0.5)(tmp_path / "folder")
    import_run(tmp_path / "folder", tmp_path / "run")
    _, _, recipe = fusedlm.load(tmp_path / "run", device="cpu")
    assert recipe.model.norm_eps == 0.5


def test_every_family_is_trained():
    assert {CASES[name][0] for name in TRAINED} == {family.name for family in FAMILIES}
