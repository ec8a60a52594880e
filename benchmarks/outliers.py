"""What isolating outlier columns saves: the errors of a run's loss and gradients in 8 bits, with and without.

    python benchmarks/outliers.py RUN --text FILE [--plant N] [--factor F] [--tokens N] [--out FILE]

Loss and gradients of the hidden matrices on the first tokens of a text, in windows of the training length, against
those in float32. They are computed for the run as it is, and with planted outliers: N columns of the input of each
hidden matrix are multiplied by F and the columns of its weight divided by F, which changes no output.
"""

import argparse
import copy
import json
import shlex
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fusedlm  # noqa: E402
from fusedlm.files import write_atomic  # noqa: E402
from fusedlm.model.low_precision import outlier_figures  # noqa: E402
from fusedlm.model.precision import resolve_device  # noqa: E402
from fusedlm.nn.low_precision import replace_layers  # noqa: E402
from fusedlm.nn.quantized import hidden_matrices  # noqa: E402
from fusedlm.ops import LowPrecision  # noqa: E402
from fusedlm.ops.low_precision.formats import unaligned  # noqa: E402
from fusedlm.runs.hardware import environment  # noqa: E402

THRESHOLD = 3.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--plant", type=int, default=4, help="columns of each input")
    parser.add_argument("--factor", type=float, default=100.0)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = resolve_device("cpu")  # the emulation, which is the definition of the kernels
    model, tokenizer, recipe = fusedlm.load(arguments.run, device=device)
    length = min(recipe.train.seq_len, arguments.tokens - 1)
    text = arguments.text.read_text(encoding="utf-8")[: 16 * arguments.tokens]
    ids = [tokenizer.eot_id, *tokenizer.encode(text)]
    n = min(arguments.tokens, len(ids) - 1) // length
    if not n:
        parser.error(f"{arguments.text}: has {len(ids) - 1} tokens, fewer than a window of {length}")
    tokens = torch.tensor(ids[: n * length + 1])
    batch = tokens[:-1].view(n, length), tokens[1:].view(n, length)
    record = {"name": arguments.run.name, "command": shlex.join(["python", "benchmarks/outliers.py", *sys.argv[1:]])}
    record |= {"environment": environment(device, torch.float32), "tokens": n * length}
    record |= {"factor": arguments.factor, "threshold": THRESHOLD, "rows": []}
    for planted in (0, arguments.plant):
        record["rows"] += measure(model, batch, planted, arguments.factor)
    print("\n".join(map(line, record["rows"])))
    if arguments.out:
        write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


def measure(model, batch, planted: int, factor: float) -> list[dict]:
    """A row for each format, without and with isolation."""
    model = copy.deepcopy(model).train()
    layers = hidden_matrices(model).items()
    names = [name for name, layer in layers if not unaligned(layer.in_features, layer.out_features)]
    scales = {name: _plant(model.get_submodule(name), planted, factor, seed) for seed, name in enumerate(names)}
    exact_loss, exact = _gradients(model, batch, names, scales)
    rows = []
    for format in ("fp8", "int8", "mxfp8"):
        for threshold in (None, THRESHOLD):
            low = copy.deepcopy(model)
            replace_layers(low, names, LowPrecision(format), outliers=threshold)
            for name, scale_K in scales.items():
                low.get_submodule(name).register_forward_pre_hook(_scaled(scale_K))
            loss, found = _gradients(low, batch, names, scales)
            errors = [float((a - b).square().sum()) for a, b in zip(found, exact, strict=True)]
            power = sum(float(b.square().sum()) for b in exact)
            figures = outlier_figures(low)
            rows.append(
                {
                    "planted": planted,
                    "format": format,
                    "isolated": threshold is not None,
                    "loss": loss,
                    "exact_loss": exact_loss,
                    "gradient_error": (sum(errors) / power) ** 0.5,
                    "share": figures.get("outlier_share", 0.0),
                    "missed": figures.get("outlier_missed", 0.0),
                }
            )
    return rows


def _plant(layer, n: int, factor: float, seed: int) -> torch.Tensor:
    """(K,) by what the inputs are multiplied from now on."""
    generator = torch.Generator().manual_seed(seed)
    scale_K = torch.ones(layer.in_features)
    scale_K[torch.randperm(layer.in_features, generator=generator)[:n]] = factor
    with torch.no_grad():
        layer.weight /= scale_K
    layer.register_forward_pre_hook(_scaled(scale_K))
    return scale_K


def _scaled(scale_K: torch.Tensor):
    def hook(module, inputs):
        x, *others = inputs
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{module}: its input is {type(x).__name__}, which a fused op computes")
        return (x * scale_K, *others)

    return hook


def _gradients(model, batch, names, scales) -> tuple[float, list[torch.Tensor]]:
    """The loss in nats per token, and gradients of the weights as they were before the columns were divided."""
    model.zero_grad(set_to_none=True)
    loss = model(batch[0], targets=batch[1]).losses["nll"]
    loss.backward()
    return float(loss.detach()), [model.get_submodule(name).weight.grad / scales[name] for name in names]


def line(row: dict) -> str:
    planted = f"{row['planted']} planted columns" if row["planted"] else "as it is"
    kind = f"{row['format']}, isolated" if row["isolated"] else row["format"]
    found = f"{planted:>18}  {kind:<16}  loss {row['loss'] - row['exact_loss']:+.5f}"
    found += f"  gradients {row['gradient_error']:.2%}"
    return found + (f"  isolated {row['share']:.2%}, missed {row['missed']:.2%}" if row["isolated"] else "")


if __name__ == "__main__":
    main()
