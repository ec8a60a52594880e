"""OUT/report.html, results.json, results.csv and plots/*.png."""

import json
from html import escape
from pathlib import Path

from fusedlm import __version__
from fusedlm.compare.matching import Variant
from fusedlm.compare.plots import draw_plots
from fusedlm.compare.results import Results
from fusedlm.compare.tables import cost_table, decoding_table, loss_table, size_table
from fusedlm.config import dump_recipe
from fusedlm.files import write_atomic
from fusedlm.report.page import document, facts_table, figures, folded, key_figures, numbers_table, section
from fusedlm.report.units import count

_HELD = {
    "none": "Nothing but what the changes below leave alone",
    "params": "Parameters",
    "flops": "Training FLOPs a token",
    "tokens": "Training tokens",
    "time": "Training time, by steps timed beforehand",
}
_BY = {"ffn": "hidden width of the feed-forwards", "width": "width of the model", "depth": "number of layers"}


def write_report(results: Results, out: Path) -> Path:
    """Write everything that is read by people and programs.

    Returns:
        The path of the page.

    Raises:
        OSError: a file cannot be written.
    """
    plots = draw_plots(results)
    folder = out / "plots"
    folder.mkdir(exist_ok=True)
    for plot in plots:
        (folder / f"{plot.name}.png").write_bytes(plot.png)
    write_atomic(out / "results.json", json.dumps(results.as_json(), indent=1) + "\n")
    write_atomic(out / "results.csv", results.as_csv())
    experiment = results.experiment
    body = [
        key_figures(_key_figures(results)),
        *section("Verdict", _verdicts(results)),
        *section("Loss", _table(loss_table(results))),
        *section("Held equal", _held(results)),
        *section("Plots", figures(plots)),
        *section("Cost of training", _table(cost_table(results))),
        *section("Decoding", _decoding(results)),
        *section("How it was made", facts_table(_facts(results))),
        *folded("Every run", _runs(results)),
        *folded(
            f"Recipe of {results.baseline}",
            f"<pre>{escape(dump_recipe(results.variants[results.baseline].recipe))}</pre>",
        ),
    ]
    path = out / "report.html"
    write_atomic(path, document(experiment.name, experiment.description, body, __version__))
    return path


def _key_figures(results: Results) -> list[tuple[str, str, str]]:
    finished = [row for row in results.rows if row["outcome"] == "finished"]
    n_seeds = len(results.experiment.seeds)
    device = results.environments[0].get("device_name", "–") if results.environments else "–"
    remark = "all finished" if len(finished) == len(results.rows) else f"{len(finished)} finished"
    return [
        ("Variants", str(len(results.variants)), f"{results.baseline} is the baseline"),
        ("Seeds", str(n_seeds), "the same for every variant"),
        ("Runs", str(len(results.rows)), remark),
        ("Tokens a run", count(results.variants[results.baseline].tokens), "of the baseline"),
        ("Device", results.environments[0].get("device", "–") if results.environments else "–", device),
    ]


def _verdicts(results: Results) -> str:
    sentences = [f"<li>{escape(sentence)}.</li>" for sentence in results.verdicts()]
    n = len(results.variants) - 1
    notes = [
        "Differences are taken seed by seed, between runs that read the same text in the same order; the interval is "
        "Student's over those differences. “No difference shown” means that the interval holds zero: more seeds might "
        "show one."
    ]
    if n > 1:
        notes.append(
            f"Each of the {n} intervals stands for itself: of twenty such comparisons without any difference, one is "
            "expected to miss zero."
        )
    listed = f"<ul>{''.join(sentences)}</ul>" if sentences else "<p>One variant: nothing to compare.</p>"
    return listed + "".join(f"<p>{note}</p>" for note in notes if sentences)


def _held(results: Results) -> str:
    experiment = results.experiment
    by = f", by the {_BY[experiment.match_by]}" if experiment.match in ("params", "flops") else ""
    first = f"<p>{_HELD[experiment.match]}{by}. {escape(_unequal(results))}</p>"
    head = ("Variant", "Changed by the experiment", "Changed to match")
    rows = [
        (
            name,
            "; ".join(experiment.variants[name]) or "nothing",
            "; ".join(map(str, variant.changes)) or "nothing",
        )
        for name, variant in results.variants.items()
    ]
    cells = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for name, *row in rows
    )
    changes = (
        f"<table><thead><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr></thead><tbody>{cells}</tbody></table>"
    )
    note = (
        "<p>Every variant trains by the same optimizer settings unless its changes say otherwise; none was tuned "
        "for this comparison beyond what the base recipe holds.</p>"
    )
    if any(row["ffn_flops_share"] is not None for row in results.rows):
        note += (
            "<p>FLOPs of routed feed-forwards are those of their budget; what they really computed stands under the "
            "cost of training.</p>"
        )
    return first + _table(size_table(results)) + changes + note


def _unequal(results: Results) -> str:
    """What differs by more than one part in a hundred from the baseline, whatever was matched."""
    measures = {
        "parameters": lambda variant: variant.account.parameters,
        "training FLOPs a token": lambda variant: variant.account.flops_per_token,
        "training tokens": lambda variant: variant.tokens,
        "training time": _seconds_of(results),
    }
    base = results.variants[results.baseline]
    found = []
    for what, measure in measures.items():
        ratios = [measure(v) / measure(base) for v in results.variants.values() if measure(v) and measure(base)]
        if ratios and (max(ratios) > 1.01 or min(ratios) < 0.99):
            found.append(f"{what} ({min(ratios):.2f} to {max(ratios):.2f} times {results.baseline}'s)")
    return f"Not equal: {', '.join(found)}." if found else "All else that is counted here is equal within 1%."


def _seconds_of(results: Results):
    """Settled step time by the number of steps: without warm-up and compilation."""

    def seconds(variant: Variant) -> float | None:
        step = results.summary(variant.name, "step_seconds").mean
        return None if step is None else step * variant.recipe.train.steps

    return seconds


def _decoding(results: Results) -> str | None:
    table = decoding_table(results)
    if table is None:
        return None
    base = results.variants[results.baseline].recipe.train
    where = results.environments[0].get("dtype", base.dtype) if results.environments else base.dtype
    return _table(table) + (
        f"<p>One sequence, {escape(where)}: bytes of the live state, and the median of one-token steps without "
        "sampling, after so many tokens.</p>"
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    base = results.variants[results.baseline].recipe
    train, data = base.train, base.data
    shared = [
        ("seeds", ", ".join(map(str, results.experiment.seeds))),
        ("batch", f"{train.batch_size} sequences of {train.seq_len} tokens (of {results.baseline})"),
        ("compiled", "yes" if train.compile else "no"),
        ("text", getattr(data.source, "path", data.source.type)),
        ("tokenizer", f"{data.tokenizer.type}, {results.variants[results.baseline].vocab_size:,} tokens"),
        (
            "validations on the way",
            "all held-out text" if train.eval_tokens is None else f"{train.eval_tokens:,} tokens",
        ),
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
    for name, ops in results.implementations.items():
        if ops:
            shared.append((f"ops of {name}", ", ".join(f"{op} {impl}" for op, impl in ops.items())))
    return shared


def _runs(results: Results) -> str:
    head = (
        "Run",
        "Outcome",
        "Steps",
        "Validation loss",
        "Bits per byte",
        "Lowest on the way",
        "at step",
        "Tokens a second",
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
    return _table((head, rows))


def _cell(value, how: str) -> str:
    return "–" if value is None else format(value, how)


def _table(table) -> str:
    return f'<div class="wide-table named">{numbers_table(*table)}</div>'
