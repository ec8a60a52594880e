"""OUT/report.html, results.json, results.csv, trials.csv of a tuned experiment, and plots/*.png."""

from html import escape
from pathlib import Path

from fusedlm import __version__
from fusedlm.compare.matching import Variant
from fusedlm.compare.plots import draw_plots
from fusedlm.compare.results import Results
from fusedlm.compare.tables import cost_table, decoding_table, loss_table, size_table, time_table, tuning_table
from fusedlm.compare.tuning import trials_csv
from fusedlm.config import dump_recipe
from fusedlm.files import write_atomic
from fusedlm.report.facts import header_facts
from fusedlm.report.page import (
    document,
    facts_table,
    figures,
    folded,
    key_figures,
    numbers_table,
    section,
    text_table,
)
from fusedlm.report.units import count
from fusedlm.strict_json import dumps

_MATCHED = {
    "none": "Nothing is matched beyond what the changes below keep",
    "params": "Parameters",
    "flops": "Training FLOPs per token",
    "tokens": "Training tokens",
    "time": "Training time, from steps timed before training",
}
_BY = {"ffn": "hidden width of the feed-forwards", "width": "width of the model", "depth": "number of layers"}


def write_report(results: Results, out: Path) -> Path:
    """Write the page, the plots, results.json, results.csv, and trials.csv if learning rates were tuned.

    Returns:
        The path of the page.

    Raises:
        OSError: a file cannot be written.
    """
    plots = draw_plots(results)
    folder = out / "plots"
    folder.mkdir(exist_ok=True)
    for plot in plots:
        write_atomic(folder / f"{plot.name}.png", plot.png)
    write_atomic(out / "results.json", dumps(results.as_json(), indent=1) + "\n")
    write_atomic(out / "results.csv", results.as_csv())
    if results.tunings:
        write_atomic(out / "trials.csv", trials_csv(results.tunings))
    experiment = results.experiment
    body = [
        *section("Verdict", _verdicts(results)),
        key_figures(_key_figures(results)),
        *section("Loss", numbers_table(*loss_table(results))),
        *section("Steps and seconds to the baseline's loss", _time_to_loss(results)),
        *section("Learning rates", _tuned(results)),
        *section("Matching", _matched(results)),
        *section("Plots", figures(plots)),
        *section("Cost of training", numbers_table(*cost_table(results)) + _sharing(results)),
        *section("Decoding", _decoding(results)),
        *section("Setup", facts_table(_facts(results))),
        *folded("Every run", _runs(results)),
        *folded(
            f"Recipe of {results.baseline}",
            f"<pre>{escape(dump_recipe(results.variants[results.baseline].recipe))}</pre>",
        ),
    ]
    path = out / "report.html"
    write_atomic(path, document(experiment.name, experiment.description, _header(results), body, __version__))
    return path


def _header(results: Results) -> list[tuple[str, str]]:
    """Text, epochs, device and date, of the baseline where variants differ."""
    base = results.variants[results.baseline]
    environment = (results.environments[0] if results.environments else {}) | {"data": results.data}
    environment["date"] = " to ".join(dict.fromkeys((results.dates[0], results.dates[-1]))) if results.dates else ""
    devices = dict.fromkeys(str(found.get("device_name")) for found in results.environments)
    environment["device_name"] = ", ".join(devices)
    return header_facts(base.recipe.model_dump(mode="json"), environment, float(base.tokens))


def _key_figures(results: Results) -> list[tuple[str, str, str]]:
    finished = [row for row in results.rows if row["outcome"] == "finished"]
    n_seeds = len(results.experiment.seeds)
    remark = "all finished" if len(finished) == len(results.rows) else f"{len(finished)} finished"
    return [
        ("Variants", str(len(results.variants)), f"baseline: {results.baseline}"),
        ("Seeds", str(n_seeds), "the same for every variant"),
        ("Runs", str(len(results.rows)), remark),
        ("Tokens per run", count(results.variants[results.baseline].tokens), "of the baseline"),
    ]


