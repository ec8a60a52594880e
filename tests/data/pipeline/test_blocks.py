"""The parts of a pipeline: clusters, spans, signatures, filters, files."""

import gzip
import os
import random
import threading
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

pytest.importorskip("datatrove")

from datatrove.data import Document  # noqa: E402
from datatrove.pipeline.dedup import MinhashDedupSignature  # noqa: E402
from datatrove.pipeline.filters.base_filter import get_filter_result  # noqa: E402

from fusedlm.config.data import JSONLSource, ParquetSource, TextSource, WarcSource  # noqa: E402
from fusedlm.config.pipeline import FineWebQuality, GopherQuality, GopherRepetition, MinHash  # noqa: E402
from fusedlm.data.corpus import Corpus  # noqa: E402
from fusedlm.data.pipeline import minhash, spans, work  # noqa: E402
from fusedlm.data.pipeline.duplicates import unite  # noqa: E402
from fusedlm.data.pipeline.filters import Words, make_filters, words_of  # noqa: E402
from fusedlm.data.pipeline.spans import SpanSet, documents_with_spans, span_hashes  # noqa: E402
from fusedlm.data.pipeline.work import group_files  # noqa: E402
from fusedlm.data.sources import open_source  # noqa: E402
from tests.data.pipeline.corpora import settings, text, write  # noqa: E402


def test_sets_are_united_to_their_least_member():
    rng = np.random.default_rng(0)
    for case in range(50):
        n, pairs = int(rng.integers(1, 200)), int(rng.integers(0, 250))
        a, b = rng.integers(0, n, (2, pairs))
        if case % 3 == 0:  # a long chain
            order = rng.permutation(n)
            a, b = order[:-1], order[1:]
        sets = [{i} for i in range(n)]
        for i, j in zip(a, b, strict=True):
            if sets[i] is not sets[j]:
                sets[i] |= sets[j]
                for k in sets[i]:
                    sets[k] = sets[i]
        labels = np.arange(n)
        cut = len(a) // 3  # in two calls, as of two buckets
        unite(labels, a[:cut], b[:cut])
        unite(labels, a[cut:], b[cut:])
        assert labels.tolist() == [min(one) for one in sets]


def test_spans_are_found_at_any_place_and_no_others(monkeypatch):
    monkeypatch.setattr(spans, "_CHUNK", 64)
    rng, eot = np.random.default_rng(0), 9
    for case in range(60):
        length = int(rng.integers(1, 12))
        held_out = [rng.integers(0, 3, int(rng.integers(0, 30))) for _ in range(4)]
        documents = [rng.integers(0, 3, int(rng.integers(0, 60))) for _ in range(20)]
        if case % 2:
            documents[7] = np.concatenate([rng.integers(0, 3, 70), held_out[0], rng.integers(0, 3, 3)])
        known = {tuple(one[i : i + length]) for one in held_out for i in range(len(one) - length + 1)}
        expected = [
            any(tuple(one[i : i + length]) in known for i in range(len(one) - length + 1)) for one in documents
        ]
        hashes = np.unique(np.concatenate([span_hashes(one, length) for one in held_out]))
        assert len(hashes) == len(known)
        stream = np.concatenate([[eot, *one] for one in documents]).astype(np.uint16)
        lengths = np.array([len(one) + 1 for one in documents])
        assert documents_with_spans(stream, lengths, length, SpanSet(hashes)).tolist() == expected


def test_a_set_of_spans_has_its_hashes_alone():
    rng = np.random.default_rng(0)
    hashes = np.unique(rng.integers(0, 2**64, 50_000, np.uint64))
    near = np.concatenate([hashes + np.uint64(1), hashes - np.uint64(1), np.array([0, 2**64 - 1], np.uint64)])
    assert SpanSet(hashes).contains(hashes).all()
    assert SpanSet(hashes).contains(near).tolist() == np.isin(near, hashes).tolist()
    assert not SpanSet(hashes[:0]).contains(hashes).any()


