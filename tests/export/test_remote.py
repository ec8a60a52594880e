"""Models of any recipe as code for Transformers, in a process in which fusedlm cannot be imported."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fusedlm
from fusedlm.cli import main
from fusedlm.config.model import ModelConfig
from fusedlm.export.remote import facts
from fusedlm.export.remote.target import FILE, remote_code
from fusedlm.export.shards import write_weights
from fusedlm.model import build_model
from fusedlm.testing import randomise_
from fusedlm.testing.models import FFN_CASES, MIXER_CASES, NO_FFN, every_mixer_config, wired_config

pytest.importorskip("transformers")

VOCAB = 61
BOUND = 1e-9
CHILD = Path(__file__).parent / "remote_child.py"
SWIGLU = "{type: swiglu, hidden: 40}"


def _config(*blocks: tuple[str, str], extra: str = "") -> ModelConfig:
    """A layer of each block."""
    letters = "abcdefghijkl"[: len(blocks)]
    tree = yaml.safe_load(f"{{dim: 32, n_layers: {len(blocks)}, pattern: {letters}, {extra}}}")
    parts = [{"mixer": yaml.safe_load(mixer), "ffn": yaml.safe_load(ffn)} for mixer, ffn in blocks]
    return ModelConfig.model_validate(tree | {"blocks": dict(zip(letters, parts, strict=True))})


GAINLESS = "embedding_norm: true, norm_gain: false"
MUP = "mup: {base_width: 16, base_depth: 2}, depth_scaled_norms: true, logit_softcap: 15.0"
# All cases of a mixer in one model, so that every option is there; and some alone, so that what they leave out is.
CONFIGS = {
    **{f"all-{kind}": _config(*((case, SWIGLU) for case in cases)) for kind, cases in MIXER_CASES.items()},
    **{
        f"one-{kind}": _config((MIXER_CASES[kind][-1], "{type: relu2}"), extra="tie_embeddings: false")
        for kind in ("attention", "gdn")
    },
    "feed-forwards": _config(*((MIXER_CASES["attention"][0], case) for cases in FFN_CASES.values() for case in cases)),
    "alone": _config((MIXER_CASES["mamba2"][0], NO_FFN), (MIXER_CASES["attention"][0], NO_FFN), extra=GAINLESS),
    "some-alone": _config((MIXER_CASES["mamba2"][0], NO_FFN), (MIXER_CASES["attention"][0], SWIGLU), extra=MUP),
    "wired": wired_config("avgav", embedding_std=0.5, mtp={"depth": 1}),
    "yarn": every_mixer_config(yarn={"factor": 4.0, "trained_length": 32}),
    "mup": _config(*((MIXER_CASES[kind][0], SWIGLU) for kind in MIXER_CASES), extra=MUP),
}


def _write(folder: Path, config: ModelConfig) -> None:
    """A folder of a random model in float64, and known.pt with what it computes."""
    model = randomise_(build_model(config, vocab_size=VOCAB, seed=0).double(), scale=0.3).eval()
    found = remote_code(model, config)
    folder.mkdir()
    (folder / FILE).write_text(found.text, encoding="utf-8")
    keys = found.keys | {"vocab_size": VOCAB, "dtype": "float64", "architectures": ["FusedLMForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(keys))
    write_weights(folder, found.tensors)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator) for n in (5, 1, 19)]
    known = {
        "logits": [],
        "prompts": prompts,
        "greedy": [_greedy(model, prompt, 12) for prompt in prompts],
        "unrounded": sorted(name for name in found.unrounded if name.removeprefix("model.") in _parameters(model)),
    }
    for n in (1, 17, 300):
        tokens = torch.randint(0, VOCAB, (2, n), generator=generator)
        logits = model(tokens).logits
        assert logits.dtype == torch.float64 and logits.std() > 0.05
        known["logits"].append((tokens, logits))
    torch.save(known, folder / "known.pt")


def _parameters(model) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def _greedy(model, prompt, n):
    """By recomputing everything for each token."""
    ids = prompt
    for _ in range(n):
        ids = torch.cat([ids, model(ids[None]).logits[0, -1:].argmax(-1)])
    return ids[len(prompt) :]


def test_transformers_computes_the_same_without_fusedlm(tmp_path):
    """One test, since all models share one process of Transformers."""
    folders, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    folders.mkdir()
    elsewhere.mkdir()
    with torch.no_grad():
        for name, config in CONFIGS.items():
            _write(folders / name, config)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(elsewhere / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(CHILD), str(folders)], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["modules"] == [] and answers["found"].keys() == CONFIGS.keys()
    for name, found in answers["found"].items():
        wrong = {what: error for what, error in found.items() if not 0 <= error < BOUND}
        assert wrong == {} and len(found) > 30, name
    embeds, mask, positions = answers["refused"]
    assert "give input_ids" in embeds and "attention_mask (1, 2)" in mask and "position_ids must count" in positions
    for name in CONFIGS:
        _check_file(name, folders / name / FILE)


def _check_file(name: str, path: Path) -> None:
    """No import of ours, no kernels, nothing undefined or unused, and only the parts that the model has."""
    text = path.read_text(encoding="utf-8")
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert {line.split()[1].split(".")[0] for line in imports} <= {
        "__future__", "abc", "collections", "dataclasses", "math", "typing", "torch", "transformers",
    }, name  # fmt: skip
    assert not {"COMMENT_", "backend", "PendingNorm", "runs_fused", "replay"} & set(re.findall(r"\w+", text)), name
    ruff = Path(sys.executable).with_name("ruff")
    options = ["--isolated", "--no-cache", "--select", "F,E7,E9"]
    done = subprocess.run([ruff, "check", *options, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[:3000]
    config = CONFIGS[name]
    blocks = config.blocks.values()
    mixers = {block.mixer.type.replace("diff_", "").replace("cmd_", "") for block in blocks}
    for class_name, is_used in {
        "GatedDeltaNet": "gdn" in mixers,
        "Mamba2": "mamba2" in mixers,
        "LatentMixer": "mla" in mixers,
        "Attention": "attention" in mixers,
        "WindowCache": any(getattr(block.mixer, "window", None) for block in blocks) or config.smear,
        "ValueResidual": any(getattr(block.mixer, "value_residual", False) for block in blocks),
        "BigramHash": config.bigram is not None,
        "MoE": any(block.ffn.type == "moe" for block in blocks),
        "PredictionModule": False,
    }.items():
        assert bool(re.search(rf"^class {class_name}\b", text, re.MULTILINE)) == bool(is_used), (name, class_name)


RECIPE = """
name: wired
model: {model}
data:
  source: {{type: text, path: text.txt, separator: "---"}}
  split: {{type: hash, fraction: 0.3}}
  tokenizer: {{type: bpe, vocab_size: 300}}
