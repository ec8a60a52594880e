"""The integer matrices that a run stores in place of parameters, as `fusedlm quantize` wrote them."""

from pathlib import Path

from fusedlm.quant.integer import IntegerMatrix, stored_matrices
from fusedlm.runs.checkpoint import Checkpoints
from fusedlm.runs.folder import CHECKPOINTS
from fusedlm.runs.quantization import read_quantization
from fusedlm.runs.state import MODEL


def matrices_of_run(run: Path, step: int) -> dict[str, IntegerMatrix]:
    """By the names of their parameters; none of a run that is not quantised.

    Args:
        step: of a checkpoint that was loaded, so that its files are what was written.

    Raises:
        ValueError: codes are not all there is: layers are in a packed format, or a product is added to a matrix.
    """
    checkpoints = Checkpoints(run / CHECKPOINTS)
    record = read_quantization(checkpoints, step)
    if record is None:
        return {}
    if record["layers"]:
        name, layer = next(iter(record["layers"].items()))
        raise ValueError(
            f"{run}: layer {name} is in {layer['format']}; quantise the run that it is from with --format int2 to int8 "
            "and --storage integers"
        )
    for name, kept in record["matrices"].items():
        if kept["rank"]:
            raise ValueError(
                f"{run}: {name} has a correction of rank {kept['rank']}, which an artifact does not hold; quantise "
                "with --rank 0"
            )
    return stored_matrices(record, checkpoints.read_tensors(step, MODEL))