def test_signatures_are_those_of_datatrove(tmp_path):
    config = SimpleNamespace(pipeline=SimpleNamespace(near=MinHash(), language=None))
    ours = minhash.Signatures(SimpleNamespace(config=config, folder=tmp_path))
    theirs = MinhashDedupSignature(str(tmp_path), config=ours.config, language=Words())
    theirs._hash_func = minhash.hash_words  # datatrove's own takes no text with xxhash 4
    assert (ours.config.num_buckets, ours.config.hashes_per_bucket, ours.config.seed) == (14, 8, 1)
    draw = random.Random(0)
    ranges = [(32, 127), (32, 0x3000), (0x10000, 0x1FFFF)]
    strange = ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(300)) for _ in range(60)]
    spaced = [" ".join(one[i : i + 5] for i in range(0, 300, 5)) for one in strange]
    documents = [
        *(text(seed, 700) for seed in range(3)),
        *strange,
        *spaced,
        "é è ñ \u0301 a b\u0301 \u0301c d e f g",
        "１２３.٤ x1,2 3.4.5 h\x85i\u2028 jÅ ǅ İ ß",
        "four words are few",
        "",
    ]
    found = 0
    for document in documents:
        shingles = ours.get_shingles(document)
        assert np.array_equal(shingles, theirs.get_shingles(document))
        if len(shingles):
            found += 1
            assert ours.get_signature(shingles) == theirs.get_signature(shingles)
    assert found > 60


PROSE = "It is the first of the lines that we have to read with care, and there is no other.\n"


@pytest.mark.parametrize(
    ("config", "document", "reason"),
    [
        (GopherQuality(), PROSE * 4, None),
        (GopherQuality(), PROSE, "gopher_short_doc"),
        (GopherQuality(max_words=60), PROSE * 4, "gopher_long_doc"),
        (GopherQuality(), "ab " * 90, "gopher_below_avg_threshold"),
        (GopherQuality(max_word_length=3.0), PROSE * 4, "gopher_above_avg_threshold"),
        (GopherQuality(), "word # the of " * 30, "gopher_too_many_hashes"),
        (GopherQuality(), "- another line of the list\n" * 30, "gopher_too_many_bullets"),
        (GopherQuality(max_bullet_lines=0.0), PROSE * 4 + "- one", "gopher_too_many_bullets"),
        (GopherQuality(), "the line of more ...\n" * 5 + PROSE * 4, "gopher_too_many_end_ellipsis"),
        (GopherQuality(), "1234 5678 the of and " * 30, "gopher_below_alpha_threshold"),
        (GopherQuality(), "Ein anderer Satz. " * 30, "gopher_enough_stop_words"),
        (GopherQuality(min_stop_words=0), "Ein anderer Satz. " * 30, None),
        (GopherRepetition(), "".join(text(seed) for seed in range(2)), None),
        (GopherRepetition(), text(1) + "\n" + "same line\n" * 40, "dup_line_frac"),
        (GopherRepetition(), PROSE.replace("\n", " ") * 20, "top_4_gram"),
        (GopherRepetition(max_duplicate_lines=0.0), text(1) + "\na line\na line", "dup_line_frac"),
        (FineWebQuality(), PROSE * 1 + "And there is another one of them, which ends as well as this.", None),
        (FineWebQuality(), text(1)[:300].replace(".", ""), "line_punct_ratio"),
        (FineWebQuality(), "Short line.\n" * 9, "short_line_ratio"),
        (FineWebQuality(), PROSE * 9, "char_dup_ratio"),
    ],
)
def test_filters_refuse_for_their_reason(config, document, reason):
    [(name, one)] = make_filters([config], None)
    keeps, why = get_filter_result(one.filter(Document(document, "")))
    assert name == config.type and why == reason and keeps is (reason is None)


def test_a_language_without_a_tokenizer_is_named():
    with pytest.raises(ValueError, match="^data.pipeline.language=nowhere: .*doesn't have a tokenizer"):
        words_of("nowhere")


def test_files_are_grouped_in_order(tmp_path, monkeypatch):
    source = write(tmp_path / "text", [text(seed) for seed in range(40)], 8)
    other = write(tmp_path / "other", [text(99)], 1)
    config = settings(source, tmp_path, {}, validation={"type": "jsonl", "path": str(other)})
    corpus = Corpus(config, lambda *_: None)
    for tasks in (1, 2, 3, 5, 100):
        groups = group_files(corpus, tasks)
        assert [path.name for group in groups[1:] for path in group.files] == [f"part-{i}.jsonl" for i in range(8)]
        assert groups[0].is_validation and not any(group.is_validation for group in groups[1:])
        assert 2 <= len(groups) <= max(2, tasks)
    monkeypatch.setattr(work, "_SMALLEST", 1)
    assert len(group_files(corpus, None)) == 9


