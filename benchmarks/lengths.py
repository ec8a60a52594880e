"""Time training steps of one model with each mixer at growing sequence lengths.

    python benchmarks/lengths.py recipes/gpt-350m.yaml [key=value ...] [--mixers gdn mla] [--lengths 2048 8192]
        [--out FILE]

The recipe's model in all but the mixer of block `a` (mixer `recipe`: as it is), on random tokens, each sequence one
document. A micro-batch has --tokens tokens, or one sequence; a step has 16 micro-batches. A length that does not fit is
tried again with `runtime.recompute=mixer`, which the record says.
"""

import argparse
import gc
import json
import shlex
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.train_step import measure  # noqa: E402
from fusedlm import load_recipe  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.model.precision import resolve_device, resolve_dtype  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402

MICRO_BATCHES = 16
LENGTHS = [2**n for n in range(10, 18)]
KEPT = (
    *("tokens_per_second", "mfu", "micro_batch_seconds", "optimizer_seconds", "peak_memory_gib", "parameters"),
    "backends",
)


def mixers(dim: int) -> dict[str, dict]:
    """Options of each mixer: heads of 128 elements (attention, gdn) or 64."""
    wide, narrow = max(1, dim // 128), max(1, dim // 64)
    latent = {"n_heads": narrow, "kv_rank": dim // 2, "q_rank": dim, "rope_dim": 64}
    return {
        "attention": {"type": "attention", "n_heads": wide},
        "mla": {"type": "mla", **latent},
        "diff_mla": {"type": "diff_mla", **latent},
        "cmd_mla": {"type": "cmd_mla", **latent},
        "gdn": {"type": "gdn", "n_heads": wide},
        "mamba2": {"type": "mamba2", "n_heads": narrow},
        "sdla": {"type": "sdla", "n_heads": narrow},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--mixers", nargs="+", metavar="mixer", help="default: all but recipe")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="tokens", default=LENGTHS)
    parser.add_argument("--tokens", type=int, default=32768, help="of a micro-batch; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args()
    base = load_recipe(arguments.recipe, arguments.overrides)
    known = mixers(base.model.dim) | {"recipe": None}
    if unknown := [name for name in arguments.mixers or () if name not in known]:
        parser.error(f"unknown mixer {', '.join(unknown)}; one of {', '.join(known)}")
    device = resolve_device(base.runtime.device)
    record = {"name": base.name, "command": shlex.join(["python", "benchmarks/lengths.py", *sys.argv[1:]])}
    record |= {"overrides": arguments.overrides, "tokens": arguments.tokens}
    record |= {"environment": environment(device, resolve_dtype(base.runtime.dtype, device)), "rows": []}
    for name in arguments.mixers or mixers(base.model.dim):
        for length in arguments.lengths:
            row = {"mixer": name, "length": length} | _measured(arguments, known[name], length)
            record["rows"].append(row)
            rate = f"{row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else row["reason"]
            memory = f"  {row['peak_memory_gib']:.1f} GiB" if row.get("peak_memory_gib") else ""
            print(f"{name:10} {length:7,} tokens  {rate}{memory}  recompute {row['recompute']}", flush=True)
            if arguments.out:  # so that a run that is stopped leaves a record
                write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


def _measured(arguments, mixer: dict | None, length: int) -> dict:
    """The row of one length, with `reason` in place of times if it does not fit."""
    rows = max(1, arguments.tokens // length)
    for recompute in ("none", "mixer"):
        recipe = load_recipe(
            arguments.recipe,
            [
                *arguments.overrides,
                *([] if mixer is None else [f"model.blocks.a.mixer={json.dumps(mixer)}"]),
                f"train.seq_len={length}",
                f"train.micro_batch_size={rows}",
                f"train.batch_size={rows * MICRO_BATCHES}",
                f"runtime.recompute={recompute}",
            ],
        )
        try:
            found = measure(recipe, vocab_size=50257, mean_document=None, repeats=arguments.repeats, profiled=False)
            return {"recompute": recompute} | {key: found[key] for key in KEPT}
        except torch.OutOfMemoryError:
            continue
        finally:
            torch._dynamo.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return {"recompute": recompute, "reason": "out of memory"}


if __name__ == "__main__":
    main()
