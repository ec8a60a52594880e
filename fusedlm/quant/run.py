"""Write a quantised model as a run folder, which evaluation and generation read as any other."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from fusedlm.config import Recipe, dump_recipe
from fusedlm.data.tokenizer import Tokenizer
from fusedlm.quant.matrix import Outcome
from fusedlm.runs.folder import RunFolder
from fusedlm.runs.hardware import environment
from fusedlm.runs.identity import new_run_id
from fusedlm.runs.quantization import describe
from fusedlm.runs.state import MODEL, QUANTIZATION, RECIPE, STATE, TrainState, model_tensors


def check_out(out: Path) -> None:
    """Raises ValueError if a folder holds a run already, or is a file."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if RunFolder(out).holds_run():
        raise ValueError(f"--out {out} already holds a run; name another folder")


def write_quantized(
    out: Path,
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    recipe: Recipe,
    *,
    step: int,
    text: str,
    device: torch.device,
    dtype: torch.dtype,
    matrices: Mapping[str, Outcome] | None = None,
) -> Path:
    """A run folder of one checkpoint, without optimizer, averages and metrics.

    Args:
        model: with quantised layers, or with the values of integer matrices as its parameters.
        recipe: of the run that it is from.
        step: of the checkpoint that it is from.
        text: fingerprint of the prepared text that it was trained with.
        device, dtype: for environment.json.
        matrices: the integer matrices by the names of their parameters.

    Returns:
        The file of the weights.

    Raises:
        ValueError: the folder holds a run.
        OSError: it cannot be written.
    """
    check_out(out)
    run = new_run_id()
    state = TrainState(data=text, step=step, run=run, tokenizer=tokenizer.fingerprint)
    texts = {
        STATE: json.dumps(asdict(state), indent=2) + "\n",
        RECIPE: dump_recipe(recipe),
        QUANTIZATION: describe(model, {name: _record(outcome) for name, outcome in (matrices or {}).items()}),
    }
    tensors = model_tensors(model)
    for name, outcome in (matrices or {}).items():
        del tensors[name]
        tensors |= _parts(name, outcome)
    with RunFolder(out) as folder:
        path = folder.checkpoints.save(step, {MODEL: tensors}, texts)
        folder.write_header(recipe, tokenizer, environment(device, dtype), run)
    return path / f"{MODEL}.safetensors"


def _record(outcome: Outcome) -> dict:
    rank = 0 if outcome.low_rank is None else outcome.low_rank.right_RK.shape[0]
    return {"bits": outcome.matrix.bits, "group": outcome.matrix.group, "rank": rank}


def _parts(name: str, outcome: Outcome) -> dict[str, torch.Tensor]:
    parts = {f"{name}.codes": outcome.matrix.codes, f"{name}.scales": outcome.matrix.scales}
    if outcome.low_rank is not None:
        parts |= {f"{name}.left": outcome.low_rank.left_NR, f"{name}.right": outcome.low_rank.right_RK}
    return parts
