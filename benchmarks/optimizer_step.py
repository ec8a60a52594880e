"""Time whole optimizer steps on the parameters of a recipe, with random gradients.

    python benchmarks/optimizer_step.py [recipes/gpt-350m.yaml] [key=value ...] [--only NAME ...] [--out FILE]

Contenders: torch's fused AdamW for all parameters, torch.optim.Muon for hidden matrices with fused AdamW for the rest
(packed matrices whole, as torch has no splits), muon_adamw, and normuon_adamw with each of two schemes. Each is timed
as it is called, host included, and where it can be captured as a CUDA graph. The floor is the time of the bytes that a
step must read and write at the rate of a copy, plus that of the FLOPs of the products, symmetric ones by half, at the
rate of a large matrix product. On a CPU nothing is captured.
"""

import argparse
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import measure_ceilings  # noqa: E402
from fusedlm import build_model, load_recipe  # noqa: E402
from fusedlm.config.train import AdamWConfig, MuonAdamWConfig, NorMuonAdamWConfig  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.model.precision import resolve_device, resolve_dtype  # noqa: E402
from fusedlm.ops.polar.schemes import SCHEMES, product_flops, segments  # noqa: E402
from fusedlm.optim import build_optimizer  # noqa: E402
from fusedlm.optim.optimizer import matrix_roles, optimizer_bytes  # noqa: E402
from fusedlm.optim.stacks import parts_of, stacked  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402

RECIPE = Path(__file__).resolve().parent.parent / "recipes/gpt-350m.yaml"
CONFIGS = {
    "adamw": AdamWConfig(),
    "muon_adamw": MuonAdamWConfig(),
    "normuon_adamw": NorMuonAdamWConfig(),
    "normuon_adamw_turbo": NorMuonAdamWConfig(matrix={"scheme": "turbo"}),  # four polynomials, not five
}
CONTENDERS = ("adamw", "torch_muon_adamw", "muon_adamw", "normuon_adamw", "normuon_adamw_turbo")
_UPDATE_BYTES = 2  # of an element of an update that is orthogonalised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", nargs="?", default=RECIPE)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS, help="default: all")
    parser.add_argument("--vocab-size", type=int, default=50257)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_intermixed_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    device = resolve_device(recipe.runtime.device)
    dtype = resolve_dtype("auto", device)
    record = {
        "name": "optimizer-step",
        "command": shlex.join(["python", "benchmarks/optimizer_step.py", *sys.argv[1:]]),
    }
    record |= {"recipe": recipe.name, "environment": environment(device, dtype)}
    record |= measure(recipe, device, dtype, arguments.only, vocab_size=arguments.vocab_size, repeats=arguments.repeats)
    if arguments.out:
        write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


