"""Preparation at scale: what it removes, how fast it is, and that neither workers nor kills change a byte.

    python -m benchmarks.preparation --text TEXT [--tokenizer TOKENIZER.json] [--megabytes 20] [--out FILE]

TEXT has the line <|endoftext|> between documents. Copies, edited copies and passages of held-out documents are planted
(benchmarks/planting.py), in a temporary folder. Speeds are megabytes of text per second of processor time, so that
what else the machine does matters little; each is of one process. Each part is written to the file as it ends.
"""

import argparse
import hashlib
import itertools
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.planting import judge, plant, read_documents, spans_left, write_files
from fusedlm.config.data import DataConfig
from fusedlm.data import Loader, PreparedData, open_prepared, prepare
from fusedlm.data.packing import PackedRows
from fusedlm.data.samples import Windows
from fusedlm.files import write_atomic
from fusedlm.runs.hardware import environment

FRACTION, SPAN, N_FILES = 0.05, 50, 16
OFF = {"exact": False, "near": None, "held_out_span": 0}
GOPHER = [{"type": "gopher_quality"}, {"type": "gopher_repetition"}]
KILLS = 10
SHARDS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json; none: BPE trained on the text")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/preparation.json"))
    parser.add_argument("--only", nargs="*", default=["removal", "workers", "kills", "loader", "speed"])
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # what a subprocess of this one does
    arguments = parser.parse_args()
    if arguments.run is not None:
        _run(json.loads(arguments.run.read_text()))
        return
    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    record |= {
        "name": "preparation",
        "command": f"python -m benchmarks.preparation --text TEXT --megabytes {arguments.megabytes:g}",
        "environment": environment(torch.device("cpu"), torch.float32) | {"processor": _processor()},
        "packages": _packages(),
        "text": arguments.text.name.split(".")[0],
    }
    parts = {"removal": _removal, "workers": _workers, "kills": _kills, "loader": _loader, "speed": _speed}
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), arguments)
        for name in arguments.only:
            start = time.monotonic()
            measured = {"text_megabytes": bench.n_bytes / 1e6, "git_commit": record["environment"]["git_commit"]}
            record[name] = parts[name](bench) | measured
            print(f"{name}: {time.monotonic() - start:.0f} s", json.dumps(record[name]), flush=True)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(arguments.out, json.dumps(record, indent=1) + "\n")


class Bench:
    """The planted corpus and the clean one, in a folder."""

    def __init__(self, folder: Path, arguments: argparse.Namespace):
        self.folder = folder
        documents = read_documents(arguments.text, arguments.megabytes)
        self.planted = plant(documents, FRACTION, seed=0)
        # In the same order: of near duplicates that Wikipedia has, the first is kept.
        clean = {f"document {i}": document for i, document in enumerate(documents)}
        self.clean = {name: clean[name] for name in self.planted.texts if name in clean}
        self.n_bytes = write_files(self.planted.texts, folder / "planted", N_FILES)
        write_files(self.clean, folder / "clean", N_FILES)
        self.tokenizer = {"type": "bpe", "vocab_size": 8192}
        if arguments.tokenizer is not None:
            self.tokenizer = {"type": "file", "path": str(arguments.tokenizer)}

    def settings(self, source: str, out: str, pipeline: dict | None) -> dict:
        data = {
            "source": {"type": "jsonl", "path": str(self.folder / source)},
            "split": {"type": "hash", "fraction": FRACTION},
            "tokenizer": self.tokenizer,
            "shard_tokens": 2**20,
            "dir": str(self.folder / out),
        }
        return data if pipeline is None else data | {"pipeline": pipeline}

    def process(self, name: str, job: dict) -> subprocess.Popen:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(job))
        command = [sys.executable, "-m", "benchmarks.preparation", "--run", str(path)]
        return subprocess.Popen(command, start_new_session=True)

    def fresh(self, name: str) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name


def pipeline(workers: int, **settings) -> dict:
    return {"executor": {"type": "local", "workers": workers}} | settings


def _removal(bench: Bench) -> dict:
    found = {}
    for source in ("clean", "planted"):
        prepared = prepare(DataConfig(**bench.settings(source, source + " out", pipeline(1))))
        found[source] = _tokens(prepared)
        tokenizer, dropped = prepared.tokenizer, prepared.manifest["dropped"]
    kept, kept_clean = ([tokenizer.decode(t) for side in found[s] for t in side] for s in ("planted", "clean"))
    result = judge(bench.planted, bench.clean, kept, kept_clean, FRACTION)
    before = _tokens(prepare(DataConfig(**bench.settings("planted", "unfiltered", None))))
    spans = {"before": spans_left(*before, SPAN), "left": spans_left(*found["planted"], SPAN)}
    return result | {"dropped": dropped, "held_out_spans": {"tokens": SPAN} | spans}