def test_a_pipe_is_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: pipe.write_text("text"))
    thread.start()
    corpus = Corpus(settings(tmp_path, tmp_path, {}, source={"type": "text", "path": str(pipe)}), lambda *_: None)
    thread.join()
    with pytest.raises(ValueError, match="pipe: a pipe can be read only once; data.pipeline needs files"):
        group_files(corpus, None)


RECORD = (
    "WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{number}>\r\nWARC-Target-URI: http://a.b/{number}\r\n"
    "WARC-Date: 2026-01-01T00:00:00Z\r\n{more}Content-Type: {content}\r\nContent-Length: {length}\r\n\r\n"
)
PAGE = "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<html><body><p>{}</p></body></html>"


def warc(path: Path, records: list[tuple[str, str, str]]) -> Path:
    """A member per record: (type, payload type, content)."""
    with open(path, "wb") as file:
        for number, (kind, payload, content) in enumerate(records):
            body = content.encode()
            head = RECORD.format(
                kind=kind,
                number=number,
                more=f"WARC-Identified-Payload-Type: {payload}\r\n" if payload else "",
                content="application/http; msgtype=response" if kind == "response" else "text/plain",
                length=len(body),
            )
            file.write(gzip.compress(head.encode() + body + b"\r\n\r\n"))
    return path


def test_pages_of_web_archives(tmp_path):
    pytest.importorskip("magic")
    path = warc(
        tmp_path / "a.warc.wet.gz",
        [
            ("warcinfo", "", "about"),
            ("conversion", "text/plain", "Der erste Text, naïve."),
            ("response", "text/html", PAGE.format("a page")),
            ("conversion", "text/plain", "with NUL \0"),
            ("conversion", "application/pdf", "no page"),
            ("conversion", "text/plain", "The last."),
        ],
    )
    documents = list(open_source(WarcSource(path=str(tmp_path), html="skip")).documents())
    assert [one.text for one in documents] == ["Der erste Text, naïve.", "The last."]
    assert documents[1].place == f"{path}, record 5"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="a.warc.wet.gz: truncated or damaged .gz file"):
        list(open_source(WarcSource(path=str(path), html="skip")).documents())


def test_html_without_its_extractor_is_one_line(tmp_path, monkeypatch):
    path = warc(tmp_path / "a.warc.gz", [("response", "text/html", PAGE.format("a page"))])
    monkeypatch.setattr("datatrove.utils._import_utils._is_package_available", lambda name: name != "trafilatura")
    with pytest.raises(ValueError, match="^html=extract: trafilatura is not installed; pip install 'trafilatura"):
        list(open_source(WarcSource(path=str(path))).documents())


def test_urls_are_read_as_files(tmp_path):
    system = fsspec.filesystem("memory")
    folder = f"memory://{tmp_path.name}"
    documents = [text(seed) for seed in range(6)]
    write(tmp_path / "text", documents, 2)
    for path in (tmp_path / "text").iterdir():
        system.pipe(f"{folder}/lines/{path.name}.gz", gzip.compress(path.read_bytes()))
    system.pipe(f"{folder}/lines/.hidden.jsonl", b"{")
    system.pipe(f"{folder}/lines/other.csv", b"{")
    pyarrow.parquet.write_table(pyarrow.table({"content": documents}), tmp_path / "a.parquet")
    system.pipe(f"{folder}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    system.pipe(f"{folder}/b.txt", "one\n--\ntwö".encode())

    def read(source):
        return [one.text for one in open_source(source).documents()]

    assert read(JSONLSource(path=f"{folder}/lines")) == documents
    assert read(JSONLSource(path=f"{folder}/lines/part-1*")) == documents[3:]
    assert read(ParquetSource(path=f"{folder}/a.parquet", column="content")) == documents
    assert read(TextSource(path=f"{folder}/b.txt", separator="--")) == ["one", "twö"]
    for url, message in (
        (f"{folder}/none", "no .jsonl file there"),
        (f"{folder}/*.jsonl", "no file matches"),
        ("nowhere://a", "Protocol not known: nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(JSONLSource(path=url))
    system.pipe(f"{folder}/lines/part-0.jsonl.gz", gzip.compress(b'{"text": 1}\n'))
    with pytest.raises(ValueError, match=f"{tmp_path.name}/lines/part-0.jsonl.gz:1: field 'text' is int, not text"):
        read(JSONLSource(path=f"{folder}/lines"))
