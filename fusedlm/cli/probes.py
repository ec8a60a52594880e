"""The probes of fusedlm eval: each runs, writes a JSON file and a plot, and prints a table."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from fusedlm.cli.common import checkpoint_name, progress_bars, stretch
from fusedlm.cli.text import file_documents, held_out, prepared_text


@dataclass(frozen=True)
class Target:
    """What is probed: the folder of a run, or for mqar a recipe, and how it is loaded."""

    run: Path
    checkpoint: str
    weights: str
    device: str


def run_probe(probe: str, target: Target, options: dict, *, as_json: bool) -> None:
    """Run a probe with the options of its own that were given, write its files, and print its table or its JSON.

    Raises:
        ValueError: a value is out of range, or does not fit the run.
    """
    from rich.console import Console

    from fusedlm.files import write_atomic
    from fusedlm.train.folder import RECIPE

    out = options.pop("out", None)
    if not target.run.is_file() and not (target.run / RECIPE).is_file():
        raise ValueError(f"{target.run} holds no run; train one with: fusedlm train RECIPE --out {target.run}")
    if out is None:
        if target.run.is_file():
            raise ValueError(f"{target.run} is no folder of a run; name where the probe is to write with --out FOLDER")
        out = target.run / "probes"
    out.mkdir(parents=True, exist_ok=True)  # first: nothing is computed that cannot be written
    record, plot, tables = {"mqar": _mqar, "needle": _needle, "extend": _extend}[probe](target, options)
    write_atomic(out / f"{probe}.json", json.dumps(record, indent=1) + "\n")
    write_atomic(out / f"{probe}.png", plot)
    if as_json:
        print(json.dumps(record))
        return
    console = Console()
    for table in tables:
        console.print(table, highlight=False)
    print(f"{out / probe}.json, {out / probe}.png")


def _mqar(target: Target, options: dict):
    from fusedlm.config import load_recipe
    from fusedlm.model.precision import resolve_device, resolve_dtype
    from fusedlm.probes import Recall, probe_mqar
    from fusedlm.probes.plots import recall_plot

    if target.checkpoint != "last" or target.weights != "model":
        raise ValueError("--probe mqar trains a fresh model of the recipe; it reads no --checkpoint and no --weights")
    pairs = options.pop("pairs", None)
    task = Recall() if pairs is None else Recall(pairs=tuple(map(_whole, _split("--pairs", pairs))))
    recipe = load_recipe(target.run if target.run.is_file() else target.run / "recipe.yaml")
    device = resolve_device(target.device)
    dtype = resolve_dtype(recipe.train.dtype, device)
    with progress_bars() as progress:
        result = probe_mqar(recipe.model, task, device=device, dtype=dtype, progress=progress, **options)
    record = _record("mqar", target, result, device, dtype)
    rows = [(str(p["pairs"]), f"{p['accuracy']:.1%}", f"{p['guess']:.1%}") for p in result["accuracy"]]
    head = ("pairs", "queries answered", "guess among the values shown")
    return record, recall_plot({recipe.name: result["accuracy"]}), [_table(head, rows)]


def _needle(target: Target, options: dict):
    from fusedlm.probes import probe_needle, teach
    from fusedlm.probes.needle import training_texts
    from fusedlm.probes.plots import needle_plot

    steps, lr = options.pop("steps", 0), options.pop("lr", None)
    if steps < 0:
        raise ValueError(f"--steps {steps} must be at least 0")
    if lr is not None and not steps:
        raise ValueError("--lr is for teaching a copy of the model first; say for how long with --steps")
    for name in ("lengths", "depths"):
        if name in options:
            options[name] = tuple(_split(f"--{name}", options[name]))
    text, yarn = options.pop("text", None), options.pop("yarn", None)
    model, tokenizer, recipe, device, dtype, step = _load(target)
    train = recipe.train
    with progress_bars() as progress:
        documents, _ = file_documents(text, tokenizer) if text else held_out(recipe, tokenizer, progress)
        teaching = None
        if steps:
            optimizer = train.optimizer if lr is None else train.optimizer.model_copy(update={"lr": _rate(lr)})
            seed = options.get("seed", 0)
            shards = prepared_text(recipe, tokenizer, progress).train
            texts = training_texts(shards, seq_len=train.seq_len, eot_id=tokenizer.eot_id, seed=seed)
            model, losses = teach(
                model,
                texts,
                tokenizer,
                trained_length=train.seq_len,
                steps=steps,
                batch_tokens=train.batch_size * train.seq_len,
                optimizer=optimizer,
                seed=seed,
                device=device,
                dtype=dtype,
                progress=progress,
            )
            texts.close()
            last = losses[-max(1, steps // 10) :]
            teaching = {"steps": steps, "lr": optimizer.lr, "loss": sum(last) / len(last)}
        stretch(model, recipe, yarn)
        result = probe_needle(
            model,
            documents,
            tokenizer,
            trained_length=train.seq_len,
            device=device,
            dtype=dtype,
            progress=progress,
            **options,
        )
    result |= {"teaching": teaching, "yarn": yarn, "text": text and str(text)}
    record = _record("needle", target, result, device, dtype) | {"checkpoint": step, "weights": target.weights}
    lengths = list(dict.fromkeys(cell["length"] for cell in result["cells"]))
    cells = {(cell["length"], cell["depth"]): cell for cell in result["cells"]}
    rows = [
        (f"{depth:.0%}", *(f"{cells[n, depth]['accuracy']:.0%}  {cells[n, depth]['gain']:+.2f}" for n in lengths))
        for depth in dict.fromkeys(cell["depth"] for cell in result["cells"])
    ]
    head = ("depth", *(f"{n:,} tokens ({n / train.seq_len:g}×)" for n in lengths))
    title = "Whole answers right, and gain of a sentence that names the answer (nats a token)"
    notes = [f"left out, for want of a document so long: {', '.join(f'{n:,}' for n in result['left_out'])} tokens"]
    shown = [_table(head, rows, title), *(notes if result["left_out"] else [])]
    return record, needle_plot({recipe.name: result}), shown


def _extend(target: Target, options: dict):
    from fusedlm.probes import probe_extend
    from fusedlm.probes.plots import extend_plot

    if "factors" in options:
        options["factors"] = tuple(_split("--factors", options["factors"]))
    text = options.pop("text", None)
    model, tokenizer, recipe, device, dtype, step = _load(target)
    trained = recipe.train.seq_len
    with progress_bars() as progress:
        documents, _ = file_documents(text, tokenizer) if text else held_out(recipe, tokenizer, progress)
        result = probe_extend(
            model,
            documents,
            tokenizer,
            trained_length=trained,
            device=device,
            dtype=dtype,
            progress=progress,
            **options,
        )
    result["text"] = text and str(text)
    record = _record("extend", target, result, device, dtype) | {"checkpoint": step, "weights": target.weights}
    marks = [reach for reach in (1, 2, 4, 8) if reach <= result["reach"]]
    at = [result["ends"].index(reach * trained) for reach in marks]
    compared = result["curves"][0]["at_4x"] is not None
    rows = [
        (
            "as trained" if curve["yarn"] is None else f"YaRN {curve['yarn']:g}",
            *(f"{curve['bpb'][i]:.4f}" for i in at),
            *(_difference(curve) if compared else ()),
        )
        for curve in result["curves"]
    ]
    head = ("up to", *(f"{reach}×" for reach in marks), *(("4× less 1×", "no worse") if compared else ()))
    title = f"Bits per byte of a quarter of the training length, {trained:,} tokens; {result['windows']} windows"
    shown = [_table(head, rows, title)]
    if compared:
        plain = result["curves"][0]
        shown.append(f"4× less 1× is on the same text: as trained {plain['at_4x']:.4f} less {plain['at_1x']:.4f}")
    if not result["rope"]:
        shown.append("no mixer of this model has rotary embedding: there is nothing for YaRN to stretch")
    if result["reach"] < 8:
        shown.append(f"no document has {2 * result['reach'] * trained:,} tokens, so nothing lies further out")
    return record, extend_plot(result), shown


def _load(target: Target):
    from fusedlm.model.precision import resolve_device, resolve_dtype
    from fusedlm.train.run import choose_checkpoint, load

    device = resolve_device(target.device)
    step = choose_checkpoint(target.run, checkpoint_name(target.checkpoint))
    model, tokenizer, recipe = load(target.run, checkpoint=step, weights=target.weights, device=target.device)
    return model, tokenizer, recipe, device, resolve_dtype(recipe.train.dtype, device), step


def _record(probe: str, target: Target, result: dict, device, dtype) -> dict:
    from fusedlm.train.hardware import environment

    return {"probe": probe, "run": str(target.run), **result, "environment": environment(device, dtype)}


def _difference(curve: dict) -> tuple[str, str]:
    error = "" if curve["standard_error"] is None else f" ± {curve['standard_error']:.4f}"
    return f"{curve['difference']:+.4f}{error}", "yes" if curve["no_worse"] else "no"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], title: str | None = None):
    from rich import box
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    return table


def _split(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} is not a list of numbers such as 1,2,4") from None


def _whole(value: float) -> int:
    if not value.is_integer():
        raise ValueError(f"--pairs {value:g} is not a whole number")
    return int(value)


def _rate(lr: float) -> float:
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"--lr {lr:g} must be a finite number above 0")
    return lr