def _tokens(prepared: PreparedData) -> list[list[np.ndarray]]:
    """Of training and held-out documents, without end-of-text."""
    sides = (prepared.train, prepared.validation)
    return [[tokens[1:].astype("<u4") for tokens, _ in side.documents()] for side in sides]


def _workers(bench: Bench) -> dict:
    """Seconds and digest by number of workers, each in fresh processes."""
    found = {}
    for workers in (1, 2, 4):
        bench.fresh("workers")
        start = time.monotonic()
        data = bench.settings("planted", "workers", pipeline(workers))
        assert bench.process("workers", {"data": data}).wait() == 0
        found[str(workers)] = {"seconds": time.monotonic() - start, "sha256": _digest(bench.folder / "workers")}
    return {"workers": found, "identical": len({one["sha256"] for one in found.values()}) == 1}


def _kills(bench: Bench) -> dict:
    """Kill a preparation at a random moment and continue it, ten times; processes that it leaves must not change a
    byte."""
    job = {"data": bench.settings("planted", "kills", pipeline(2, tasks=N_FILES))}
    bench.fresh("kills")
    start = time.monotonic()
    assert bench.process("kills", job).wait() == 0
    seconds, expected = time.monotonic() - start, _digest(bench.folder / "kills")
    draw, faults, moments = random.Random(0), 0, []
    while len(moments) < KILLS:
        bench.fresh("kills")
        process = bench.process("kills", job)
        try:
            process.wait(draw.uniform(0.05, 0.95) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # the parent alone: its workers must end by themselves
            process.wait()
            moments.append(_stage(bench.folder / "kills"))
            assert bench.process("kills", job).wait() == 0
        left = [path.name for path in (bench.folder / "kills").iterdir() if path.name.endswith((".work", ".tmp"))]
        faults += bool(left) or _digest(bench.folder / "kills") != expected
    return {"kills": len(moments), "stages": moments, "faults": faults}


def _stage(folder: Path) -> str:
    """The stage of the task that began last."""
    logs = list(folder.glob(".*.work/logs/*/logs/*"))
    return max(logs, key=lambda path: path.stat().st_ctime).parts[-3] if logs else "before the first task"


def _loader(bench: Bench) -> dict:
    """Ten thousand shards under a limit of 1,024 open files: opening, and the first batch at sample 10^9."""
    data = bench.settings("planted", "loader", None)
    data |= {"source": {"type": "text", "path": str(_short_documents(bench)), "separator": "--"}}
    data |= {"tokenizer": {"type": "bytes"}, "shard_tokens": 64}
    bench.fresh("loader")
    assert bench.process("loader", {"data": data, "loader": True}).wait() == 0
    return json.loads((bench.folder / "loaded.json").read_text())


def _short_documents(bench: Bench) -> Path:
    """Pieces of a hundred characters, so many that every one is a shard."""
    texts = (" ".join(text.split()) for text in bench.clean.values())
    pieces = (text[i : i + 100] for text in texts for i in range(0, len(text) - 100, 100))
    path = bench.folder / "short.txt"
    path.write_text("\n--\n".join(itertools.islice(pieces, int(SHARDS / (1 - FRACTION) * 1.02))), encoding="utf-8")
    return path


def _draw_at_a_billion(job: dict) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    prepared = prepare(DataConfig(**job["data"]))
    start = time.monotonic()
    prepared = open_prepared(prepared.directory, verify=False)
    opened = time.monotonic() - start
    seconds = {}
    for kind in (Windows, PackedRows):
        for first in (0, 10**9):
            start = time.monotonic()
            samples = kind(prepared.train, 64, 0)
            options = {"seq_len": 64, "batch_size": 64, "seed": 0, "samples": samples, "start_sample": first}
            with Loader(prepared.train, **options) as loader:
                next(loader)
            seconds[f"{kind.__name__} from sample {first:.0e}"] = time.monotonic() - start
    result = {
        "shards": len(prepared.train.shards),
        "open_files_limit": 1024,
        "opening_seconds": opened,
        "first_batch_seconds": seconds,
    }
    Path(job["data"]["dir"]).with_name("loaded.json").write_text(json.dumps(result))


def _speed(bench: Bench) -> dict:
    """Megabytes per second of processor time of one process."""
    paths = {
        "without pipeline": {"data": bench.settings("planted", "speed", None)},
        "pipeline, nothing removed": {"data": bench.settings("planted", "speed", pipeline(1, **OFF))},
        "exact, near, held out": {"data": bench.settings("planted", "speed", pipeline(1))},
        "exact, near, held out, gopher": {"data": bench.settings("planted", "speed", pipeline(1, filters=GOPHER))},
        "datatrove, words by white space": {"datatrove": "white space"},
        "datatrove, words by white space, gopher": {"datatrove": "white space", "gopher": True},
        "datatrove, words by spaCy, gopher": {"datatrove": "spacy", "gopher": True, "files": 1},
    }
    found = {}
    for name, job in paths.items():
        bench.fresh("speed")
        files = job.get("files", N_FILES)
        if "datatrove" in job:
            job |= {"source": str(bench.folder / "planted"), "out": str(bench.folder / "speed"), "tasks": N_FILES}
            job["tokenizer"] = str(_tokenizer_file(bench))
        process = bench.process("speed", job)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            print(f"{name}: ended with {process.returncode}", flush=True)
            continue
        start_up = json.loads((bench.folder / "imported.json").read_text())
        seconds = usage.ru_utime + usage.ru_stime - start_up
        n_bytes = bench.n_bytes if files == N_FILES else _text_bytes(bench.folder / "planted" / "part-000.jsonl")
        found[name] = {"cpu_seconds": seconds, "megabytes_per_cpu_second": n_bytes / 1e6 / seconds}
        found[name] |= {"megabytes": n_bytes / 1e6}
    return found


def _text_bytes(path: Path) -> int:
    return sum(len(json.loads(line)["text"].encode()) for line in path.open(encoding="utf-8"))


def _tokenizer_file(bench: Bench) -> Path:
    if "path" in bench.tokenizer:
        return Path(bench.tokenizer["path"])
    prepared = prepare(DataConfig(**bench.settings("clean", "clean out", pipeline(1))))
    return prepared.directory / "tokenizer.json"


def _run(job: dict) -> None:
    """In a process of its own."""
    # One thread in the tokenizer, as in the workers of a pipeline.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import fusedlm.data.pipeline.run  # noqa: F401 (before the measurement begins)

    usage = resource.getrusage(resource.RUSAGE_SELF)
    imported = usage.ru_utime + usage.ru_stime
    folder = Path(job["out"] if "datatrove" in job else job["data"]["dir"]).parent
    (folder / "imported.json").write_text(json.dumps(imported))
    if "loader" in job:
        _draw_at_a_billion(job)
        return
    if "datatrove" not in job:
        prepare(DataConfig(**job["data"]))
        return
    _plain_datatrove(job)


def _plain_datatrove(job: dict) -> None:
    """The pipeline of datatrove's examples, of its own blocks: filters, MinHash, tokens."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.pipeline.writers import JsonlWriter

    from fusedlm.data.pipeline.filters import Words
    from fusedlm.data.pipeline.minhash import hash_words

    words = Words() if job["datatrove"] == "white space" else "en"
    filters = [GopherQualityFilter(language=words), GopherRepetitionFilter(language=words)] if job.get("gopher") else []
    out, config = Path(job["out"]), MinhashConfig()
    glob = "part-000.jsonl" if job.get("files") == 1 else "*.jsonl"
    signatures = MinhashDedupSignature(str(out / "signatures"), config=config, language=words)
    signatures._hash_func = hash_words  # its own takes no text with xxhash 4

    def run(name: str, tasks: int, *steps) -> None:
        LocalPipelineExecutor(list(steps), tasks=tasks, workers=1, logging_dir=str(out / "logs" / name)).run()

    tasks = job["tasks"]
    stored = JsonlReader(str(out / "text"), compression="zstd")
    writer = JsonlWriter(str(out / "text"), compression="zstd")
    run("read", tasks, JsonlReader(job["source"], glob_pattern=glob), *filters, writer)
    run("signatures", tasks, stored, signatures)
    run("buckets", 14, MinhashDedupBuckets(str(out / "signatures"), str(out / "buckets"), config=config))
    run("clusters", 1, MinhashDedupCluster(str(out / "buckets"), str(out / "remove"), config=config))
    tokens = DocumentTokenizer(
        str(out / "tokens"), tokenizer_name_or_path=job["tokenizer"], eos_token="<|endoftext|>", shuffle_documents=False
    )
    run("tokens", tasks, stored, MinhashDedupFilter(str(out / "remove")), tokens)


def _digest(folder: Path) -> str:
    """Of every file of the one prepared folder in it, and its name."""
    [prepared] = [path for path in folder.iterdir() if not path.name.startswith(".")]
    open_prepared(prepared)
    digest = hashlib.sha256(prepared.name.encode())
    for path in sorted(prepared.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _packages() -> dict[str, str]:
    from fusedlm.data.pipeline.requirements import versions

    return versions()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