train: {{steps: 4, seq_len: 64, batch_size: 2, eval_every: 0, optimizer: {{type: adamw, lr: 0.02}}}}
runtime: {{device: cpu}}
"""


def test_a_run_is_exported_and_imported_again(workplace, tmp_path, monkeypatch, capsys):
    """By the commands, with a tokenizer, in float32 and bfloat16."""
    import transformers

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = wired_config("avgav", mtp={"depth": 1})
    (tmp_path / "wired.yaml").write_text(RECIPE.format(model=json.dumps(config.model_dump(mode="json"))))
    run, folder, half = (str(tmp_path / name) for name in ("run", "code", "half"))
    assert main(["train", str(tmp_path / "wired.yaml"), "--out", run]) == 0
    assert main(["export", run, folder, "--to", "hf-code"]) == 0
    assert main(["export", run, half, "--to", "hf-code", "--dtype", "bfloat16"]) == 0
    assert "FusedLMForCausalLM" in capsys.readouterr().out
    card = (tmp_path / "code" / "README.md").read_text(encoding="utf-8")
    assert "trust_remote_code=True" in card and "multi-token prediction were left out" in card
    model, tokenizer, recipe = fusedlm.load(run, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = transformers.AutoTokenizer.from_pretrained(folder)("Document 3", return_tensors="pt")
    tokens = torch.tensor([[tokenizer.eot_id, *tokenizer.encode("Document 3")]])
    assert inputs["input_ids"].tolist() == tokens.tolist()
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.allclose(theirs(**inputs).logits, expected, atol=1e-5)
        text = theirs.generate(**inputs, max_new_tokens=9, do_sample=False)[0, tokens.shape[1] :]
    ours = fusedlm.generate(model, tokenizer, "Document 3", max_tokens=9, temperature=0)
    assert tokenizer.decode([i for i in text.tolist() if i != tokenizer.eot_id]) == ours
    stored = load_file(tmp_path / "half" / "model.safetensors")
    kept = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert "model.blocks.2.mixer.log_rate" in kept and "model.embedding.weight" not in kept
    del theirs
    assert main(["import", folder, str(tmp_path / "back")]) == 0
    back, _, its_recipe = fusedlm.load(tmp_path / "back", device="cpu")
    assert torch.equal(back(tokens).logits, expected)
    assert its_recipe.model == recipe.model.model_copy(update={"mtp": None})
    (tmp_path / "code" / "fusedlm.json").unlink()
    assert main(["import", folder, str(tmp_path / "again")]) == 2
    assert "fusedlm.json: No such file; it holds the recipe" in capsys.readouterr().err


def test_what_is_left_out_by_name_is_there():
    """A name that the package no longer has would be left out of nothing."""
    sources = [path.read_text(encoding="utf-8") for path in Path(fusedlm.__file__).parent.rglob("*.py")]
    text = "\n".join(source for source in sources if "LEFT_OUT = {" not in source)
    for owner, method in facts.LEFT_OUT | facts.FIRST_OF_PAIR:
        body = text.partition(f"class {owner}")[2].partition("\nclass ")[0]
        assert f"def {method}(" in body, (owner, method)
    for name in facts.NEVER - {"is_compiling"} | facts.CHECKS | facts.NO_INSTANCES - {"DTensor"}:
        assert f"def {name}(" in text or f"class {name}(" in text, name
    for name in [*facts.NAMES, *facts.ATTRIBUTES, *facts.READ_ELSEWHERE]:
        assert re.search(rf"\b{name}\b", text), name
