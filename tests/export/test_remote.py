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

from fusedlm.config.model import ModelConfig
from fusedlm.export.remote.target import FILE, remote_code
from fusedlm.export.shards import write_weights
from fusedlm.model import build_model
from fusedlm.testing import randomise_
from fusedlm.testing.models import FFN_CASES, MIXER_CASES, every_mixer_config, wired_config

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


MUP = "mup: {base_width: 16, base_depth: 2}, depth_scaled_norms: true, logit_softcap: 15.0"
# All cases of a mixer in one model, so that every option is there; and some alone, so that what they leave out is.
CONFIGS = {
    **{f"all-{kind}": _config(*((case, SWIGLU) for case in cases)) for kind, cases in MIXER_CASES.items()},
    **{
        f"one-{kind}": _config((cases[-1], "{type: relu2}"), extra="tie_embeddings: false")
        for kind, cases in MIXER_CASES.items()
    },
    "feed-forwards": _config(*((MIXER_CASES["attention"][0], case) for cases in FFN_CASES.values() for case in cases)),
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    with torch.no_grad():
        for name, config in CONFIGS.items():
            _write(root / name, config)
    return root


@pytest.fixture(scope="module")
def answers(folders, tmp_path_factory) -> dict:
    """What the other process found."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(elsewhere / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", str(CHILD), str(folders)], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_without_fusedlm(name, answers):
    assert answers["modules"] == []
    wrong = {what: error for what, error in answers["found"][name].items() if not 0 <= error < BOUND}
    assert wrong == {} and len(answers["found"][name]) > 30


def test_wrong_arguments_are_refused(answers):
    embeds, mask, positions = answers["refused"]
    assert "give input_ids" in embeds and "attention_mask (1, 2)" in mask and "position_ids must count" in positions


@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_is_clean(name, folders):
    """No import of ours, no kernels, nothing undefined or unused, and only the parts that the model has."""
    path = folders / name / FILE
    text = path.read_text(encoding="utf-8")
    imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert {line.split()[1].split(".")[0] for line in imports} <= {
        "__future__", "abc", "collections", "dataclasses", "math", "typing", "torch", "transformers",
    }  # fmt: skip
    assert not {"COMMENT_", "backend", "PendingNorm", "runs_fused", "replay"} & set(re.findall(r"\w+", text))
    ruff = Path(sys.executable).with_name("ruff")
    options = ["--isolated", "--no-cache", "--select", "F,E7,E9"]
    done = subprocess.run([ruff, "check", *options, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[:3000]
    kinds = {"GatedDeltaNet": "gdn", "Mamba2": "mamba2", "LatentMixer": "mla", "Attention": "attention"}
    config = CONFIGS[name]
    used = {block.mixer.type.replace("diff_", "").replace("cmd_", "") for block in config.blocks.values()}
    for class_name, kind in kinds.items():
        assert (f"class {class_name}(" in text) == (kind in used), class_name
    for class_name, is_used in {
        "WindowCache": any(getattr(b.mixer, "window", None) for b in config.blocks.values()) or config.smear,
        "ValueResidual": any(getattr(b.mixer, "value_residual", False) for b in config.blocks.values()),
        "BigramHash": config.bigram is not None,
        "MoE": any(block.ffn.type == "moe" for block in config.blocks.values()),
        "PredictionModule": False,
    }.items():
        assert (f"class {class_name}(" in text) == bool(is_used), class_name
