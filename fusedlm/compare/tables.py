"""Results as rows of text, for the page and the terminal."""

from fusedlm.compare.plots import length_name
from fusedlm.compare.results import Results
from fusedlm.compare.statistics import Summary
from fusedlm.compare.tuning import Trial, rates_text
from fusedlm.report.units import count, duration, memory, percent, size

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]  # head, rows

_NONE = "–"
_PADDING, _MARGIN = 3, 2  # characters of the terminal's tables: of a column with its border, and of the outer border


def loss_table(results: Results) -> Table:
    """Losses, a row per variant."""
    head = (
        "Variant",
        "Seeds",
        "Validation loss ± std",
        "95% interval",
        "Bits per byte ± std",
        "Lowest during training",
        "Training, last 10",
    )
    rows = []
    for name in results.variants:
        loss, bpb = results.summary(name, "val_loss"), results.summary(name, "val_bpb")
        n_all = len(results.of(name, None))
        rows.append(
            (
                name,
                str(loss.n) if loss.n == n_all else f"{loss.n} of {n_all}",
                _loss(results, name, loss),
                _interval(loss),
                _with_std(bpb),
                _value(results.summary(name, "best_val_loss").mean),
                _value(results.summary(name, "train_loss_last_10").mean),
            )
        )
    return head, rows


def tuning_table(results: Results) -> Table:
    """Final losses of the trials of learning rates, a row per variant and a column per factor."""
    what = results.metric[1]
    factors = sorted(results.experiment.tune.lr_factors)
    head = ("Variant", "Trials", "Best factor", "Learning rates", *(f"{what}, ×{factor:g}" for factor in factors))
    rows = []
    for name, tuning in results.tunings.items():
        best = tuning.best
        made = sum(trial.outcome != "not run" for trial in tuning.trials)
        rows.append(
            (
                name,
                str(made) if tuning.is_complete else f"{made} of {len(tuning.trials)}",
                _NONE if best is None else f"{best.factor:g}" + (f" ({tuning.edge})" if tuning.edge else ""),
                _NONE if best is None else rates_text(best.rates),
                *(_trial_loss(results, trial) for trial in tuning.trials),
            )
        )
    return head, rows


def _trial_loss(results: Results, trial: Trial) -> str:
    loss = getattr(trial, results.metric[0])
    return trial.outcome if loss is None else f"{loss:.4f}"


def time_table(results: Results) -> Table | None:
    """Steps and seconds to the baseline's final loss, a row per variant; None: not known."""
    found = {name: results.time_to_loss(name) for name in results.variants}
    if not any(time and time.n_runs for name, time in found.items() if name != results.baseline):
        return None
    head = ("Variant", "Reached", "Steps", "of the baseline's", "95% interval", "Seconds", "of the baseline's")
    head += ("95% interval",)
    rows = []
    for name, time in found.items():
        if name == results.baseline:
            cells = ("reference", f"{time.steps:,.0f}", "1", _NONE, _seconds(time.seconds), "1", _NONE)
        elif time.steps is None:
            cells = (f"not reached ({time.n_reached} of {time.n_runs} runs)", *[_NONE] * 6)
        else:
            steps, seconds = time.steps_ratio, time.seconds_ratio
            cells = (f"{time.n_reached} of {time.n_runs} runs", f"{time.steps:,.0f}", *_ratio(steps))
            cells += (_seconds(time.seconds), *_ratio(seconds))
        rows.append((name, *cells))
    return head, rows


def _ratio(found: Summary) -> tuple[str, str]:
    interval = _NONE if found.low is None else f"{found.low:.3f} to {found.high:.3f}"
    return _NONE if found.mean is None else f"{found.mean:.3f}", interval


def _seconds(value: float | None) -> str:
    if value is None:
        return _NONE
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def size_table(results: Results) -> Table:
    """Sizes, a row per variant."""
    head = (
        "Variant",
        "Parameters",
        "Embedding parameters",
        "FLOPs per token",
        "Steps",
        "Tokens",
        "Training FLOPs",
        "Match",
    )
    rows = []
    for name, variant in results.variants.items():
        found = variant.account
        parameters = count(found.parameters)
        if found.active_parameters != found.parameters:
            parameters += f" ({count(found.active_parameters)} active)"
        rows.append(
            (
                name,
                parameters,
                count(found.embedding_parameters),
                count(found.flops_per_token),
                f"{variant.recipe.train.steps:,}",
                count(variant.tokens),
                f"{found.flops_per_token * variant.tokens:.3g}",
                _NONE if variant.deviation is None else f"{100 * variant.deviation:+.2f}%",
            )
        )
    return head, rows