def _verdicts(results: Results) -> str:
    sentences = [f"<li>{escape(sentence)}.</li>" for sentence in results.verdicts()]
    n = len(results.variants) - 1
    notes = [
        "Differences are paired by seed, between runs that read the same text in the same order; the interval is from "
        "Student's t over these differences. “No difference shown” means that the interval includes zero: more seeds "
        "might show one."
    ]
    if n > 1:
        notes.append(
            f"The {n} intervals are not corrected for multiple comparisons: of twenty without a difference, one is "
            "expected to exclude zero."
        )
    if not sentences:
        return "<p>One variant: there is nothing to compare.</p>"
    remarks = "".join(f"<p class=remark>{note}</p>" for note in notes)
    return f"<ul class=verdicts>{''.join(sentences)}</ul>{remarks}"


def _time_to_loss(results: Results) -> str | None:
    """None: validations during training are not comparable."""
    table = time_table(results)
    if table is None:
        return None
    weights = results.experiment.weights
    of_weights = "" if weights == "raw" else f" of {weights} weights"
    return numbers_table(*table) + (
        f"<p>The loss is the mean over seeds of the last validation{of_weights} of {escape(results.baseline)} during "
        f"training, {results.baseline_bpb:.4f} bits per byte; a variant reaches it where its own validations first are "
        "at or below it, by linear interpolation between two. Ratios are to the mean steps and seconds of all training "
        "of the baseline, with intervals of Student's t over seeds; there is no mean unless every run reaches the "
        "loss. Seconds are those of steps, without validations and compilation.</p>"
    )


def _tuned(results: Results) -> str | None:
    """The trials of learning rates; None: there are none."""
    tune = results.experiment.tune
    if not results.tunings:
        return None
    steps = "as many steps as a run" if tune.steps is None else f"{tune.steps:,} steps of {results.baseline}"
    first = (
        f"<p>{_count(len(tune.lr_factors), 'trial')} per variant, with seed {tune.seed} and {steps}: all learning "
        "rates of a variant times a factor. Its runs use the rates of the trial with the lowest final validation "
        "loss.</p>"
    )
    remarks = [remark for tuning in results.tunings.values() for remark in tuning.remarks()]
    listed = "".join(f"<li>{escape(remark)}.</li>" for remark in remarks)
    return first + numbers_table(*tuning_table(results)) + (f"<ul>{listed}</ul>" if listed else "")


def _matched(results: Results) -> str:
    experiment = results.experiment
    by = f", by the {_BY[experiment.match_by]}" if experiment.match in ("params", "flops") else ""
    first = f"<p>{_MATCHED[experiment.match]}{by}. {escape(_unequal(results))}</p>"
    head = ("Variant", "Changed by the experiment", "Changed to match")
    rows = [
        (
            name,
            "; ".join(experiment.variants[name]) or "nothing",
            "; ".join(map(str, variant.changes)) or "nothing",
        )
        for name, variant in results.variants.items()
    ]
    changes = text_table(head, rows)
    tuned = "none was tuned for this comparison beyond the base recipe"
    if results.tunings:
        tuned = f"the learning rates of each are the best of {_count(len(experiment.tune.lr_factors), 'trial')}"
    note = f"<p>All variants have the same optimizer settings unless their changes say otherwise; {tuned}.</p>"
    if any(row["ffn_flops_share"] is not None for row in results.rows):
        note += (
            "<p>FLOPs of routed feed-forwards are those of their budget; measured ones are listed under the cost of "
            "training.</p>"
        )
    return first + numbers_table(*size_table(results)) + changes + note


