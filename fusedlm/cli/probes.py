"""The probes of fusedlm eval: each runs, writes a JSON file and a plot, and prints tables."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fusedlm.cli.common import load_run, progress_bars, stretch
from fusedlm.cli.packaged import find_recipe
from fusedlm.cli.text import documents_of, prepared_text
from fusedlm.strict_json import dumps
from fusedlm.terminal import make_console


@dataclass(frozen=True)
class Target:
    """The run folder, or for mqar a recipe file, and how it is loaded."""

    run: Path
    checkpoint: str
    weights: str
    device: str
    overrides: list[str]  # of the recipe's runtime

    def load(self, data: Path | None):
        return load_run(
            self.run,
            checkpoint=self.checkpoint,
            weights=self.weights,
            device=self.device,
            overrides=self.overrides,
            data=data,
            files=True,
        )


def run_probe(probe: str, target: Target, options: dict, *, as_json: bool) -> None:
    """Run a probe with the options that were given, write its files, and print its tables or its JSON.

    Raises:
        ValueError: a value is out of range, or does not fit the run.
    """
    from fusedlm.files import write_atomic
    from fusedlm.runs.folder import require_run

    if probe == "mqar" and not target.run.exists():
        target = replace(target, run=find_recipe(str(target.run)))
    out = options.pop("out", None)
    if not target.run.is_file():
        require_run(target.run)
    if out is None:
        if target.run.is_file():
            raise ValueError(f"{target.run} is not a run folder; name the folder for the results with --out FOLDER")
        out = target.run / "probes"
    out.mkdir(parents=True, exist_ok=True)  # before the computation: an unwritable folder fails at once
    record, plot, tables = {"mqar": _mqar, "needle": _needle, "extend": _extend}[probe](target, options)
    write_atomic(out / f"{probe}.json", dumps(record, indent=1) + "\n")
    write_atomic(out / f"{probe}.png", plot)
    if as_json:
        print(dumps(record))
        return
    console = make_console()
    for shown in tables:
        # Sentences are wrapped at words on a terminal, and one line in a file.
        console.print(shown, highlight=False, soft_wrap=isinstance(shown, str) and not console.is_terminal)
    print(f"{out / probe}.json, {out / probe}.png")


def _mqar(target: Target, options: dict):
    from fusedlm.config import load_recipe
    from fusedlm.config.recipe import with_overrides
    from fusedlm.model.precision import resolve_device, resolve_dtype
    from fusedlm.probes import Recall, probe_mqar
    from fusedlm.probes.plots import recall_plot
    from fusedlm.runs.backends import use_backends
    from fusedlm.runs.recipe import run_recipe

    if target.checkpoint != "last" or target.weights != "raw":
        raise ValueError("--probe mqar trains a new model of the recipe; it takes no --checkpoint and no --weights")
    pairs = options.pop("pairs", None)
    task = Recall() if pairs is None else Recall(pairs=tuple(map(_integer, _split("--pairs", pairs))))
    recipe = load_recipe(target.run) if target.run.is_file() else run_recipe(target.run)
    recipe = with_overrides(recipe, target.overrides, "runtime")
    for override in target.overrides:
        if not override.startswith(("runtime.dtype=", "runtime.backends")):
            raise ValueError(f"override {override!r}: --probe mqar takes runtime.dtype and runtime.backends")
    device = resolve_device(target.device)
    dtype = resolve_dtype(recipe.runtime.dtype, device)
    strict = any(override.startswith("runtime.backends") for override in target.overrides)
    setup = partial(use_backends, runtime=recipe.runtime, device=device, dtype=dtype, strict=strict)
    with progress_bars() as progress:
        result = probe_mqar(recipe.model, task, setup=setup, device=device, dtype=dtype, progress=progress, **options)
    record = _record("mqar", target, result, device, dtype)
    rows = [(str(p["pairs"]), f"{p['accuracy']:.1%}", f"{p['guess']:.1%}") for p in result["accuracy"]]
    head = ("pairs", "accuracy", "guessing among the values")
    return record, recall_plot({recipe.name: result["accuracy"]}), [table(head, rows)]


def _needle(target: Target, options: dict):
    from fusedlm.probes import finetune, probe_needle
    from fusedlm.probes.needle import training_texts
    from fusedlm.probes.plots import needle_plot

    steps, lr = options.pop("steps", 0), options.pop("lr", None)
    if steps < 0:
        raise ValueError(f"--steps {steps}: must be at least 0")
    if lr is not None and not steps:
        raise ValueError(f"--lr {lr:g}: is for finetuning; give its length with --steps")
    for name in ("lengths", "depths"):
        if name in options:
            options[name] = tuple(_split(f"--{name}", options[name]))
    text, yarn = options.pop("text", None), options.pop("yarn", None)
    loaded = target.load(options.pop("data", None))
    model, tokenizer, recipe = loaded.model, loaded.tokenizer, loaded.recipe
    where = {"device": loaded.device, "dtype": loaded.dtype}
    train = recipe.train
    with progress_bars() as progress:
        documents, *_ = documents_of(text, loaded, progress)
        finetuning = None
        if steps:
            optimizer = train.optimizer if lr is None else train.optimizer.with_lr(_rate(lr))
            seed = options.get("seed", 0)
            shards = prepared_text(loaded, progress).train
            texts = training_texts(shards, seq_len=train.seq_len, eot_id=tokenizer.eot_id, seed=seed)
            model, losses = finetune(
                model,
                texts,
                tokenizer,
                trained_length=train.seq_len,
                steps=steps,
                batch_tokens=train.batch_size * train.seq_len,
                optimizer=optimizer,
                seed=seed,
                progress=progress,
                **where,
            )
            texts.close()
            last = losses[-max(1, steps // 10) :]
            finetuning = {"steps": steps, "lr": next(iter(optimizer.rates().values())), "loss": sum(last) / len(last)}
        stretch(model, recipe, yarn)
        options = {"trained_length": train.seq_len, "progress": progress} | options
        result = probe_needle(model, documents, tokenizer, **options, **where)
    result |= {"finetuning": finetuning, "yarn": yarn, "text": text and str(text)}
    record = _record("needle", target, result, **where) | {"checkpoint": loaded.step, "weights": target.weights}
    lengths = list(dict.fromkeys(cell["length"] for cell in result["cells"]))
    cells = {(cell["length"], cell["depth"]): cell for cell in result["cells"]}
    rows = [
        (f"{depth:.0%}", *(f"{cells[n, depth]['accuracy']:.0%}  {cells[n, depth]['gain']:+.2f}" for n in lengths))
        for depth in dict.fromkeys(cell["depth"] for cell in result["cells"])
    ]
    head = ("depth", *(f"{n:,} tokens ({n / train.seq_len:g}×)" for n in lengths))
    title = "Accuracy, and gain in log-likelihood of the answer (nats per token)"
    skipped = ", ".join(f"{n:,}" for n in result["left_out"])
    notes = [f"skipped, since no document is long enough: {skipped} tokens"] if skipped else []
    return record, needle_plot({recipe.name: result}), [table(head, rows, title), *notes]


def _extend(target: Target, options: dict):
    from fusedlm.probes import probe_extend
    from fusedlm.probes.plots import extend_plot
    from fusedlm.probes.usable import describe_usable, usable_context

    if "factors" in options:
        options["factors"] = tuple(_split("--factors", options["factors"]))
    text = options.pop("text", None)
    loaded = target.load(options.pop("data", None))
    where = {"device": loaded.device, "dtype": loaded.dtype}
    trained = loaded.recipe.train.seq_len
    with progress_bars() as progress:
        documents, *_ = documents_of(text, loaded, progress)
        options = {"trained_length": trained, "progress": progress} | options
        result = probe_extend(loaded.model, documents, loaded.tokenizer, **options, **where)
    result |= {"usable": usable_context(result), "text": text and str(text)}
    record = _record("extend", target, result, **where) | {"checkpoint": loaded.step, "weights": target.weights}
    multiple = result["max_multiple"]
    shown = [describe_usable(result), _by_position(result)]
    if result["curves"][0]["at_4x"] is not None:
        shown.append(_on_the_same_text(result))
    if not result["rope"]:
        shown.append("no mixer of this model has rotary embedding, which YaRN stretches")
    if multiple < 8:
        shown.append(f"no document has {2 * multiple * trained:,} tokens: longer windows were not scored")
    return record, extend_plot(result), shown


def _by_position(result: dict):
    """Bits per byte of the last bucket up to 1, 2, 4 and 8 training lengths."""
    trained = result["trained_length"]
    multiples = [n for n in (1, 2, 4, 8) if n <= result["max_multiple"]]
    at = [result["ends"].index(n * trained) for n in multiples]
    rows = [(_name(curve), *(f"{curve['bpb'][i]:.4f}" for i in at)) for curve in result["curves"]]
    title = f"Bits per byte up to a multiple of the training length, {trained:,} tokens; {result['windows']} windows"
    return table(("", *(f"{n}×" for n in multiples)), rows, title)


def _on_the_same_text(result: dict):
    rows = [
        (
            _name(curve),
            f"{curve['at_1x']:.4f}",
            f"{curve['at_4x']:.4f}",
            _change(curve["change_1x"], curve["change_1x_error"]),
            _change(curve["change_4x"], curve["change_4x_error"]),
        )
        for curve in result["curves"]
    ]
    head = ("", "1×", "4×", "1× against unstretched", "4× against unstretched")
    return table(head, rows, "Bits per byte at 1× and 4×, on the same text")


def _name(curve: dict) -> str:
    return "unstretched" if curve["yarn"] is None else f"YaRN {curve['yarn']:g}"


def _change(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:+.4f}" if error is None else f"{value:+.4f} ± {error:.4f}"


def _record(probe: str, target: Target, result: dict, device, dtype) -> dict:
    from fusedlm.runs.hardware import environment

    return {"probe": probe, "run": str(target.run), **result, "environment": environment(device, dtype)}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]], title: str | None = None):
    """A table of rich; numbers, in all columns but the first, to the right."""
    from rich import box
    from rich.table import Table

    made = Table(*head, box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in made.columns[1:]:
        column.justify = "right"
    for row in rows:
        made.add_row(*row)
    return made


def _split(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: must be a list of numbers such as 1,2,4") from None


def _integer(value: float) -> int:
    if not value.is_integer():
        raise ValueError(f"--pairs {value:g}: must be integers")
    return int(value)


def _rate(lr: float) -> float:
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"--lr {lr:g}: must be a finite number greater than 0")
    return lr