def cost_table(results: Results) -> Table:
    """Cost of training, a row per variant."""
    head = ("Variant", "Tokens per second", "± std", "Step", "Training time", "Peak memory", "Routed FLOPs / full")
    rows = []
    for name in results.variants:
        rate, step = results.summary(name, "tokens_per_second"), results.summary(name, "step_seconds").mean
        peaks = results.values(name, "peak_memory_bytes")
        rows.append(
            (
                results.label(name),
                count(rate.mean),
                count(rate.std),
                _NONE if step is None else f"{1000 * step:.4g} ms",
                duration(results.summary(name, "training_seconds").mean),
                memory(max(peaks.values()) if peaks else None),
                percent(results.summary(name, "ffn_flops_share").mean),
            )
        )
    if all(row[-1] == _NONE for row in rows):  # no feed-forward is routed
        return head[:-1], [row[:-1] for row in rows]
    return head, rows


def decoding_table(results: Results) -> Table | None:
    """Decoding, a row per variant; None: not measured."""
    lengths = results.experiment.decode_lengths
    if not lengths or not any(results.decoding.values()):
        return None
    head = (
        "Variant",
        *(f"State, {length_name(length)}" for length in lengths),
        *(f"Tokens per second, {length_name(length)}" for length in lengths),
    )
    rows = []
    for name, measured in results.decoding.items():
        found = [(measured or {}).get(str(length)) for length in lengths]
        rows.append(
            (
                name,
                *(size(None if pair is None else pair[0]) for pair in found),
                *(count(None if pair is None else pair[1]) for pair in found),
            )
        )
    return head, rows


def summary_table(results: Results) -> Table:
    """One line per variant, for the terminal."""
    column, _, unit = results.metric
    lengths = results.experiment.decode_lengths
    last = lengths[-1] if lengths else None
    head = ("variant", "parameters", "FLOPs/token", f"validation, {unit}", "bits per byte", "tokens/s", "memory")
    if last is not None:
        head += (f"state at {length_name(last)}", f"decode/s at {length_name(last)}")
    rows = []
    for name, variant in results.variants.items():
        peaks = results.values(name, "peak_memory_bytes")
        row = (
            results.label(name),
            count(variant.account.parameters),
            count(variant.account.flops_per_token),
            _loss(results, name, results.summary(name, column)),
            _with_std(results.summary(name, "val_bpb")),
            count(results.summary(name, "tokens_per_second").mean),
            memory(max(peaks.values()) if peaks else None),
        )
        if last is not None:
            pair = (results.decoding[name] or {}).get(str(last)) or (None, None)
            row += (size(pair[0]), count(pair[1]))
        rows.append(row)
    if column == "val_bpb":
        return head[:4] + head[5:], [row[:4] + row[5:] for row in rows]
    return head, rows


def split_columns(head: tuple[str, ...], rows: list[tuple[str, ...]], width: int | None) -> list[Table]:
    """Tables of the same rows that each fit a width in characters, with the first column in every one.

    Cells are not wrapped; heads are, at spaces, and the first column is at most a third of the width.
    """
    if width is None:
        return [(head, rows)]
    widths = [
        _PADDING + max(max(map(len, name.split())), *(len(row[i]) for row in rows)) for i, name in enumerate(head)
    ]
    first = min(widths[0], width // 3)
    parts, used = [[0]], first
    for column in range(1, len(head)):
        if len(parts[-1]) > 1 and used + widths[column] > width - _MARGIN:
            parts.append([0])
            used = first
        parts[-1].append(column)
        used += widths[column]
    return [(tuple(head[i] for i in part), [tuple(row[i] for i in part) for row in rows]) for part in parts]


def _loss(results: Results, name: str, found: Summary) -> str:
    """Mean and standard deviation, or how the runs ended without one."""
    if found.n == 0:
        outcomes = {row["outcome"] for row in results.of(name, None)}
        return next((outcome for outcome in ("diverged", "failed") if outcome in outcomes), _NONE)
    return _with_std(found)


def _value(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"


def _with_std(found: Summary) -> str:
    return _value(found.mean) if found.std is None else f"{found.mean:.4f} ± {found.std:.4f}"


def _interval(found: Summary) -> str:
    return _NONE if found.low is None else f"{found.low:.4f} to {found.high:.4f}"
