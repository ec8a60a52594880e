"""What the engine counts, and the text format of Prometheus."""

import math
from bisect import bisect_left
from collections.abc import Iterable

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Counts of values up to each bound, their sum and their number."""

    def __init__(self, bounds: Iterable[float]):
        self.bounds = (*bounds, math.inf)
        self.counts = [0] * len(self.bounds)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterable[str]:
        total = 0
        for bound, n in zip(self.bounds, self.counts, strict=True):
            total += n
            yield f'{name}_bucket{{le="{"+Inf" if bound == math.inf else f"{bound:g}"}"}} {total}'
        yield f"{name}_sum {self.sum}"
        yield f"{name}_count {total}"


class EngineMetrics:
    """Counted by the engine. Seconds are those of its clock."""

    def __init__(self):
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.steps = self.cancelled = 0
        self.finished = {"stop": 0, "length": 0, "error": 0}
        self.first_token = Histogram(_SECONDS)
        self.between_tokens = Histogram(_SECONDS)
        self.duration = Histogram(_SECONDS)
        self.batch_sizes = Histogram(_SIZES)

    def token(self, sequence, now: float) -> None:
        """A sequence gets a token now."""
        self.generated_tokens += 1
        if sequence.last_token_at is None:
            self.first_token.observe(now - sequence.arrived)
        else:
            self.between_tokens.observe(now - sequence.last_token_at)

    def finish(self, sequence, reason: str, now: float) -> None:
        self.finished[reason] += 1
        self.duration.observe(now - sequence.arrived)


def engine_lines(engine) -> list[str]:
    """The metrics of an engine in the text format of Prometheus (version 0.0.4)."""
    own, cache, slots = engine.metrics, engine.cache, engine.slots
    lines: list[str] = []

    def add(name: str, kind: str, text: str, *samples: tuple[str, float]) -> None:
        lines.extend([f"# HELP fusedlm_{name} {text}", f"# TYPE fusedlm_{name} {kind}"])
        # In full: rates are differences of counters.
        lines.extend(f"fusedlm_{name}{labels} {value}" for labels, value in samples)

    def add_histogram(name: str, text: str, histogram: Histogram) -> None:
        add(name, "histogram", text)
        lines.extend(histogram.lines(f"fusedlm_{name}"))

    add("prompt_tokens_total", "counter", "Tokens of prompts that were computed.", ("", own.prompt_tokens))
    add("cached_prompt_tokens_total", "counter", "Tokens of prompts found in the cache.", ("", own.cached_tokens))
    add("generated_tokens_total", "counter", "Tokens generated.", ("", own.generated_tokens))
    add("steps_total", "counter", "Decoding steps.", ("", own.steps))
    add("graphed_steps_total", "counter", "Decoding steps that were CUDA graphs.", ("", engine.graphed_steps))
    add("graphed_prompts_total", "counter", "Pieces of prompts that were CUDA graphs.", ("", engine.graphed_prompts))
    finished = [(f'{{reason="{reason}"}}', n) for reason, n in own.finished.items()]
    add("finished_sequences_total", "counter", "Sequences that ended, by reason.", *finished)
    add("cancelled_sequences_total", "counter", "Sequences cancelled by their client.", ("", own.cancelled))
    add("running_sequences", "gauge", "Sequences being read or decoded.", ("", engine.n_running))
    add("waiting_sequences", "gauge", "Sequences in the queue.", ("", len(engine.queue)))
    add("slots", "gauge", "Rows of the decoding state that sequences have.", ("", len(slots)))
    add("state_bytes", "gauge", "Bytes of the decoding state.", ("", slots.nbytes()))
    add("prefix_cache_hits_total", "counter", "Prompts whose beginning was in the prefix cache.", ("", cache.hits))
    add("prefix_cache_misses_total", "counter", "Prompts whose beginning was not.", ("", cache.misses))
    add("prefix_cache_evicted_blocks_total", "counter", "Blocks dropped from the prefix cache.", ("", cache.evicted))
    add("prefix_cache_blocks", "gauge", "Blocks of the prefix cache.", ("", len(cache)))
    add("prefix_cache_snapshots", "gauge", "Blocks with a snapshot of recurrent states.", ("", cache.n_snapshots))
    add("prefix_cache_bytes", "gauge", "Bytes of the prefix cache.", ("", cache.nbytes))
    add_histogram("time_to_first_token_seconds", "From arrival to the first token.", own.first_token)
    add_histogram("inter_token_seconds", "Between two tokens of a sequence.", own.between_tokens)
    add_histogram("sequence_seconds", "From arrival to the end.", own.duration)
    add_histogram("batch_size", "Sequences per decoding step.", own.batch_sizes)
    return lines
