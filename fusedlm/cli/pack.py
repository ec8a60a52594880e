"""fusedlm pack: a trained run as one file of at most so many bytes, and what such a file holds."""

from pathlib import Path
from typing import Annotated

import typer

from fusedlm.cli.common import CheckpointOption, WeightsOption, integer, load_run, number, progress_bars
from fusedlm.strict_json import dumps

FLOATS = ("float32", "float16", "bfloat16")


def pack(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder; with --inspect, an artifact.", show_default=False)
    ],
    n_bytes: Annotated[
        int | None,
        typer.Option(
            "--bytes",
            parser=integer,
            metavar="N",
            help="Most bytes of the file; 16 MB are 16000000.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write, such as model.flm.", show_default=False)
    ] = None,
    bits: Annotated[int, typer.Option(parser=integer, metavar="2..8", help="Bits of hidden matrices.")] = 6,
    table_bits: Annotated[
        int, typer.Option("--table-bits", parser=integer, metavar="2..8", help="Bits of embeddings and head.")
    ] = 8,
    deviations: Annotated[
        float,
        typer.Option(
            parser=number, metavar="K", help="Standard deviations of a row at the largest code; 0: its largest weight."
        ),
    ] = 12.85,
    table_deviations: Annotated[
        float, typer.Option("--table-deviations", parser=number, metavar="K", help="The same of embeddings and head.")
    ] = 20.0,
    group: Annotated[
        int | None,
        typer.Option(
            parser=integer, metavar="N", help="Columns that share a scale (default: the full row).", show_default=False
        ),
    ] = None,
    floats: Annotated[
        str, typer.Option(metavar="float32|float16|bfloat16", help="Dtype of all that is no matrix.")
    ] = "float16",
    brotli: Annotated[
        bool, typer.Option("--brotli", help="Try brotli too; the file can then be read only where it is installed.")
    ] = False,
    code: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the code that reading and scoring the model need, as .tar.xz, and count it in --bytes.",
            show_default=False,
        ),
    ] = None,
    inspect: Annotated[bool, typer.Option("--inspect", help="Show what an artifact holds; write nothing.")] = False,
    checkpoint: CheckpointOption = "last",
    weights: WeightsOption = "raw",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object only.")] = False,
) -> None:
    """Round the matrices of RUN to integers and write model, tokenizer and recipe as one file, which eval, generate and
    fusedlm.load read. Integers that fusedlm quantize has stored are kept. A file over --bytes is an error, with the
    bytes of each tensor."""
    if inspect:
        _inspect(run, as_json)
        return
    if n_bytes is None or out is None:
        raise ValueError(f"{'--bytes N' if n_bytes is None else '--out FILE'} is missing")
    if n_bytes < 1:
        raise ValueError(f"--bytes {n_bytes}: must be at least 1")
    if floats not in FLOATS:
        raise ValueError(f"--floats {floats!r} must be one of {', '.join(FLOATS)}")
    import torch

    from fusedlm.files import write_atomic
    from fusedlm.quant.artifact.budget import OverBudget, break_down
    from fusedlm.quant.artifact.coders import OPTIONAL, REQUIRED, why_not
    from fusedlm.quant.artifact.contents import contents
    from fusedlm.quant.artifact.standalone import code_archive
    from fusedlm.quant.artifact.write import pack as pack_tensors
    from fusedlm.quant.plain_rounding import round_model
    from fusedlm.quant.stored import matrices_of_run

    matrices = _rounding(bits, deviations, group, "")
    tables = _rounding(table_bits, table_deviations, group, "table-")
    for path in filter(None, (out, code)):
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file")
    coders, notes = list(REQUIRED), []
    for coder in OPTIONAL if brotli else ():
        if reason := why_not(coder):
            notes.append(f"{coder} was not tried: {reason}")
        else:
            coders.append(coder)
    loaded = load_run(run, checkpoint=checkpoint, weights=weights, device="cpu", overrides=None)
    rounded = round_model(loaded.model, matrices, tables, kept=matrices_of_run(run, loaded.step))
    with progress_bars() as progress:
        packed = pack_tensors(
            contents(loaded.model, rounded, getattr(torch, floats)),
            loaded.recipe,
            loaded.tokenizer,
            step=loaded.step,
            text=loaded.text,
            weights=weights,
            coders=coders,
            progress=lambda done, total: progress("packing", done, total),
        )
    breakdown = break_down(packed.header, packed.header_bytes)
    archive = b"" if code is None else code_archive(packed.content)
    result = breakdown.record() | {"budget": n_bytes, "code_bytes": len(archive) if code else None, "notes": notes}
    over = len(packed.content) + len(archive) > n_bytes
    print(dumps(result) if as_json else described(result))
    if over:
        raise OverBudget(breakdown, n_bytes, len(archive))
    write_atomic(out, packed.content)
    if code is not None:
        write_atomic(code, archive)
    if not as_json:
        print(f"next: fusedlm eval {out}")


def _rounding(bits: int, deviations: float, group: int | None, prefix: str):
    from fusedlm.quant.plain_rounding import Rounding

    try:
        return Rounding(bits, deviations or None, group)
    except ValueError as error:
        name = "" if str(error).startswith("group") else prefix
        raise ValueError(f"--{name}{str(error).replace('=', ' ', 1)}") from None


def _inspect(path: Path, as_json: bool) -> None:
    from fusedlm.quant.artifact import Container
    from fusedlm.quant.artifact.budget import break_down
    from fusedlm.quant.artifact.container import VERSION

    container = Container(path)
    header = container.header
    container.verify()
    breakdown = break_down(header, container.header_bytes)
    origin = {"version": VERSION, "step": header.step, "weights": header.weights, "text": header.text}
    offsets = [
        {"section": name, "offset": container.offset(name), "bytes": entry.bytes, "check": entry.check}
        for name, entry in header.sections()
    ]
    result = breakdown.record() | origin | {"sections": offsets, "recipe": header.recipe}
    if as_json:
        print(dumps(result))
        return
    print(described(result))
    print(f"format {VERSION}, step {header.step}, {header.weights} weights; all checksums agree")


def described(result: dict) -> str:
    """The table of a breakdown, for people."""
    lines = [f"{'bytes':>12}  {'bits':>4}  {'coded':>6}  {'coder':<6}  tensor"]
    for row in result["tensors"]:
        bits = "" if row["bits"] is None else str(row["bits"])
        coded = "" if row["bits_per_element"] is None else f"{row['bits_per_element']:.3f}"
        shape = "" if row["shape"] is None else f" {tuple(row['shape'])}"
        lines.append(f"{row['bytes']:>12,.0f}  {bits:>4}  {coded:>6}  {row['coder']:<6}  {row['name']}{shape}")
    of_budget = f" of {result['budget']:,}" if "budget" in result else ""
    lines.append(f"{result['bytes']:>12,}{of_budget} bytes")
    if result.get("code_bytes") is not None:
        total = result["bytes"] + result["code_bytes"]
        lines.append(f"{result['code_bytes']:>12,} bytes of code; {total:,} together")
    return "\n".join([*lines, *result.get("notes", [])])
