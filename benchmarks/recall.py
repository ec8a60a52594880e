"""Recall of every mixer and two hybrids at equal width and about equal parameters, each trained from scratch.

    python benchmarks/recall.py [--out FILE] [--only attention gdn] [--seeds 0 1] [--device cpu]

Two probes of fusedlm.probes: multi-query associative recall, and retrieval of a sentence planted in presidents'
speeches, on which a new model is trained directly. Each result is written to the file at once and is not computed
again; plots are drawn beside it. A model takes minutes on one core. One that does not solve a probe has not solved it
within these steps: mamba2 does not solve the first in 1000 steps, and does in 3000.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import yaml

from fusedlm.config.data import BPETokenizerConfig, DataConfig
from fusedlm.config.model import ModelConfig
from fusedlm.config.train import AdamWConfig
from fusedlm.data import prepare
from fusedlm.files import write_atomic
from fusedlm.model import build_model
from fusedlm.model.accounting import count_parameters
from fusedlm.model.precision import resolve_device, resolve_dtype
from fusedlm.nn.mixers import MIXERS
from fusedlm.probes import Recall, finetune, probe_mqar, probe_needle
from fusedlm.probes.needle import training_texts
from fusedlm.probes.plots import needle_plot, recall_plot
from fusedlm.runs.hardware import environment, numerics

DIM, LAYERS = 64, 4
BLOCKS = {
    "attention": "{type: attention, n_heads: 2}",
    "mla": "{type: mla, n_heads: 2, kv_rank: 64, rope_dim: 32}",
    "diff_mla": "{type: diff_mla, n_heads: 2, kv_rank: 64, rope_dim: 32}",
    "cmd_mla": "{type: cmd_mla, n_heads: 2, kv_rank: 64, rope_dim: 32}",
    "gdn": "{type: gdn, n_heads: 2}",
    "sdla": "{type: sdla, n_heads: 2, rank: 32}",
    "mamba2": "{type: mamba2, n_heads: 4, state_dim: 32}",
}
PATTERNS = {name: [name] for name in BLOCKS} | {
    "gdn 3 : mla 1": ["gdn", "gdn", "gdn", "mla"],
    "attention 1 : sdla 1": ["attention", "sdla"],
}
ATTENTION_HIDDEN = 128  # feed-forward of the attention model; the others are given about its parameters
# The easy sequences of few pairs are where models learn to look up first; latent attention needs them.
RECALL = {"pairs": [4, 8, 16, 32, 64], "n_keys": 128, "n_values": 64}
NEEDLE = {"trained_length": 128, "vocab_size": 512, "batch_tokens": 4096}
PROBES = ("mqar", "needle")


def model_config(name: str, hidden: int) -> ModelConfig:
    """A pattern's mixers, each with a SwiGLU of that hidden width."""
    letters = dict(zip(dict.fromkeys(PATTERNS[name]), "ab", strict=False))
    blocks = {
        letter: {"mixer": yaml.safe_load(BLOCKS[mixer]), "ffn": {"type": "swiglu", "hidden": hidden}}
        for mixer, letter in letters.items()
    }
    pattern = "".join(letters[mixer] for mixer in PATTERNS[name])
    return ModelConfig.model_validate({"dim": DIM, "n_layers": LAYERS, "pattern": pattern, "blocks": blocks})


def equal_hidden(name: str, vocab_size: int) -> int:
    """The hidden width whose parameters are closest to those of the attention model."""

    def parameters(name: str, hidden: int) -> int:
        return count_parameters(build_model(model_config(name, hidden), vocab_size=vocab_size, device="meta")).total

    wanted = parameters("attention", ATTENTION_HIDDEN)
    one, two = parameters(name, 1), parameters(name, 2)
    return max(1, 1 + round((wanted - one) / (two - one)))


def run_mqar(name: str, seed: int, settings: dict, device: torch.device, dtype: torch.dtype) -> dict:
    task = Recall(pairs=tuple(RECALL["pairs"]), n_keys=RECALL["n_keys"], n_values=RECALL["n_values"])
    hidden = equal_hidden(name, task.vocab_size)
    result = probe_mqar(
        model_config(name, hidden),
        task,
        steps=settings["mqar_steps"],
        lr=settings["mqar_lr"],
        seed=seed,
        device=device,
        dtype=dtype,
    )
    return {"hidden": hidden} | result