def _unequal(results: Results) -> str:
    """The quantities that differ from the baseline by more than 1%, matched or not."""
    measures = {
        "parameters": lambda variant: variant.account.parameters,
        "training FLOPs per token": lambda variant: variant.account.flops_per_token,
        "training tokens": lambda variant: variant.tokens,
        "training time": _seconds_of(results),
    }
    base = results.variants[results.baseline]
    found, equal = [], []
    for what, measure in measures.items():
        ratios = [measure(v) / measure(base) for v in results.variants.values() if measure(v) and measure(base)]
        if ratios and (max(ratios) > 1.01 or min(ratios) < 0.99):
            found.append(f"{what} ({min(ratios):.2f} to {max(ratios):.2f} times {results.baseline}'s)")
        elif len(ratios) == len(results.variants):
            equal.append(what)
    return f"Not equal: {', '.join(found)}." if found else f"Equal within 1%: {', '.join(equal)}."


def _seconds_of(results: Results):
    """Median step time times the number of steps: without warm-up and compilation."""

    def seconds(variant: Variant) -> float | None:
        step = results.summary(variant.name, "step_seconds").mean
        return None if step is None else step * variant.recipe.train.steps

    return seconds


def _sharing(results: Results) -> str:
    n = len(results.shared)
    if not n:
        return ""
    runs = "All runs" if n == len(results.rows) else _count(n, "run")
    return f"<p>{runs} shared a GPU with others; their speeds and times are not given.</p>"


def _decoding(results: Results) -> str | None:
    table = decoding_table(results)
    if table is None:
        return None
    base = results.variants[results.baseline].recipe.runtime
    where = results.environments[0].get("dtype", base.dtype) if results.environments else base.dtype
    return numbers_table(*table) + (
        f"<p>One sequence, {escape(where)}: bytes of the live state, and tokens per second from the median one-token "
        "step without sampling, after each number of tokens.</p>"
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    base = results.variants[results.baseline].recipe
    train, data = base.train, base.data
    shared = [
        ("seeds", ", ".join(map(str, results.experiment.seeds))),
        ("batch", f"{train.batch_size} sequences of {train.seq_len} tokens ({results.baseline})"),
        ("compiled", "yes" if base.runtime.compile else "no"),
        ("text", ", ".join(getattr(one, "path", one.type) for one in data.named_sources().values())),
        ("tokenizer", f"{data.tokenizer.type}, {results.variants[results.baseline].vocab_size:,} tokens"),
        (
            "validations during training",
            "all validation text" if train.eval_tokens is None else f"{train.eval_tokens:,} tokens",
        ),
        ("validation windows", f"{train.seq_len} tokens, stride {train.seq_len} ({results.baseline})"),
        ("date", " to ".join(dict.fromkeys((results.dates[0], results.dates[-1]))) if results.dates else "–"),
    ]
    known = results.environments
    for key in dict.fromkeys(key for found in known for key in found if key != "runs"):
        values = {str(found.get(key)): 0 for found in known}
        for found in known:
            values[str(found.get(key))] += found["runs"]
        values.pop("None", None)
        if len(values) == 1:
            shared.append((key, next(iter(values))))
        elif values:
            shared.append((key, ", ".join(f"{value} ({n} runs)" for value, n in values.items())))
    for name, ops in results.backends.items():
        if ops:
            shared.append((f"ops of {name}", ", ".join(f"{op} {backend}" for op, backend in ops.items())))
    return shared


def _runs(results: Results) -> str:
    head = (
        "Run",
        "Outcome",
        "Steps",
        "Validation loss",
        "Bits per byte",
        "Lowest during training",
        "at step",
        "Tokens per second",
    )
    rows = [
        (
            f"{row['variant']}, seed {row['seed']}",
            row["outcome"],
            _cell(row["steps"], ",d"),
            _cell(row["val_loss"], ".4f"),
            _cell(row["val_bpb"], ".4f"),
            _cell(row["best_val_loss"], ".4f"),
            _cell(row["best_val_step"], ",d"),
            count(row["tokens_per_second"]),
        )
        for row in results.rows
    ]
    return numbers_table(head, rows)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n > 1)}"


def _cell(value, how: str) -> str:
    return "–" if value is None else format(value, how)