def measure(recipe, device, dtype, names: tuple[str, ...], *, vocab_size: int, repeats: int) -> dict:
    """The parameters of the recipe's model and the times of each contender."""
    ceilings = measure_ceilings(device, dtype, quick=device.type != "cuda")
    model = build_model(recipe.model, vocab_size=vocab_size, device=device, seed=0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    by_name, hidden = dict(model.named_parameters()), matrix_roles(model)
    total = sum(p.numel() for p in model.parameters())
    n_hidden = sum(by_name[name].numel() for name in hidden)
    found = {"parameters": total, "matrix_parameters": n_hidden, "cases": []}
    print(f"{recipe.name}: {total:,} parameters, {n_hidden:,} in hidden matrices", flush=True)
    for name in names:
        case = {"optimizer": name}
        try:
            step = _step(name, model, device)
        except AttributeError as error:  # before torch 2.9 there is no torch.optim.Muon
            found["cases"].append(case | {"reason": str(error)})
            print(f"  {name:19} {error}", flush=True)
            continue
        case |= {"bytes": _bytes(name, model), "flops": _flops(name, model)}
        seconds = case["bytes"] / ceilings.bytes_per_second + case["flops"] / ceilings.flops_per_second
        case["floor_milliseconds"] = 1e3 * seconds
        case["milliseconds"], case["host_milliseconds"] = _direct_ms(step, device, repeats)
        case["graph_milliseconds"], case["graph_reason"] = _graph_ms(step, device, repeats)
        found["cases"].append(case)
        print(_line(case), flush=True)
        del step
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _step(name: str, model, device: torch.device) -> Callable[[], None]:
    if name in CONFIGS:
        optimizer = build_optimizer(model, CONFIGS[name], device)
        return (_capturable(optimizer, device) if name == "adamw" else optimizer).step
    hidden = matrix_roles(model)
    parameters = dict(model.named_parameters())
    flat = [p for name, p in parameters.items() if name in hidden and p.ndim == 2]
    taken = {id(p) for p in flat}  # torch.optim.Muon takes no stacks of experts
    muon = torch.optim.Muon(flat, lr=0.02)
    rest = [p for p in parameters.values() if id(p) not in taken]
    adamw = _capturable(torch.optim.AdamW(rest, lr=1e-3, fused=True), device)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def _capturable(adamw: torch.optim.AdamW, device: torch.device) -> torch.optim.AdamW:
    """torch's AdamW lets itself be captured only if told so; its fused kernel is the same."""
    for group in adamw.param_groups:
        group["capturable"] = device.type == "cuda"
    return adamw


def _bytes(name: str, model) -> int:
    """Read and written by a step: gradients once, weights and state twice, and so the update before and after its
    products."""
    total = sum(p.numel() for p in model.parameters())
    config = CONFIGS.get(name, CONFIGS["muon_adamw"])
    n_bytes = 4 * total + 2 * (4 * total + optimizer_bytes(config, model))
    hidden = 0 if name == "adamw" else sum(dict(model.named_parameters())[key].numel() for key in matrix_roles(model))
    return n_bytes + 4 * _UPDATE_BYTES * hidden


def _flops(name: str, model) -> int:
    """Of our products, half of each symmetric one."""
    if name == "adamw":
        return 0
    hidden, by_name = matrix_roles(model), dict(model.named_parameters())
    matrix = CONFIGS.get(name, CONFIGS["muon_adamw"]).matrix
    n_steps = len(SCHEMES[matrix.scheme].coefficients)
    total = 0
    for stack in stacked([part for key, role in hidden.items() for part in parts_of(by_name[key], role.splits)]):
        small, large = sorted((stack.rows, stack.columns))
        parts = segments(n_steps, small, large)
        total += len(stack.parts) * product_flops(n_steps, small, large, parts, symmetric=True)
    return total


def _direct_ms(step, device: torch.device, repeats: int) -> tuple[float, float]:
    """Of a step as it is called, and of the part of it in which the host is busy."""
    step()
    step()
    whole, host = [], []
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        step()
        host.append(time.perf_counter() - started)
        _synchronize(device)
        whole.append(time.perf_counter() - started)
    return 1e3 * statistics.median(whole), 1e3 * statistics.median(host)


def _graph_ms(step, device: torch.device, repeats: int) -> tuple[float | None, str | None]:
    """Of a replay of a captured step, or the reason why there is none."""
    if device.type != "cuda":
        return None, f"needs a CUDA device, not {device.type}"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:  # such as a step that waits for the device
        return None, str(error).split("\n")[0]
    return _direct_ms(partial(graph.replay), device, repeats)[0], None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(case: dict) -> str:
    graph = case["graph_milliseconds"]
    graph = f"{graph:8.3f} ms as a graph" if graph is not None else f"no graph: {case['graph_reason']}"
    return (
        f"  {case['optimizer']:19} {case['milliseconds']:8.3f} ms, floor {case['floor_milliseconds']:.3f} ms, "
        f"the host is busy {case['host_milliseconds']:.3f} ms; {graph}"
    )


if __name__ == "__main__":
    main()