def run_needle(name: str, seed: int, settings: dict, device: torch.device, dtype: torch.dtype) -> dict:
    data = prepare(DataConfig(tokenizer=BPETokenizerConfig(vocab_size=NEEDLE["vocab_size"])))
    tokenizer, trained_length = data.tokenizer, NEEDLE["trained_length"]
    hidden = equal_hidden(name, tokenizer.vocab_size)
    model = build_model(model_config(name, hidden), vocab_size=tokenizer.vocab_size, device=device, seed=seed)
    texts = training_texts(data.train, seq_len=trained_length, eot_id=tokenizer.eot_id, seed=seed)
    model, losses = finetune(
        model,
        texts,
        tokenizer,
        trained_length=trained_length,
        steps=settings["needle_steps"],
        batch_tokens=NEEDLE["batch_tokens"],
        optimizer=AdamWConfig(lr=settings["needle_lr"], weight_decay=0.0),
        seed=seed,
        device=device,
        dtype=dtype,
    )
    texts.close()
    result = probe_needle(
        model,
        data.validation.documents(),
        tokenizer,
        trained_length=trained_length,
        samples=settings["needle_samples"],
        seed=seed,
        device=device,
        dtype=dtype,
    )
    last = losses[-max(1, len(losses) // 10) :]
    return {"hidden": hidden, "parameters": count_parameters(model).total, "loss": sum(last) / len(last)} | result


def open_record(path: Path, settings: dict, device: torch.device, dtype: torch.dtype) -> dict:
    """The existing record, or a new one."""
    if not path.exists():
        found = environment(device, dtype)
        return {
            "name": "recall",
            "command": f"python benchmarks/recall.py {' '.join(sys.argv[1:])}".strip(),
            "date": found["date"][:10],
            "device": found["device_name"],
            "dtype": found["dtype"],
            "versions": {key: found[key] for key in ("fusedlm", "python", "torch", "triton", "git_commit")},
            "settings": settings,
            "entries": [],
        }
    record = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if record["settings"].get(key) != value:
            there = record["settings"].get(key)
            sys.exit(f"error: {path} was made with {key}={there}, not {value}; name another file with --out")
    return record


def draw(record: dict, path: Path) -> None:
    """The plots of the first seed of each model, beside the record."""
    first = {}
    for entry in record["entries"]:
        first.setdefault((entry["probe"], entry["model"]), entry["result"])
    recall = {name: result["accuracy"] for (probe, name), result in first.items() if probe == "mqar"}
    needles = {name: result for (probe, name), result in first.items() if probe == "needle"}
    if recall:
        write_atomic(path.with_name(f"{path.stem}-mqar.png"), recall_plot(recall))
    if needles:
        write_atomic(path.with_name(f"{path.stem}-needle.png"), needle_plot(needles))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/recall.json")
    parser.add_argument("--only", nargs="+", choices=PATTERNS, default=list(PATTERNS), metavar="MODEL")
    parser.add_argument("--probes", nargs="+", choices=PROBES, default=list(PROBES), metavar="PROBE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--mqar-steps", type=int, default=3000)
    parser.add_argument("--mqar-lr", type=float, default=3e-3)
    parser.add_argument("--needle-steps", type=int, default=600)
    parser.add_argument("--needle-lr", type=float, default=3e-3)
    parser.add_argument("--needle-samples", type=int, default=32)
    arguments = parser.parse_args()
    wanted = {mixer for name in arguments.only for mixer in PATTERNS[name]}
    if missing := sorted(wanted - set(MIXERS)):
        sys.exit(f"error: unknown mixer {', '.join(missing)}; the registry has {', '.join(MIXERS)}")
    settings = {"dim": DIM, "layers": LAYERS, "blocks": BLOCKS, "recall": RECALL, "needle": NEEDLE}
    settings |= {
        key: getattr(arguments, key) for key in ("mqar_steps", "mqar_lr", "needle_steps", "needle_lr", "needle_samples")
    }
    device = resolve_device(arguments.device)
    # float32 everywhere: the models are too small to be faster in bfloat16.
    dtype = resolve_dtype("float32", device)
    record = open_record(arguments.out, settings, device, dtype)
    done = {(entry["probe"], entry["model"], entry["seed"]) for entry in record["entries"]}
    runs = {"mqar": run_mqar, "needle": run_needle}
    for probe, seed, name in ((p, s, n) for p in arguments.probes for s in arguments.seeds for n in arguments.only):
        if (probe, name, seed) in done:
            continue
        started = time.perf_counter()
        with numerics(device, dtype, deterministic=False):
            result = runs[probe](name, seed, settings, device, dtype)
        entry = {"probe": probe, "model": name, "seed": seed, "seconds": round(time.perf_counter() - started, 1)}
        record["entries"].append(entry | {"result": result})
        write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")
        draw(record, arguments.out)
        print(f"{probe:8}{name:22}seed {seed}  {entry['seconds']:6.1f} s  {summary(probe, result)}", flush=True)


def summary(probe: str, result: dict) -> str:
    if probe == "mqar":
        return "  ".join(f"{point['pairs']} pairs {point['accuracy']:.1%}" for point in result["accuracy"])
    by_length: dict[int, list[float]] = {}
    for cell in result["cells"]:
        by_length.setdefault(cell["length"], []).append(cell["accuracy"])
    return "  ".join(f"{length} tokens {sum(values) / len(values):.1%}" for length, values in by_length.items())


if __name__ == "__main__":
    main()
