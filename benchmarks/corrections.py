"""Can a low-rank correction of a quantised matrix win against a finer step of the same bytes?

    python benchmarks/corrections.py RUN --inputs FILE --out FILE [--rank 4] [--step 0.35] [--only TEXT ...]

FILE of --inputs is what `benchmarks/quantization.py --inputs` keeps: Hessians of the inputs of all matrices. Each
matrix is rounded by GPTQ to a step of so many standard deviations of its rows. A correction in float16 removes a part
of tr(E H E^T). Its bytes, spent on the step instead, would divide the error by 4^b, b being the bits per weight that
they are: an entropy-coded code takes one bit more when the step is halved. The entropies are of the same codes, of each
matrix alone and with the magnitudes of neighbours as context, in eight classes. With a step per column, inversely as
the square root of what is left of the column's input when later columns are known, the same error would take
`bits_of_column_steps` less per weight (of fine steps).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from fusedlm import load
from fusedlm.files import write_atomic
from fusedlm.ops.quantized.integer import largest_code
from fusedlm.quant.entropy import entropy_bytes
from fusedlm.quant.formats import Integers
from fusedlm.quant.gptq import inverse_factor
from fusedlm.quant.low_rank import correction, low_rank_bytes
from fusedlm.quant.matrix import Inputs, Method, quantize_matrix
from fusedlm.quant.targets import named
from fusedlm.runs.hardware import environment

_CLASSES = 8


def of_matrix(weight_NK: torch.Tensor, inputs: Inputs, rank: int, step: float) -> dict:
    """Fractions of the error that a correction and its bytes as a finer step remove, and entropies in bits."""
    outcome = quantize_matrix(weight_NK, [inputs], Integers(8), Method("gptq", step * largest_code(8)))
    error_NK = outcome.matrix.values() - weight_NK
    term = correction(error_NK, inputs.hessian_KK, rank)
    bits = 8 * low_rank_bytes(*weight_NK.shape, rank) / weight_NK.numel()
    codes = outcome.matrix.codes
    left_K = inverse_factor(inputs.hessian_KK).upper_KK.diagonal() ** -2  # variance of each input, given later ones
    return {
        "elements": weight_NK.numel(),
        "removed": 1 - inputs.error(error_NK + term.values()) / outcome.error,
        "removed_by_finer_step": 1 - 4**-bits,
        "bits_of_correction": bits,
        "bits_of_column_steps": float(left_K.mean().log2() - left_K.log2().mean()) / 2,
        "entropy": 8 * entropy_bytes(codes) / codes.numel(),
        "entropy_given_neighbours": given_neighbours(codes),
    }


def given_neighbours(codes: torch.Tensor) -> float:
    """Bits per code, if the sum of the magnitudes of the codes to the left and above says which table it has."""
    magnitudes = codes.abs().int()
    around = torch.zeros_like(magnitudes)
    around[:, 1:] += magnitudes[:, :-1]
    around[1:] += magnitudes[:-1]
    bounds = np.quantile(around.numpy(), np.arange(1, _CLASSES) / _CLASSES)
    classes = torch.from_numpy(np.searchsorted(bounds, around.numpy(), side="right"))
    parts = (codes[classes == index] for index in range(_CLASSES))
    return 8 * sum(entropy_bytes(part) for part in parts if len(part)) / codes.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--step", type=float, default=0.35)
    parser.add_argument("--only", nargs="*", default=[""], help="matrices whose names have one of these")
    arguments = parser.parse_args()
    measured = torch.load(arguments.inputs, weights_only=True)["measured"]
    model, _, recipe = load(arguments.run, device="cpu")
    record = {"recipe": recipe.name, "rank": arguments.rank, "step": arguments.step, "matrices": {}}
    record["environment"] = environment(torch.device("cpu"), torch.float32)
    for name, target in named(model).items():
        inputs = Inputs(**measured[name][0])
        if inputs.hessian_KK is None or target.stack > 1 or not any(part in name for part in arguments.only):
            continue
        found = of_matrix(target.parameter.detach(), inputs, arguments.rank, arguments.step)
        record["matrices"][name] = found
        print(name, {key: round(value, 4) for key, value in found.items()}, flush=True)
    rows = list(record["matrices"].values())
    if not rows:
        parser.error(f"--only {' '.join(arguments.only)}: no matrix has one of these in its name")
    total = sum(row["elements"] for row in rows)
    keys = [key for key in rows[0] if key != "elements"]
    record["mean"] = {key: sum(row[key] * row["elements"] for row in rows) / total for key in keys}
    print({key: round(value, 4) for key, value in record["mean"].items()})
    write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
