"""Preparation at scale: what is removed, that the shards are those of the path without a pipeline, and that they do not
depend on tasks, workers, failures and kills."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import zstandard

pytest.importorskip("datatrove")

from fusedlm.data import open_prepared, prepare  # noqa: E402
from fusedlm.data.pipeline import assembly, duplicates, minhash, reading, spans, tokens  # noqa: E402
from tests.data.pipeline.corpora import (  # noqa: E402
    count_common_spans,
    digests,
    edited,
    held_out,
    seeds,
    settings,
    stored,
    text,
    write,
)

OFF = {"exact": False, "near": None, "held_out_span": 0}


@pytest.fixture
def planted(tmp_path) -> tuple[Path, dict[str, list[str]]]:
    """A folder of documents, shuffled, and the documents by what was planted."""
    train, validation = [text(seed) for seed in seeds(False, 40)], [text(seed) for seed in seeds(True, 8)]
    found = {"train": train, "validation": validation}
    found["exact"] = [train[0], train[0] + "\n", train[7], validation[0]]
    found["near"] = _on_side(False, train[10:14])
    found["near held out"] = _on_side(False, validation[1:3])
    span = validation[4].split(" ")[20:70]
    leaks = [f"{text(900 + i)} {' '.join(span)} end {i}" for i in range(9)]
    found["span"] = [document for document in leaks if not held_out(document)][:2]
    everything = [" \n", *(one for kind in found.values() for one in kind)]
    random.Random(0).shuffle(everything)
    return write(tmp_path / "text", everything), found


def _on_side(wanted: bool, originals: list[str]) -> list[str]:
    """One edited copy of each, which the split by hash sends to this side."""
    return [next(e for i in range(99) if held_out(e := edited(one, i)) == wanted) for one in originals]


def test_duplicates_and_what_is_near_held_out_text_are_removed(planted, tmp_path):
    source, found = planted
    prepared = prepare(settings(source, tmp_path / "prepared", {}))
    train, validation = stored(prepared, "train"), stored(prepared, "validation")
    assert sorted(validation) == sorted(found["validation"])
    # One of each cluster of near duplicates: the first in the order of the files.
    order = [json.loads(line)["text"] for path in sorted(source.iterdir()) for line in path.open()]
    expected, seen = [], set()
    copies = {copy: original for copy, original in zip(found["near"], found["train"][10:14], strict=True)}
    leaks = {*found["near held out"], *found["span"]}
    for document in order:
        original = copies.get(document, document).strip()
        if not document.isspace() and document not in leaks and not held_out(document) and original not in seen:
            expected.append(document)
        seen.add(original)
    assert train == expected and len(train) == 40
    assert prepared.manifest["dropped"] == {
        "empty": 1,
        "copies_of_held_out": 0,
        "exact": 4,
        "near_held_out": 2,
        "near": 4,
        "held_out_spans": 2,
        "filtered": {},
    }
    own, others = ([t for t, _ in shards.documents()] for shards in (prepared.train, prepared.validation))
    assert count_common_spans([t[1:] for t in own], [t[1:] for t in others], 50) == 0


def test_what_is_switched_off_stays(planted, tmp_path):
    source, found = planted
    for off, removed in (
        (OFF, ()),
        (OFF | {"exact": True}, ("exact",)),
        ({"exact": False, "near": None}, ("near held out", "span")),
    ):
        kept = [one for kind in found if kind not in removed for one in found[kind]]
        prepared = prepare(settings(source, tmp_path / "prepared", off))
        # Without MinHash, a near duplicate of a held-out document is found by its spans.
        texts = stored(prepared, "train") + stored(prepared, "validation")
        assert sorted(one.strip() for one in texts) == sorted(one.strip() for one in kept)


def test_a_span_is_removed_at_its_length_and_not_below(tmp_path):
    held, other = text(seeds(True, 1)[0]), text(seeds(False, 1)[0])
    documents = [held, other, *(text(seed) for seed in seeds(False, 3, 500))]
    tokenizer = {"type": "bytes"}
    for length, kept in ((61, True), (60, False)):
        leak = next(d for i in range(99) if not held_out(d := f"{text(700)}{i} {held[100:160]}\n"))
        source = write(tmp_path / f"text {length}", [*documents, leak])
        prepared = prepare(settings(source, tmp_path / "prepared", {"held_out_span": length}, tokenizer=tokenizer))
        assert held.isprintable() is False and (leak in stored(prepared, "train")) == kept
    # By default a span of bytes is longer than one of a vocabulary.
    prepared = prepare(settings(source, tmp_path / "prepared", {}, tokenizer=tokenizer))
    assert leak in stored(prepared, "train")


@pytest.mark.parametrize("split", ["hash", "validation", "several"])
def test_shards_are_those_of_the_path_without_a_pipeline(tmp_path, split):
    documents = [text(seed, 60) for seed in range(60)] + ["", text(3, 60), "a " * 3000]
    source = write(tmp_path / "text", documents, 4)
    data = {}
    if split == "validation":
        other = write(tmp_path / "other", [text(3, 60), text(3, 60), text(99)], 2)
        data["validation"] = {"type": "jsonl", "path": str(other)}
    elif split == "several":
        other = write(tmp_path / "other", [text(seed) for seed in range(200, 230)], 3)
        data["source"] = None
        data["sources"] = {
            "web": {"source": {"type": "jsonl", "path": str(source)}, "weight": 3.0},
            "books": {"source": {"type": "jsonl", "path": str(other)}, "weight": 1.0},
        }
    plain = prepare(settings(source, tmp_path / "plain", **data))
    piped = prepare(settings(source, tmp_path / "piped", OFF | {"tasks": 3}, **data))
    assert len(plain.train.shards) > 3
    assert digests(piped.directory, "manifest.json") == digests(plain.directory, "manifest.json")
    own = {"fingerprint", "config", "dropped", "checksum"}
    assert {k: v for k, v in piped.manifest.items() if k not in own} == {
        k: v for k, v in plain.manifest.items() if k not in own
    }
    removed = {key: piped.manifest["dropped"][key] for key in plain.manifest["dropped"]}
    assert removed == plain.manifest["dropped"]
    assert piped.manifest["fingerprint"] != plain.manifest["fingerprint"]


def test_tasks_and_workers_do_not_change_a_byte(planted, tmp_path):
    source, _ = planted
    found = []
    for name, workers, tasks in (("a", 1, 1), ("b", 1, 3), ("c", 2, 5)):
        pipeline = {"tasks": tasks, "executor": {"type": "local", "workers": workers}}
        found.append(prepare(settings(source, tmp_path / name, pipeline)).directory)
        assert not [path for path in (tmp_path / name).iterdir() if path.name.endswith(".work")]
    assert digests(found[0]) == digests(found[1]) == digests(found[2])
    assert found[0].name == found[1].name == found[2].name


def test_held_out_documents_are_a_function_of_seed_and_text(planted, tmp_path):
    source, _ = planted
    first, other = (prepare(settings(source, tmp_path / str(s), {"seed": s})) for s in (0, 5))
    for seed, prepared in ((0, first), (5, other)):
        assert all(held_out(document, seed) for document in stored(prepared, "validation"))
        assert not any(held_out(document, seed) for document in stored(prepared, "train"))
    assert set(stored(first, "validation")) != set(stored(other, "validation"))


STEPS = {
    "read": reading.Keep,
    "exact": duplicates.ExactPairs,
    "near": minhash.Buckets,
    "clusters": duplicates.Clusters,
    "tokenizer": tokens.MakeTokenizer,
    "tokens": tokens.Tokenize,
    "spans": spans.HeldOutSpans,
    "search": spans.SearchSpans,
    "layout": assembly.Layout,
    "shards": assembly.WriteShards,
    "finish": assembly.Finish,
}


def test_a_failure_in_any_stage_is_continued(planted, tmp_path, monkeypatch):
    """Each stage fails once in its last task, after it has written; the tasks before it are not run again."""
    source, _ = planted
    expected = digests(prepare(settings(source, tmp_path / "whole", {"tasks": 3})).directory)
    config = settings(source, tmp_path / "failing", {"tasks": 3})
    runs = []
    for name, step in STEPS.items():
        original = step.run

        def failing(self, data=None, rank=0, world_size=1, original=original, name=name):
            runs.append((name, rank))
            result = original(self, data, rank, world_size)
            if result is not None:
                yield from result
            if rank == world_size - 1 and runs.count((name, rank)) == 1:
                raise OSError(28, f"No space left for {name}")

        monkeypatch.setattr(step, "run", failing)
    for name in STEPS:
        with pytest.raises(OSError, match=f"for {name}"):
            prepare(config)
    prepared = prepare(config)
    assert digests(prepared.directory) == expected
    last = dict(sorted(set(runs)))
    # The last stage fails after the folder got its name, and there is nothing left to do.
    assert all(runs.count((name, rank)) == 1 + (rank == last[name] and name != "finish") for name, rank in set(runs))
    assert set(last) == set(STEPS)


KILLED = """
import os, signal, sys
from fusedlm.data.pipeline import {module}
from tests.data.pipeline.corpora import settings
from pathlib import Path
original = {module}.{step}.run
def run(self, data=None, rank=0, world_size=1):
    result = original(self, data, rank, world_size)
    if rank == 1 or world_size == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
{module}.{step}.run = run
from fusedlm.data import prepare
prepare(settings(Path(sys.argv[1]), Path(sys.argv[2]), {{"tasks": 3}}))
"""


@pytest.mark.parametrize(("module", "step"), [("tokens", "Tokenize"), ("assembly", "Finish")])
def test_a_killed_preparation_is_continued(planted, tmp_path, module, step):
    """After the tokens of a task were written without its marker; after the folder got its name."""
    source, _ = planted
    expected = digests(prepare(settings(source, tmp_path / "whole", {"tasks": 3})).directory)
    command = [sys.executable, "-c", KILLED.format(module=module, step=step), str(source), str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert [path for path in (tmp_path / "killed").iterdir() if path.name.endswith(".work")]
    prepared = prepare(settings(source, tmp_path / "killed", {"tasks": 3}))
    assert digests(prepared.directory) == expected
    assert sorted(path.suffix for path in (tmp_path / "killed").iterdir()) == ["", ".lock"]


def test_tasks_that_a_killed_run_left_are_waited_for(planted, tmp_path):
    source, _ = planted
    config = settings(source, tmp_path / "prepared", {})
    target = prepare(config).directory
    work = target.with_name(f".{target.name}.work")
    work.mkdir()
    for path in target.iterdir():
        path.unlink()
    target.rmdir()
    with open(work / "workers.lock", "a") as left:
        fcntl.flock(left, fcntl.LOCK_SH)
        waiting = threading.Event()

        def report(stage, done, total):
            if stage.startswith("waiting"):
                waiting.set()

        thread = threading.Thread(target=lambda: prepare(config, report))
        thread.start()
        assert waiting.wait(30) and thread.is_alive() and not target.exists()
        fcntl.flock(left, fcntl.LOCK_UN)
        thread.join(60)
    assert target.exists()


def test_other_work_in_the_folder_is_not_continued(planted, tmp_path, monkeypatch):
    source, _ = planted
    config = settings(source, tmp_path / "prepared", {"tasks": 3})
    with monkeypatch.context() as patch:
        patch.setattr(assembly.Layout, "run", _fail)
        with pytest.raises(OSError, match="full"):
            prepare(config)
    [work] = [path for path in (tmp_path / "prepared").iterdir() if path.name.endswith(".work")]
    marker = work / "text" / "left over"
    marker.touch()
    with monkeypatch.context() as patch:
        patch.setattr("fusedlm.data.pipeline.work.VERSION", 999)
        patch.setattr(assembly.Finish, "run", _fail)
        with pytest.raises(OSError, match="full"):
            prepare(config)
    assert not marker.exists() and work.exists()


def test_stored_text_that_was_damaged_is_not_passed_over(planted, tmp_path, monkeypatch):
    source, _ = planted
    config = settings(source, tmp_path / "prepared", {"tasks": 3})
    with monkeypatch.context() as patch:
        patch.setattr(tokens.Tokenize, "run", _fail)
        with pytest.raises(OSError, match="full"):
            prepare(config)
    [stored_text] = (tmp_path / "prepared").glob(".*.work/text/00001.jsonl.zst")
    lines = zstandard.ZstdDecompressor().stream_reader(stored_text.read_bytes()).read().splitlines(keepends=True)
    lines[3] = b'{"text": damaged\n'
    stored_text.write_bytes(zstandard.ZstdCompressor().compress(b"".join(lines)))
    with pytest.raises(ValueError, match=r"00001.jsonl.zst: \d+ of \d+ documents can be read; remove .*.work"):
        prepare(config)


def test_documents_of_a_validation_source_are_kept(tmp_path):
    held, copy = text(1), edited(text(1), 1)
    other = write(tmp_path / "held out", [held, held, copy, "short"], 2)
    source = write(tmp_path / "text", [held, edited(held, 2), *(text(seed) for seed in range(10, 20))])
    filters = [{"type": "gopher_quality", "min_words": 60, "min_stop_words": 0}]
    validation = {"type": "jsonl", "path": str(other)}
    prepared = prepare(settings(source, tmp_path / "prepared", {"filters": filters}, validation=validation))
    assert stored(prepared, "validation") == [held, held, copy, "short"]
    assert stored(prepared, "train") == [text(seed) for seed in range(10, 20)]
    dropped = prepared.manifest["dropped"]
    assert (dropped["copies_of_held_out"], dropped["near_held_out"], dropped["exact"], dropped["near"]) == (1, 1, 0, 0)


def _fail(*args):
    raise OSError(28, "full")


def test_prepared_text_is_opened_without_datatrove(planted, tmp_path, monkeypatch):
    source, _ = planted
    config = settings(source, tmp_path / "prepared", {})
    first = prepare(config)
    monkeypatch.setattr("fusedlm.data.preparation._run_pipeline", None)
    again = prepare(config.model_copy(update={"pipeline": config.pipeline.model_copy(update={"tasks": 2})}))
    assert again.directory == first.directory == open_prepared(first.directory).directory
