"""Decoding of full models: tokens per second of every mixer, by batch size and context.

    python benchmarks/decoding.py [--out benchmarks/results/decoding.json] [--mixers gdn mla] [--parts table]

Steps are those of `fusedlm.generate` on a GPU, one token of each row and the draw of the next in one CUDA graph, after
states that are filled without computing the tokens. The first table is kepler-wiki with each mixer; the second is
gpt-350m and hybrid-350m at batch 1, with the fraction of a copy's rate at which weights are read. The third compares
how a step is run: as it is, with all layers separate, with norms fused into projections, and with torch.compile.

The floor counts bytes that must move: matrices that a step multiplies by, in bfloat16, and other parameters as they are
(of an embedding that is not tied only the rows of the tokens, which are left out), the cached tokens once, and
recurrent states twice, for they are written too.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import measure_ceilings  # noqa: E402
from benchmarks.lengths import mixers  # noqa: E402
from fusedlm import build_model, load_recipe  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.generation.sampling import Sampling  # noqa: E402
from fusedlm.generation.steps import Predictor, StaticSteps, graph_obstacle  # noqa: E402
from fusedlm.model.precision import autocast, resolve_device, resolve_dtype  # noqa: E402
from fusedlm.nn.recurrent_state import RecurrentState  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
BATCHES, CONTEXTS = (1, 32, 256), (2048, 32768)
VOCAB = 50257
SAMPLING = Sampling(2**30, 1.0, None, None)
ALONE = ("gpt-350m", "hybrid-350m")  # at batch 1
FUSED = {"rmsnorm_linear": "auto", "swiglu_mlp": "auto"}
SEPARATE = dict.fromkeys(("token_linear", "rmsnorm_rope", "rope_append", "relu2_mlp"), "reference")
# How a step is run: backends of ops, and options of torch.compile (None: not compiled).
VARIANTS = {
    "default": ({}, None),
    "separate layers": (SEPARATE, None),
    "fused norms": (FUSED, None),
    "compiled": ({}, {}),
    "compiled, fused norms": (FUSED, {}),
    "compiled, separate layers": (SEPARATE, {}),
    "compiled, separate layers, tuned": (SEPARATE, {"options": {"coordinate_descent_tuning": True}}),
}
VARIED = [("gpt-350m", None, 1, 2048), ("kepler-wiki", "mla", 32, 32768), ("kepler-wiki", "gdn", 1, 2048)]
PARTS = ("table", "alone", "variants")
_SPARE = 256  # tokens of room for the steps that are timed
_MILLISECONDS = 150  # of timed steps
_RESERVE = 0.05  # of the memory that a state must leave


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--mixers", nargs="+", metavar="mixer", help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--compile", action="store_true", help="compile the steps of the first two tables")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--add", action="store_true", help="keep the other parts of the record in --out")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script on a CPU")
    arguments = parser.parse_args()
    known = mixers(_recipe("kepler-wiki", arguments.tiny).model.dim)
    if unknown := [name for name in arguments.mixers or () if name not in known]:
        parser.error(f"unknown mixer {', '.join(unknown)}; one of {', '.join(known)}")
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    rate = measure_ceilings(device, dtype, quick=arguments.tiny).bytes_per_second
    print(f"a copy moves {rate / 1e9:,.0f} GB/s", flush=True)
    started = time.perf_counter()
    record = {"name": "decoding", "command": _command(arguments), "environment": environment(device, dtype)}
    record |= {"copy_bytes_per_second": rate} | {part: [] for part in PARTS}
    if arguments.add and arguments.out and arguments.out.exists():
        before = json.loads(arguments.out.read_text(encoding="utf-8"))
        record |= {part: before[part] for part in PARTS if part not in arguments.parts}
        record["command"] = f"{before['command']} && {record['command']}"

    def add(part: str, row: dict) -> None:
        record[part].append(row)
        _print(row, time.perf_counter() - started)
        if arguments.out:  # so that a run that is stopped leaves a record
            write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")

    compilation = {} if arguments.compile and device.type == "cuda" else None
    for name in (arguments.mixers or known) if "table" in arguments.parts else ():
        model = _model("kepler-wiki", known[name], device, arguments.tiny)
        for context in arguments.contexts:
            for batch in arguments.batches:
                add("table", {"mixer": name} | measure(model, batch, context, rate, device, dtype, compilation))
        del model
        _clean(device)
    for name in ALONE if "alone" in arguments.parts else ():
        model = _model(name, None, device, arguments.tiny)
        context = min(arguments.contexts)
        add("alone", {"recipe": name} | measure(model, 1, context, rate, device, dtype, compilation))
        del model
        _clean(device)
    if "variants" in arguments.parts:
        for recipe, mixer, batch, context in VARIED:
            context = min(context, max(arguments.contexts))
            model = _model(recipe, mixer and known[mixer], device, arguments.tiny)
            for variant, (backends, options) in VARIANTS.items():
                named = {"recipe": recipe, "mixer": mixer, "variant": variant}
                model.use_backends(backends)
                torch._dynamo.reset()
                options = options if device.type == "cuda" else None
                add("variants", named | measure(model, batch, context, rate, device, dtype, options))
            del model
            _clean(device)


def _command(arguments) -> str:
    options = [f"--mixers {' '.join(arguments.mixers)}"] if arguments.mixers else []
    for name, default in (("batches", BATCHES), ("contexts", CONTEXTS), ("parts", PARTS)):
        found = getattr(arguments, name)
        if tuple(found) != default:
            options.append(f"--{name} {' '.join(map(str, found))}")
    flags = [f"--{flag}" for flag in ("compile", "add", "tiny") if getattr(arguments, flag)]
    return " ".join(["python benchmarks/decoding.py", *options, *flags])


def _recipe(name: str, tiny: bool, mixer: dict | None = None):
    """tiny: of a width at which heads of all mixers have an even number of elements."""
    overrides = [] if mixer is None else [f"model.blocks.a.mixer={json.dumps(mixer)}"]
    overrides += ["model.dim=320", "model.n_layers=2"] if tiny else []
    return load_recipe(RECIPES / f"{name}.yaml", overrides)


def _model(name: str, mixer: dict | None, device: torch.device, tiny: bool):
    recipe = _recipe(name, tiny, mixer)
    return build_model(recipe.model, vocab_size=61 if tiny else VOCAB, device=device, seed=0).eval()


def measure(model, batch: int, context: int, rate: float, device, dtype, compilation: dict | None = None) -> dict:
    """Steps of a batch whose rows have `context` tokens, or the reason why there are none.

    rate: bytes per second of a copy. compilation: as of `StaticSteps`.
    """
    found = {"batch": batch, "context": context, "parameters": sum(p.numel() for p in model.parameters())}
    needed = model_state_bytes(model, batch, context + _SPARE, dtype)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if needed > free - _RESERVE * torch.cuda.get_device_properties(device).total_memory:
            return found | {"reason": f"the state takes {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"}
    try:
        return found | _measured(model, batch, context, rate, device, dtype, compilation)
    except torch.OutOfMemoryError:
        return found | {"reason": "out of memory"}
    finally:
        _clean(device)


def _measured(model, batch: int, context: int, rate: float, device, dtype, compilation) -> dict:
    graph = graph_obstacle(model, device, dtype) is None
    steps = StaticSteps(Predictor(model, None, device, dtype), SAMPLING, batch, graph=graph, compilation=compilation)
    steps.adopt(filled_state(model, batch, context, device, dtype), context + _SPARE)
    for _ in range(4):  # compiles and captures
        steps.step()
    seconds = _median_seconds(steps.step, device)
    weights, state = weight_bytes(model, dtype), moved_state_bytes(steps.state, context)
    return {
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": batch / seconds,
        "weight_bytes": weights,
        "state_bytes": state,
        "weight_rate": weights / seconds / rate,
        "floor_milliseconds": 1e3 * (weights + state) / rate,
        "graph": steps.graphed > 0,
        "graph_reason": steps.reason or graph_obstacle(model, device, dtype),
    }


@torch.no_grad()
def filled_state(model, batch: int, context: int, device: torch.device, dtype: torch.dtype):
    """A state of rows of `context` tokens, of which one is computed and repeated."""
    state = model.init_state(batch, context + _SPARE)
    with autocast(device, dtype):
        model(torch.arange(batch, device=device)[:, None] % model.vocab_size, state=state)
    state.extend_to(context)
    return state


def model_state_bytes(model, batch: int, n_tokens: int, dtype: torch.dtype) -> int:
    return batch * sum(block.mixer.state_bytes(n_tokens, dtype) for block in model.blocks)


def weight_bytes(model, dtype: torch.dtype) -> int:
    """Bytes of parameters that a step reads."""
    matrices = {id(p) for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()}
    matrices.add(id(model.head.weight))
    read = [p for p in model.parameters() if id(p) in matrices or p is not model.embedding.weight]
    return sum(p.numel() * (dtype.itemsize if id(p) in matrices else p.itemsize) for p in read)


def moved_state_bytes(state, context: int) -> int:
    """Bytes of the state that a step reads, and of recurrent states those that it writes."""
    total = 0
    for part in state.parts():
        for tensor in part.tensors():
            if isinstance(part, RecurrentState):
                total += 2 * tensor.nbytes
            else:
                total += tensor[:, :context].numel() * tensor.itemsize
    return total


def _median_seconds(step, device: torch.device) -> float:
    """Of steps in groups, without a wait between the steps of a group."""
    groups, per_group, spent = [], 4, 0.0
    while len(groups) < 5 or (spent < _MILLISECONDS / 1e3 and len(groups) * per_group < _SPARE // 2):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(per_group):
            step()
        _synchronize(device)
        groups.append((time.perf_counter() - start) / per_group)
        spent += groups[-1] * per_group
    return statistics.median(groups)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _print(row: dict, seconds: float) -> None:
    names = [row[key] for key in ("recipe", "mixer", "variant") if row.get(key)]
    start = f"[{seconds:4.0f} s] {' '.join(names):34} batch {row['batch']:4} context {row['context']:6,}"
    if "reason" in row:
        print(f"{start}  {row['reason']}", flush=True)
        return
    graph = "" if row["graph"] else f"  NO GRAPH: {row['graph_reason']}"
    print(
        f"{start} {row['milliseconds']:8.3f} ms {row['tokens_per_second']:10,.0f} tokens/s  "
        f"{row['floor_milliseconds'] / row['milliseconds']:4.0%} of floor, weights {row['weight_rate']:4.0%}{graph}",
        flush=True,
    )


if __name__ == "__main__":
    main()
