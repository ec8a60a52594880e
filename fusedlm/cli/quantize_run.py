"""What fusedlm quantize does between its options and its result: calibrate, quantise, tabulate."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fusedlm.cli.common import ReportProgress
from fusedlm.cli.text import prepared_text

if TYPE_CHECKING:
    from fusedlm.quant.matrix import Outcome
    from fusedlm.quant.request import Request


def request_of(*, clip: str | None, embedding_clip: str | None, **options) -> "Request":
    """The request of the options of the command line.

    Args:
        clip, embedding_clip: max, search or the text of a number.
        options: None of `corrected`, `tokens` and `seed` is the default.

    Raises:
        ValueError: an option, by its name on the command line.
    """
    from fusedlm.quant.request import Request

    useless = [key for key in ("corrected", "tokens", "seed") if options[key] is not None]
    if options["calibrate"] == "plain" and useless:
        raise ValueError(f"--{useless[0]}: only for calibration; add --calibrate gptq or gptq-lite")
    options = {key: value for key, value in options.items() if value is not None}
    try:
        return Request(clip=_clip("clip", clip), embedding_clip=_clip("embedding_clip", embedding_clip), **options)
    except ValueError as error:
        key, _, rest = str(error).partition("=")
        raise ValueError(f"--{key.replace('_', '-')} {rest}") from None


def _clip(key: str, text: str | None) -> str | float | None:
    if text in (None, "max", "search"):
        return text
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{key}={text!r} must be max, search or a number of standard deviations") from None


def quantized(request: "Request", loaded, out: Path, identity: dict, progress: ReportProgress) -> dict[str, "Outcome"]:
    """The matrices of a loaded run by the names of their parameters; its model then has their values.

    With calibration, finished matrices are kept in a folder in `out`; a killed command resumes after them.

    Args:
        loaded: a `LoadedRun`.
        identity: of its weights.

    Raises:
        ValueError: the text of the run is gone, or `out` holds an unfinished quantisation of another request.
    """
    from fusedlm.quant.sequence import quantize_in_order
    from fusedlm.quant.unfinished import UnfinishedFolder

    if request.calibrate == "plain":
        return quantize_in_order(loaded.model, _choices(request, loaded, None, progress))
    calibration = calibration_of(request, loaded, progress)
    settings = asdict(request) | identity | {"text": loaded.text, "device": loaded.device.type}
    unfinished = UnfinishedFolder(out, settings | {"dtype": str(loaded.dtype), "step": loaded.step})
    choices = _choices(request, loaded, calibration, progress)
    return quantize_in_order(loaded.model, choices, calibration, unfinished=unfinished, progress=progress)


def _choices(request, loaded, calibration, progress):
    try:
        return request.choices(loaded.model, calibration, progress)
    except ValueError as error:
        if not str(error).startswith("budget="):
            raise
        raise ValueError(f"--{str(error).replace('=', ' ', 1)}") from None


def calibration_of(request: "Request", loaded, progress: ReportProgress):
    """Batches of the text that the run was trained with, in an order of the request's seed; never of what it held
    out."""
    from fusedlm.data.training_text import open_training_text
    from fusedlm.quant.calibration import Calibration, calibration_batches

    prepared, recipe = prepared_text(loaded, progress), loaded.recipe
    ordered = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": request.seed})})
    batches = calibration_batches(
        prepared.train,
        open_training_text(prepared.train, ordered),
        n_tokens=request.tokens,
        seed=request.seed,
        document_mask=recipe.data.document_mask,
        device=loaded.device,
    )
    return Calibration(loaded.model, batches, loaded.device, loaded.dtype)


def row_of(name: str, outcome: "Outcome", *, coded: bool = False) -> dict:
    """The figures of a matrix. coded: its bytes are those of codes at their entropy."""
    from fusedlm.quant.matrix import format_of, outcome_bytes
    from fusedlm.quant.plan import coded_bytes

    n_rows, width = outcome.shape
    return {
        "name": name.removesuffix(".weight"),
        "format": str(format_of(outcome.matrix)),
        "rank": 0 if outcome.low_rank is None else len(outcome.low_rank.right_RK),
        "elements": n_rows * width,
        "bytes": round(coded_bytes(outcome)) if coded else outcome_bytes(outcome),
        "weight_error": outcome.weight_error,
        "output_error": outcome.output_error if outcome.tokens else None,
        "damping": outcome.damping,
        "tokens": outcome.tokens,
        "notes": list(outcome.notes),
    }


def described(result: dict, out: Path) -> str:
    """The result of the command, for people."""
    from fusedlm.report.units import count, size

    rows, widest = result["matrices"], max((len(row["name"]) for row in result["matrices"]), default=0)
    lines = []
    for row in rows:
        error = f"{row['weight_error']:8.3%} of the weight"
        if row["output_error"] is not None:
            error += f" {row['output_error']:8.3%} of the output"
        rank = f" rank {row['rank']}" if row["rank"] else ""
        notes = f"  {'; '.join(row['notes'])}" if row["notes"] else ""
        lines.append(f"{row['name']:<{widest}}  {row['format']}{rank}  error {error}{notes}")
    group = f" in groups of {result['group']}" if result["group"] and result["format"] != "mxfp4" else ""
    lines.append(
        f"{result['layers']} {'layers' if result['storage'] == 'packed' else 'matrices'}, "
        f"{count(result['quantized_weights'])} weights: {result['format']}{group}, "
        f"{result['bits_per_weight']:.3g} bits per weight"
    )
    if result["expert_weights"]:
        lines.append(
            f"of these, experts: {count(result['expert_weights'])} weights in {size(result['expert_bytes'])} of codes "
            f"and scales, {size(4 * result['expert_weights'])} in float32"
        )
    if result["storage"] == "integers":
        budget = f" of {result['budget']:,}" if result["budget"] else ""
        how = "at their entropy" if result["format"] == "coded" else "without gaps"
        lines.append(f"all tensors, codes {how}: {result['tensor_bytes']:,} bytes{budget}")
    lines.append(f"model on disk: {size(result['bytes_before'])} before, {size(result['bytes_after'])} after")
    if result["bpb_before"] is not None:
        lines.append(f"bits per byte: {result['bpb_before']:.4f} before, {result['bpb_after']:.4f} after")
    return "\n".join([*lines, f"next: fusedlm eval {out}"])
