"""Speculative decoding of a trained run beside plain decoding: tokens per second and the fraction of drafts kept.

    python benchmarks/speculation.py RUN [--drafts 1 2 3 4] [--batches 1 8] [--temperatures 0 1] [--out FILE]

Prompts are passages of the run's validation text. Steps are those of `fusedlm.generate`, on a GPU one CUDA graph each.
No row ends before it has all its tokens. A first pass compiles and captures; times are the fastest of the passes after
it, from the first token to the last, without reading the prompts. With temperature 0 "same" is the fraction of tokens
that are those of plain decoding up to the first that differs: in 16 bits a tie may be broken otherwise.
"""

import argparse
import itertools
import json
import shlex
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fusedlm  # noqa: E402
from fusedlm.data import prepare  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.generation import Speculation  # noqa: E402
from fusedlm.generation.sampling import Sampling  # noqa: E402
from fusedlm.generation.speculation import SpeculativeSteps  # noqa: E402
from fusedlm.generation.steps import Predictor, Row, StaticSteps, graph_obstacle  # noqa: E402
from fusedlm.model.accounting import count_parameters  # noqa: E402
from fusedlm.model.precision import resolve_device, resolve_dtype  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3, 4], help="per step")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=512, help="generated per row")
    parser.add_argument("--passes", type=int, default=3, help="timed")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    try:
        model, _, recipe = fusedlm.load(arguments.run, device=device)
        if model.mtp is None:
            raise ValueError(f"{arguments.run}: the model has no multi-token prediction to draft with")
        prompts = passages(recipe, max(arguments.batches), arguments.prompt)
    except ValueError as error:
        parser.error(str(error))
    record = {"name": "speculation", "command": shlex.join(["python", "benchmarks/speculation.py", *sys.argv[1:]])}
    record |= {"recipe": recipe.name, "parameters": count_parameters(model).total, "modules": len(model.mtp)}
    record |= {"prompt_tokens": arguments.prompt, "tokens": arguments.tokens}
    record |= {"environment": environment(device, dtype), "rows": []}
    predictor = Predictor(model, None, device, dtype)
    for temperature in arguments.temperatures:
        for batch in arguments.batches:
            plain = None
            for drafts in (0, *arguments.drafts):
                row = measure(predictor, prompts[:batch], drafts, temperature, arguments.tokens, arguments.passes)
                tokens = row.pop("drawn")
                plain = plain or (row["tokens_per_second"], tokens)
                row["over_plain"] = row["tokens_per_second"] / plain[0]
                if temperature == 0:
                    row["same"] = agreement(tokens, plain[1])
                record["rows"].append(row)
                print(line(row), flush=True)
                if arguments.out:  # so that a run that is stopped leaves a record
                    write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


def passages(recipe, n: int, length: int) -> list[list[int]]:
    """n passages of the validation text, of so many tokens each, from different documents.

    Raises:
        ValueError: it has not so many documents that are long enough.
    """
    documents = (tokens for tokens, _ in prepare(recipe.data).validation.documents() if len(tokens) >= length)
    found = [tokens[:length].tolist() for tokens in itertools.islice(documents, n)]
    if len(found) < n:
        raise ValueError(f"{len(found)} documents of the validation text have {length} tokens, not {n}; ask for fewer")
    return found


def measure(
    predictor: Predictor, prompts: list[list[int]], drafts: int, temperature: float, tokens: int, passes: int
) -> dict:
    """Tokens per second of all rows, and what was kept.

    Args:
        drafts: per step; 0: plain decoding.
    """
    device = predictor.device
    graph = graph_obstacle(predictor.model, device, predictor.dtype) is None
    sampling, speculation = Sampling(tokens, temperature, None, None), None
    if drafts:
        speculation = Speculation(drafts)
        steps = SpeculativeSteps(predictor, sampling, len(prompts), speculation, graph=graph)
    else:
        steps = StaticSteps(predictor, sampling, len(prompts), graph=graph)
    seconds = []
    for _ in range(passes + 1):
        rows = [Row(i, ids, torch.Generator().manual_seed(i)) for i, ids in enumerate(prompts)]
        drawn = [[] for _ in rows]
        for new in steps.run(rows):
            if not drawn[0]:
                started = time.perf_counter()
            for own, token in zip(drawn, new, strict=True):
                own.append(token)
        seconds.append(time.perf_counter() - started)
    row = {"batch": len(prompts), "temperature": temperature, "drafts": drafts, "graph": bool(steps.graphed)}
    row |= {"seconds": min(seconds[1:]), "tokens_per_second": len(prompts) * (tokens - 1) / min(seconds[1:])}
    if speculation is not None:
        row |= {"acceptance": speculation.acceptance(), "tokens_per_step": speculation.tokens_per_step()}
    return row | {"drawn": drawn}


def agreement(found: list[list[int]], expected: list[list[int]]) -> float:
    """The fraction of tokens before the first that differs, over rows."""
    same = 0
    for own, other in zip(found, expected, strict=True):
        differ = (i for i, pair in enumerate(zip(own, other, strict=True)) if pair[0] != pair[1])
        same += next(differ, len(own))
    return same / sum(map(len, expected))


def line(row: dict) -> str:
    text = f"batch {row['batch']}, temperature {row['temperature']:g}, {row['drafts']} drafts: "
    text += f"{row['tokens_per_second']:,.0f} tokens/s ({row['over_plain']:.2f}x)"
    if "acceptance" in row:
        kept = ", ".join(f"{share:.1%}" for share in row["acceptance"])
        text += f", kept {kept}, {row['tokens_per_step']:.2f} tokens per step"
    return text + (f", same {row['same']:.1%}" if "same" in row else "")


if __name__ == "__main__":
    main()
