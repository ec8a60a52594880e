"""Exported models in vLLM beside Transformers on the same files: log-probabilities of prompts, and greedy tokens.

    python benchmarks/vllm_logprobs.py DIR [DIR ...] [--new 32] [--out FILE]

DIR: as `fusedlm export RUN --to hf DIR` writes it. Prompts are random tokens, 1, 17 and twice half the positions of the
model at most. The distance of vLLM in bfloat16 from Transformers in float32 stands beside that of Transformers in
bfloat16: an export that vLLM reads otherwise than Transformers does is further away.
"""

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="dir")
    parser.add_argument("--new", type=int, default=32, help="greedy tokens")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("vLLM needs a GPU")
    rows = [compare(folder, arguments.new) for folder in arguments.folders]
    made = environment(torch.device("cuda"), torch.bfloat16) | {
        name: version(name) for name in ("vllm", "transformers")
    }
    command = f"python benchmarks/vllm_logprobs.py {' '.join(folder.name for folder in arguments.folders)}"
    if arguments.out:
        record = {"name": "vllm", "command": command, "environment": made, "rows": rows}
        write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


def compare(folder: Path, n_new: int) -> dict:
    config = AutoConfig.from_pretrained(folder)
    most = getattr(config, "max_position_embeddings", None) or 1024
    length = max(17, min(512, most // 2))
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 17, length, length)
    prompts = [torch.randint(config.vocab_size - 1, (n,), generator=generator).tolist() for n in lengths]
    exact, exact_tokens = by_transformers(folder, prompts, n_new, torch.float32)
    low, low_tokens = by_transformers(folder, prompts, n_new, torch.bfloat16)
    found, tokens = by_vllm(folder, prompts, n_new, most)
    row = {"architecture": config.architectures[0], "prompts": [len(ids) for ids in prompts], "new": n_new}
    for name, logprobs, greedy in (("vllm", found, tokens), ("transformers", low, low_tokens)):
        distance = (torch.cat(logprobs) - torch.cat(exact)).abs()
        row[name] = {
            "largest_difference": distance.max().item(),
            "mean_difference": distance.mean().item(),
            "equal_tokens": [_equal(own, other) for own, other in zip(greedy, exact_tokens, strict=True)],
        }
    print(json.dumps(row))
    return row


def by_transformers(folder: Path, prompts: list[list[int]], n_new: int, dtype: torch.dtype) -> tuple[list, list]:
    """The log-probability of each token of a prompt after the first, and the greedy tokens after it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).cuda().eval()
    logprobs, greedy = [], []
    for ids in prompts:
        tokens = torch.tensor([ids]).cuda()
        with torch.no_grad():
            scores = model(tokens).logits.float().log_softmax(-1)[0, :-1]
            logprobs.append(scores.gather(-1, tokens[0, 1:, None])[:, 0].cpu())
            options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False}
            found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
            greedy.append(found[0, len(ids) :].tolist())
    return logprobs, greedy


def by_vllm(folder: Path, prompts: list[list[int]], n_new: int, most: int) -> tuple[list, list]:
    from vllm import LLM, SamplingParams

    model = LLM(
        model=str(folder),
        dtype="bfloat16",
        enforce_eager=True,
        kv_cache_memory_bytes=2**31,
        max_model_len=min(1024, most),
        skip_tokenizer_init=True,
    )
    options = {"temperature": 0.0, "max_tokens": n_new, "min_tokens": n_new, "ignore_eos": True, "prompt_logprobs": 1}
    found = model.generate([{"prompt_token_ids": ids} for ids in prompts], SamplingParams(**options, detokenize=False))
    logprobs = [
        torch.tensor([one.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))])
        for one, ids in zip(found, prompts, strict=True)
    ]
    return logprobs, [list(one.outputs[0].token_ids) for one in found]


def _equal(own: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b), len(own))


if __name__ == "__main__":
    main()
